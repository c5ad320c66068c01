package pod

// Listens tells whether a socket is bound to an address in the calling thread's network namespace.
var Listens = listens

// ReadParameters reads what the guest is told of the host.
var ReadParameters = readParameters
