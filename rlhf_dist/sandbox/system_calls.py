"""The filter of system calls of a sandbox: a program for the kernel, made by libseccomp, installed inside.

It is the second wall. Namespaces already keep a program from the network, other processes and files; the filter takes
away what has broken out of namespaces before (new user namespaces, mounts, kernel interfaces that few programs need).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os

DENIED = (
    # Other processes, and namespaces of its own.
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd"),
    *("unshare", "setns", "chroot", "pivot_root", "userfaultfd", "personality"),
    # File systems.
    *("mount", "umount2", "mount_setattr", "move_mount", "open_tree", "fsopen", "fsmount", "fsconfig", "fspick"),
    *("name_to_handle_at", "open_by_handle_at", "quotactl", "quotactl_fd", "swapon", "swapoff", "fanotify_init"),
    # The kernel itself.
    *("bpf", "perf_event_open", "io_uring_setup", "io_uring_enter", "io_uring_register", "keyctl", "add_key"),
    *("request_key", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot"),
    *("syslog", "acct", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime", "iopl", "ioperm", "vhangup"),
    *("sethostname", "setdomainname", "nfsservctl", "lookup_dcookie", "mbind", "migrate_pages", "move_pages"),
)
NAMESPACE_FLAGS = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x00000080)
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME."""
AF_UNIX = 1
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NE, _EQ, _MASKED_EQ = 1, 4, 7


class _Argument(ctypes.Structure):
    """libseccomp's scmp_arg_cmp."""

    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


@functools.cache
def filter_program() -> bytes:
    """The filter as the kernel takes it. Raises OSError where libseccomp is missing, or makes none."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Argument),
    ]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    context = library.seccomp_init(_ALLOW)
    if not context:
        raise OSError("libseccomp made no filter")

    def deny(name: str, *arguments: _Argument, error: int = errno.EPERM) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:
            return  # This libseccomp, or this processor, knows no such call.
        array = (_Argument * len(arguments))(*arguments)
        failed = library.seccomp_rule_add_array(context, _ERRNO | error, number, len(arguments), array)
        if failed:
            raise OSError(-failed, f"libseccomp takes no rule for {name}: {os.strerror(-failed)}")

    try:
        for name in DENIED:
            deny(name)
        for flag in NAMESPACE_FLAGS:
            deny("clone", _Argument(0, _MASKED_EQ, flag, flag))
        deny("clone3", error=errno.ENOSYS)  # its flags lie in memory, out of a filter's sight: libraries use clone then
        deny("socket", _Argument(0, _NE, AF_UNIX, 0))
        for request in (TIOCSTI, TIOCLINUX):
            deny("ioctl", _Argument(1, _MASKED_EQ, 0xFFFFFFFF, request))
        file = os.memfd_create("filter")
        try:
            failed = library.seccomp_export_bpf(context, file)
            if failed:
                raise OSError(-failed, f"libseccomp exports no filter: {os.strerror(-failed)}")
            return os.pread(file, os.fstat(file).st_size, 0)
        finally:
            os.close(file)
    finally:
        library.seccomp_release(context)
