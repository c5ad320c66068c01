package stage

// EncodeReply is what a stage sends.
var EncodeReply = encodeReply

// LookPath finds a program.
var LookPath = lookPath

// Env returns env as a program of this user gets it.
func Env(env []string, uid uint32) []string {
	p := &program{Process: Process{Env: env, UID: uid}}
	p.setEnv()
	return p.Env
}
