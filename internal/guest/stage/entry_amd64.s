#include "textflag.h"

// The program's entry point, for argv[1] as the flags of setns(2) in decimal. It has no stack of
// Go's yet, nothing but the registers and what the kernel has put above SP: argc, argv.
TEXT ·entry(SB), NOSPLIT|NOFRAME, $0
	CMPQ 0(SP), $2
	JNE  start
	MOVQ 16(SP), BX // argv[1]
	XORL SI, SI     // flags

digit:
	MOVBLZX (BX), CX
	SUBL    $'0', CX
	JCS     join
	CMPL    CX, $9
	JHI     join
	IMULL   $10, SI
	ADDL    CX, SI
	INCQ    BX
	JMP     digit

join:
	MOVL SI, R12
	MOVL $157, AX // prctl
	MOVL $4, DI   // PR_SET_DUMPABLE
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	SYSCALL
	MOVL $308, AX // setns
	MOVL $5, DI   // targetFD
	MOVL R12, SI
	SYSCALL
	MOVQ AX, ·entered(SB)

start:
	JMP _rt0_amd64_linux(SB)
