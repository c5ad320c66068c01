package journal

// Decode reads the text of a journal.
var Decode = decode
