package standin

// ListenFor is Listen with another time for unclaimed clients.
var ListenFor = listen
