package standin

// ListenFor is Listen with another time for unclaimed clients.
var ListenFor = listen

// Awaiting is the number of Awaits that wait.
func (l *Listener) Awaiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.awaited)
}
