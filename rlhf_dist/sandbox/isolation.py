"""What isolates a program on this machine: found by trying it, and the command that starts an interpreter in it.

bwrap     bubblewrap: namespaces of its own for files, processes, network, messages, host name
unshare   the same from util-linux's unshare(1), its files put together by mount(8)
none      a process with limits; it reads what its user reads and has a network. Only where it is asked for by name
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rlhf_dist.sandbox.limits import Limits
from rlhf_dist.sandbox.system_calls import filter_program

Isolation = Literal["auto", "bwrap", "unshare", "none"]
INSIDE = "/inside"
BOOT = "import sys; sys.path.insert(0, {!r}); from inside.runner import main; main()"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
TRY_S = 20.0
FIRST_USER, USERS = 61184, 4336
"""Users that programs run as where we are root: those that systemd gives to services, which own nothing."""
_taken = itertools.count(os.getpid())


@dataclass(frozen=True, kw_only=True)
class Start:
    """How an interpreter is started."""

    command: list[str]
    scratch: str = ""
    """A folder of this machine that is to be removed after it; "" where scratch is gone with the process."""


def start(isolation: str, limits: Limits, packages: Sequence[str], scratch: str = "") -> Start:
    """The command for one interpreter. `packages`: folders that its programs import from."""
    isolated = isolation != "none"
    user = FIRST_USER + next(_taken) % USERS if isolated and os.geteuid() == 0 else None
    folder = str(Path(__file__).parent) if not isolated else INSIDE
    settings = {
        "limits": asdict(limits) | ({} if isolated else {"processes": None}),
        "user": user,
        "isolated": isolated,
        "scratch": scratch,
        "inside": folder,
        "packages": list(packages),
        "filter": base64.b64encode(filter_program()).decode() if isolated else "",
    }
    python = [_python(), "-I", "-S", "-B", "-c", BOOT.format(folder), json.dumps(settings)]
    if isolation == "bwrap":
        return Start(command=[*_bwrap(packages), *python])
    if isolation == "unshare":
        return Start(command=[*_unshare(packages), *python])
    return Start(command=python, scratch=scratch)


@functools.cache
def found() -> tuple[str, str]:
    """The best isolation that works here, and "" - or "" and why there is none, with what to do."""
    reasons = []
    for isolation in ("bwrap", "unshare"):
        reason = tried(isolation)
        if not reason:
            return isolation, ""
        reasons.append(f"{isolation}: {reason}")
    return "", (
        f"nothing isolates programs on this machine ({'; '.join(reasons)}); install bubblewrap and libseccomp2, allow "
        f"user namespaces (sysctl user.max_user_namespaces, a container's seccomp profile), or run code without "
        f'isolation by isolation="none"'
    )


@functools.cache
def tried(isolation: str) -> str:
    """Why `isolation` does not work here, or "" if it does: an interpreter is started in it."""
    tool = shutil.which(isolation)
    if sys.platform != "linux":
        return f"needs Linux, this is {sys.platform}"
    if tool is None:
        return f"{isolation} is not installed"
    try:
        command = start(isolation, Limits(), ()).command
        ran = subprocess.run(command, input=b"", capture_output=True, timeout=TRY_S, env={})
    except subprocess.TimeoutExpired:
        return f"an interpreter did not start in {TRY_S:g} s"
    except OSError as error:
        return str(error)
    if b"ready" not in ran.stdout:
        lines = ran.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {ran.returncode}"
    return ""


def _python() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _readable(packages: Sequence[str]) -> list[str]:
    """Folders of this machine that are seen inside, read-only: the system's programs and libraries, and Python's."""
    system = ["/usr", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"]
    # As files are named, and as they are: Python finds its library from its own path.
    python = [sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.path.dirname(_python()))]
    wanted = [*system, *python, *(os.path.abspath(folder) for folder in packages)]
    return [path for path in dict.fromkeys(wanted) if path == "/usr" or not path.startswith("/usr/")]


def _links() -> list[str]:
    return [path for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64") if os.path.exists(path)]


def _bwrap(packages: Sequence[str]) -> list[str]:
    command = ["bwrap", "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--as-pid-1", "--clearenv", "--hostname", "sandbox"]
    if os.geteuid() == 0:
        command += ["--cap-drop", "ALL"]
        for capability in ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID"):  # until `confine` has used them
            command += ["--cap-add", capability]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-add", "CAP_SYS_ADMIN"]
    for name, value in (("PATH", "/usr/bin:/bin"), ("LANG", "C.UTF-8"), ("PYTHONHASHSEED", "0")):
        command += ["--setenv", name, value]
    readable = _readable(packages)
    above = {str(parent): None for path in readable for parent in reversed(Path(path).parents) if str(parent) != "/"}
    for folder in (*above, "/dev", INSIDE):  # which bwrap would make for its own user only
        command += ["--perms", "0755", "--dir", folder]
    for path in readable:
        command += ["--ro-bind-try", path, path]
    for path in _links():
        command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    command += ["--ro-bind", str(Path(__file__).parent / "inside"), f"{INSIDE}/inside"]
    for device in DEVICES:  # --dev would take a second namespace of users, in which nothing can be mounted
        command += ["--dev-bind", device, device]
    return [*command, "--proc", "/proc", "--dir", "/scratch", "--chdir", "/", "--remount-ro", "/"]


def _unshare(packages: Sequence[str]) -> list[str]:
    """A shell in namespaces of its own that puts a root together from read-only binds, goes there, and is replaced."""
    base = next(path for path in ("/mnt", "/media", "/srv", "/opt") if os.path.isdir(path))
    lines = ["set -e", "mount --make-rprivate /", f"mount -t tmpfs -o mode=755,size=1m root {base}", f"cd {base}"]
    for path in [*_readable(packages), *(path for path in _links() if not os.path.islink(path))]:
        if os.path.exists(path):
            lines += _bound(path, path)
    for path in _links():
        if os.path.islink(path):
            lines.append(shlex.join(["ln", "-s", os.readlink(path), f".{path}"]))
    lines += _bound(str(Path(__file__).parent / "inside"), f"{INSIDE}/inside")
    for device in DEVICES:
        lines += [f"mkdir -p dev && touch .{device}", f"mount --bind {device} .{device}"]
    lines += ["mkdir proc scratch old", "mount -t proc proc proc", "pivot_root . old", "umount -l old", "rmdir old"]
    lines += ["mount -o remount,bind,ro /", "cd /"]
    lines.append('exec env -i PATH=/usr/bin:/bin LANG=C.UTF-8 PYTHONHASHSEED=0 "$@"')
    command = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    command += [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return [*command, "--", "sh", "-c", "\n".join(lines), "sh"]


def _bound(source: str, path: str) -> list[str]:
    """Lines that make `path`, below the folder we are in, a read-only view of `source`."""
    target = shlex.quote(f".{path}")
    made = f"mkdir -p {target}" if os.path.isdir(source) else f"mkdir -p $(dirname {target}) && touch {target}"
    return [made, f"mount --bind {shlex.quote(source)} {target}", f"mount -o remount,bind,ro {target}"]
