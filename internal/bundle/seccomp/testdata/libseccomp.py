# Compiles seccomp profiles with libseccomp, in the steps that runc takes with it: a profile in JSON on each line of
# the standard input, and on each line of the standard output the program in hexadecimal, or "refused: " and why.
# There are profiles with which libseccomp 2.5 never ends: the alarm ends this process then.
import json
import signal
import sys
import tempfile

import seccomp

ACTIONS = {
    "SCMP_ACT_KILL": lambda _: seccomp.KILL,
    "SCMP_ACT_KILL_THREAD": lambda _: seccomp.KILL,
    "SCMP_ACT_KILL_PROCESS": lambda _: seccomp.KILL_PROCESS,
    "SCMP_ACT_TRAP": lambda _: seccomp.TRAP,
    "SCMP_ACT_ERRNO": seccomp.ERRNO,
    "SCMP_ACT_TRACE": seccomp.TRACE,
    "SCMP_ACT_LOG": lambda _: seccomp.LOG,
    "SCMP_ACT_ALLOW": lambda _: seccomp.ALLOW,
}
OPERATORS = {
    "SCMP_CMP_NE": seccomp.NE,
    "SCMP_CMP_LT": seccomp.LT,
    "SCMP_CMP_LE": seccomp.LE,
    "SCMP_CMP_EQ": seccomp.EQ,
    "SCMP_CMP_GE": seccomp.GE,
    "SCMP_CMP_GT": seccomp.GT,
    "SCMP_CMP_MASKED_EQ": seccomp.MASKED_EQ,
}
ARCHES = {"SCMP_ARCH_X86": "x86", "SCMP_ARCH_X32": "x32"}


def action(name, errno):
    return ACTIONS[name](1 if errno is None else errno)


def argument(a):
    op = OPERATORS[a["op"]]
    if op == seccomp.MASKED_EQ:
        return seccomp.Arg(a["index"], op, a["value"], a.get("valueTwo", 0))
    return seccomp.Arg(a["index"], op, a["value"])


def compile(profile):
    default = action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    f = seccomp.SyscallFilter(defaction=default)
    for arch in profile.get("architectures", []):
        if arch in ARCHES:
            f.add_arch(seccomp.Arch(ARCHES[arch]))
    for rule in profile.get("syscalls", []):
        act = action(rule["action"], rule.get("errnoRet"))
        if act == default:
            continue
        args = [argument(a) for a in rule.get("args", [])]
        indexes = [a["index"] for a in rule.get("args", [])]
        sets = [args] if len(set(indexes)) == len(indexes) else [[a] for a in args]
        for name in rule["names"]:
            if seccomp.resolve_syscall(seccomp.Arch("x86_64"), name) == -1:
                continue
            for s in sets:
                f.add_rule(act, name, *s)
    with tempfile.TemporaryFile() as out:
        f.export_bpf(out)
        out.seek(0)
        return out.read().hex()


for line in sys.stdin:
    signal.alarm(5)
    try:
        print(compile(json.loads(line)), flush=True)
    except (RuntimeError, OSError, ValueError) as e:
        print("refused:", e, flush=True)
    signal.alarm(0)
