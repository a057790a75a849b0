"""Runs one program under limits, in a process of its own: `python -I -S code_guard.py FOLDER BYTES SECONDS`.

Standard input is a secret line, then the program. The secret is written to standard output if the program came to its end,
so that leaving early (`os._exit(0)`) is not taken for success.

On Linux the kernel refuses: seccomp the network, other processes and programs (they cost a program its time, not the
machine's), Landlock writing outside of FOLDER. Elsewhere, and where a kernel lacks them, an audit hook of Python does,
which holds off accidents only. Nothing of this library is imported here.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
import types

SYSCALLS = {
    # socket, connect, socketpair, fork, vfork, execve, execveat, kill, tkill, tgkill, ptrace, io_uring_setup
    "x86_64": (0xC000003E, 56, (41, 42, 53, 57, 58, 59, 322, 62, 200, 234, 101, 425)),
    # the same, without fork and vfork, which there are none of
    "aarch64": (0xC00000B7, 220, (198, 203, 199, 221, 281, 129, 130, 131, 117, 425)),
}
"""Machine → its number for seccomp, clone, and the system calls that are refused."""
CLONE3, CLONE_THREAD = 435, 0x10000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_FILTER = 38, 22, 2
ALLOW, REFUSE, ABSENT, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITES = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))
"""Landlock's rights to write, remove and make files and folders."""
TRUNCATE, TRUNCATE_SINCE = 1 << 14, 3

FORBIDDEN = (
    *("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill"),
    *("ctypes.", "pty.", "webbrowser."),
)
CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.truncate",
)


class Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refuse_system_calls(libc: ctypes.CDLL) -> None:
    """No network, no processes, no other programs; threads are allowed."""
    if platform.machine() not in SYSCALLS:
        return
    architecture, clone, refused = SYSCALLS[platform.machine()]
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    program += [step for number in refused for step in ((EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE))]
    program += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ABSENT)]  # the C library then uses clone, whose flags can be read
    program += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, REFUSE)]
    code = b"".join(struct.pack("HBBI", *step) for step in [*program, (RETURN, 0, 0, ALLOW)])
    memory = ctypes.create_string_buffer(code)
    given = Filter(len(code) // 8, ctypes.cast(memory, ctypes.c_void_p))
    libc.prctl(PR_SET_SECCOMP, SECCOMP_FILTER, ctypes.byref(given), 0, 0)


def refuse_writing_outside(libc: ctypes.CDLL, folder: str) -> None:
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    rights = WRITES | (TRUNCATE if version >= TRUNCATE_SINCE else 0)
    handled = ctypes.create_string_buffer(struct.pack("Q", rights))
    ruleset = libc.syscall(CREATE_RULESET, handled, ctypes.c_size_t(8), 0)
    place = os.open(folder, os.O_PATH)
    beneath = ctypes.create_string_buffer(struct.pack("=Qi", rights, place))
    libc.syscall(ADD_RULE, ruleset, 1, beneath, 0)
    libc.syscall(RESTRICT_SELF, ruleset, 0)
    os.close(place)
    os.close(ruleset)


def limit(folder: str, memory: int, seconds: int) -> None:
    """Give up, for good, what a program may not do."""
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 2**20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        refuse_writing_outside(libc, folder)
        refuse_system_calls(libc)

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        changed = [arguments[0]] if writes or event in CHANGES else []
        outside = [path for path in changed if not isinstance(path, int) and not _inside(path, folder)]
        if event.startswith(FORBIDDEN) or outside:
            raise PermissionError(f"{event} is not allowed")

    sys.addaudithook(hook)


def _inside(path: str | bytes, folder: str) -> bool:
    return os.path.realpath(os.fsdecode(path)).startswith((folder, os.devnull))


def main() -> None:
    folder, memory, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    secret, _, program = sys.stdin.read().partition("\n")
    report = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limit(os.path.realpath(folder), memory, seconds)
    sys.modules["__main__"] = types.ModuleType("__main__")  # pickle and typing look for the program's classes there
    exec(compile(program, "program", "exec"), vars(sys.modules["__main__"]))
    os.write(report, secret.encode())


main()
