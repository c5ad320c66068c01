package boot

// ScanPorts looks for a port once.
var ScanPorts = scanPorts

// CountList counts the members of a list.
var CountList = countList

// NewHotplugIn looks for devices in a directory.
var NewHotplugIn = newHotplug
