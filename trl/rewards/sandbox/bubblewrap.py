"""Run programs in their own namespaces, by bubblewrap (https://github.com/containers/bubblewrap).

    outer bwrap    sees only /usr and Python; mounts an in-memory file system with a limited size and number of files;
                   gives up root, if the trainer runs as root
    inner bwrap    new user, pid, network, ipc, uts and cgroup namespaces, in which no further ones can be made; everything is
                   read-only except that file system; no capabilities; the seccomp filter below
    start.py       sets limits on memory, time, files and processes, then runs the program

Two steps are needed: if the trainer is root, a program in a single bubblewrap would own /proc/sys; if it is not, only the outer
step can limit the number of files.
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl.rewards.sandbox.runner import INSIDE, command
from trl.rewards.sandbox.watch import Limits

NOBODY = 65534
SCRIPTS = Path("/inside")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime")

# System calls that allocate kernel memory which counts for no process, so that no process limit covers it.
OUT_OF_LIMITS = {
    # memfd_create, memfd_secret, shmget, msgget, semget, io_uring_setup, userfaultfd, add_key, bpf, perf_event_open
    "x86_64": (0xC000003E, (319, 447, 29, 68, 64, 425, 323, 248, 321, 298)),
    "aarch64": (0xC00000B7, (279, 447, 194, 186, 190, 425, 282, 217, 280, 241)),
}
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000
OTHER_ABI = 0x40000000


def seccomp_filter(machine: str) -> bytes:
    """A BPF program that refuses the system calls `OUT_OF_LIMITS`; empty for machines that are not listed there."""
    if machine not in OUT_OF_LIMITS:
        return b""
    architecture, refused = OUT_OF_LIMITS[machine]
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    steps += [(AT_LEAST, 0, 1, OTHER_ABI), (RETURN, 0, 0, KILL)]
    steps += [step for number in refused for step in ((EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE))]
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, (RETURN, 0, 0, ALLOW)])


def visible(paths: list[Path]) -> list[str]:
    """Options of bwrap that mount files and folders read-only at the same paths; links stay links."""
    words: list[str] = []
    for path in paths:
        for parent in reversed(path.parents[:-1]):
            words += ["--perms", "0755", "--dir", str(parent)]
        words += ["--symlink", os.readlink(path), str(path)] if path.is_symlink() else ["--ro-bind", *[str(path)] * 2]
    return words


def system() -> list[Path]:
    """The paths that Python needs to start."""
    paths = [Path(name) for name in SYSTEM if os.path.lexists(name)]
    python = Path(os.path.realpath(sys.base_prefix))
    return paths if python.is_relative_to("/usr") else [*paths, python]


class BubblewrapRunner:
    """Runs programs in namespaces of bubblewrap ≥ 0.8, with the limits of `Limits`."""

    isolates = True

    def __init__(self) -> None:
        self.bwrap = shutil.which("bwrap") or "bwrap"
        self.python = os.path.realpath(sys.executable)
        self.name = f"{self._version()} (user, pid, network, ipc and mount namespaces, no capabilities, seccomp)"

    def _version(self) -> str:
        try:
            return subprocess.run([self.bwrap, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "bubblewrap"

    @contextmanager
    def start(self, role: str, files: Mapping[str, bytes], limits: Limits, **pipes: Any) -> Iterator[subprocess.Popen]:
        contents = {name: _readable(content) for name, content in files.items()}
        code = _readable(seccomp_filter(platform.machine()))
        try:
            words = self._outer(limits) + self._inner(contents, code)
            words += command(role, limits.resources() | {"NPROC": limits.processes}, python=self.python, inside=SCRIPTS)
            with subprocess.Popen(
                words, env={}, start_new_session=True, pass_fds=[*contents.values(), code], **pipes
            ) as process:
                yield process
        finally:
            for fd in (*contents.values(), code):
                os.close(fd)

    def _outer(self, limits: Limits) -> list[str]:
        """The outer bwrap: a read-only view of the system, a limited file system at /work, and a user that is not root."""
        is_root = os.geteuid() == 0
        namespaces = [] if is_root else ["--unshare-user", "--uid", "0", "--gid", "0"]
        kept = [word for name in ("SYS_ADMIN", "SETUID", "SETGID", "SETFCAP") for word in ("--cap-add", f"CAP_{name}")]
        view = ["--bind", "/proc", "/proc", "--dev-bind", "/dev", "/dev", "--dir", "/tmp", "--dir", "/work"]
        view += ["--ro-bind", str(INSIDE), str(SCRIPTS)]
        size = f"size={limits.disk}m,nr_inodes={limits.files + 2},mode=1777,nosuid,nodev"
        identity = f"--reuid {NOBODY} --regid {NOBODY} --clear-groups" if is_root else ""
        script = f'mount -t tmpfs -o {size} tmpfs /work && exec setpriv {identity} --no-new-privs "$@"'
        words = [self.bwrap, "--unshare-ipc", "--unshare-net", *namespaces, "--die-with-parent", *kept, *view]
        bwrap = Path(os.path.realpath(self.bwrap))
        tools = [] if bwrap.is_relative_to("/usr") else [bwrap]
        return [*words, *visible([*system(), *tools]), "--", "/bin/sh", "-c", script, "sh"]

    def _inner(self, contents: Mapping[str, int], code: int) -> list[str]:
        words = [os.path.realpath(self.bwrap), "--unshare-all", "--unshare-user", "--disable-userns"]
        words += ["--die-with-parent", "--new-session", "--seccomp", str(code)]
        words += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
        words += [*visible(system()), "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
        words += ["--ro-bind", str(SCRIPTS), str(SCRIPTS), "--bind", "/work", "/work", "--chdir", "/work"]
        words += [] if Path(sys.base_prefix).is_relative_to("/tmp") else ["--symlink", "/work", "/tmp"]
        words += ["--remount-ro", "/"]
        return [*words, *(w for name, fd in contents.items() for w in ("--file", str(fd), f"/work/{name}")), "--"]


def _readable(content: bytes) -> int:
    """A file descriptor from which `content` is read."""
    fd = os.memfd_create("trl", 0)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
