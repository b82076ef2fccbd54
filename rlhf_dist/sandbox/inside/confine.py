"""The last steps into the sandbox, from its first process: scratch folder, user, rights, filter of system calls.

The process starts with the rights to mount and to change its user in its own namespaces; none is left after `confine`.
"""

from __future__ import annotations

import base64
import ctypes
import os
import resource
import signal
from typing import Any

SCRATCH = "/scratch"
MS_NOSUID, MS_NODEV = 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION = 0x20080522
INSTRUCTION_BYTES = 8
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """The kernel's sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def confine(settings: dict[str, Any]) -> None:
    """`settings`: limits, the user to become (None: already another in a namespace of users), the filter as base64."""
    limits = settings["limits"]
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # short of memory, the kernel ends this before anything else of the machine
    user = settings["user"]
    options = f"size={limits['scratch_bytes']},nr_inodes={limits['scratch_files'] + 1},mode=0700"
    owner = os.getuid() if user is None else user
    options += f",uid={owner},gid={os.getgid() if user is None else user}"
    _call("mount", b"scratch", SCRATCH.encode(), b"tmpfs", ctypes.c_ulong(MS_NOSUID | MS_NODEV), options.encode())
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _drop_capabilities()
    die_with_parent()  # cleared by the change of user; a parent without a right to signal us is seen by its pipe's end
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    program = base64.b64decode(settings["filter"])
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(program) // INSTRUCTION_BYTES, program)))
    _prctl(PR_SET_DUMPABLE, 0)  # nobody reads this process, nor what is forked from it, through /proc


def die_with_parent() -> None:
    """End this process when the one that started it ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def limit(limits: dict[str, Any]) -> None:
    """What one process may take; what all take together is looked at from outside it."""
    cpu_s = max(1, int(limits["cpu_s"] + 0.999))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    if limits["processes"] is not None:  # the first process of the sandbox is one, too
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"] + 1,) * 2)
    for kind, most in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_FSIZE, limits["scratch_bytes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())


def _prctl(option: int, *arguments: Any) -> None:
    values = [value if not isinstance(value, int) else ctypes.c_ulong(value) for value in arguments]
    _call("prctl", ctypes.c_int(option), *values, *[ctypes.c_ulong(0)] * (4 - len(values)))


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
