"""What programs try to get out of a sandbox, each shown to fail. A program prints what it got hold of."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_dist.sandbox import Sandbox

GOT = """
def got(what):
    print("GOT", what)

def attempt(function):
    try:
        got(function())
    except BaseException as error:
        print("refused:", type(error).__name__, error)
"""


def escapes(walls: Sandbox, program: str) -> str:
    result = walls.run(GOT + program)
    assert "GOT" not in result.stdout, result
    assert "refused" in result.stdout, result
    return result.stdout


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"])
def test_no_socket_of_a_network(walls: Sandbox, family: str) -> None:
    escapes(walls, f"import socket; attempt(lambda: socket.socket(socket.{family}, socket.SOCK_DGRAM))")


def test_no_connection_to_this_machine(walls: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        escapes(walls, f"import socket; attempt(lambda: socket.create_connection(('127.0.0.1', {port}), 2))")


def test_no_name_is_looked_up(walls: Sandbox) -> None:
    escapes(walls, "import socket; attempt(lambda: socket.getaddrinfo('example.com', 80))")


def test_no_abstract_socket_of_this_machine(walls: Sandbox) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        name = f"\0rlhf-dist-test-{os.getpid()}"
        server.bind(name)
        server.listen()
        escapes(walls, f"import socket; attempt(lambda: socket.socket(socket.AF_UNIX).connect({name!r}))")


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/shadow", "/etc/passwd", "~/.ssh", "~/.bashrc", "/root/.ssh", "/home", "/tmp", "/sys", "/proc/kcore"),
        *("/proc/1/environ", "/proc/1/mem", "/proc/1/root", "/proc/1/fd"),
    ],
)
def test_no_file_of_this_machine_is_read(walls: Sandbox, path: str) -> None:
    path = os.path.expanduser(path)
    escapes(
        walls,
        f"""
import os
def read(path):
    assert os.path.lexists(path), "there is none"
    return os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1)
attempt(lambda: read({path!r}))
""",
    )


def test_a_run_folder_is_not_there(walls: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("answer")
    escapes(walls, f"attempt(lambda: open({str(tmp_path / 'config.yaml')!r}).read())")
    escapes(walls, f"import os; attempt(lambda: os.listdir({os.getcwd()!r}))")


def test_no_variable_of_the_environment(walls: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = """
import glob, os
seen = str(dict(os.environ))
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        seen += open(path, errors="replace").read()
    except OSError:
        pass
print(seen)
"""
    result = walls.run(program)
    assert result.ok and "PATH" in result.stdout and "hunter2" not in result.stdout


def test_only_its_own_processes_are_there(walls: Sandbox) -> None:
    result = walls.run("import os; print(sorted(int(name) for name in os.listdir('/proc') if name.isdigit()))")
    assert len(eval(result.stdout)) == 2  # the first process and the program


@pytest.mark.parametrize(
    "folder", ["/", "/usr", "/usr/lib", "/etc", "/dev", "/inside", "/inside/inside", "/proc", "/tmp", sys.base_prefix]
)
def test_nothing_is_written_outside(walls: Sandbox, folder: str) -> None:  # fmt: skip
    escapes(walls, f"attempt(lambda: open({folder!r} + '/mine', 'w').write('x'))")


def test_no_link_leads_out_of_scratch(walls: Sandbox) -> None:
    """Links are made by the program, and lead where the program is: to no file of the machine."""
    program = """
import os
def through(target):
    os.symlink(target, "way")
    try:
        return open("way").read(1)
    finally:
        os.unlink("way")
attempt(lambda: through("/etc/shadow"))
attempt(lambda: through("/../../../../etc/shadow"))
attempt(lambda: through("/proc/1/root/etc/shadow"))
attempt(lambda: os.link("/usr/bin/env", "hard"))
attempt(lambda: os.mkfifo("/usr/pipe"))
attempt(lambda: os.mknod("device", 0o60666, os.makedev(8, 0)))
"""
    assert escapes(walls, program).count("refused") == 6


def test_a_descriptor_of_its_parents_is_not_left_open(walls: Sandbox) -> None:
    program = """
import os
numbers = [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]
print([os.readlink(f"/proc/self/fd/{name}") for name in numbers])
"""
    result = walls.run(program)
    assert result.ok
    assert all(name.startswith("pipe:") for name in eval(result.stdout)), result.stdout


def test_rights_are_gone_and_stay_gone(walls: Sandbox) -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
    return name
attempt(lambda: call("mount", b"none", b"/scratch", b"tmpfs", 0, None))
attempt(lambda: call("umount2", b"/scratch", 0))
attempt(lambda: call("unshare", 0x10000000))
attempt(lambda: call("unshare", 0x00020000))
attempt(lambda: call("setns", 0, 0))
attempt(lambda: call("chroot", b"/scratch"))
attempt(lambda: call("ptrace", 16, 1, None, None))
attempt(lambda: call("ptrace", 0, 0, None, None))
attempt(lambda: call("syscall", 321, 0, None, 0))
attempt(lambda: call("syscall", 425, 8, None))
attempt(lambda: call("clone", None, None, 0x10000000, None))
if os.getuid():
    attempt(lambda: os.setuid(0))
attempt(lambda: os.setgroups([0]))
attempt(lambda: call("sethostname", b"mine", 4))
attempt(lambda: call("swapon", b"/dev/null", 0))
for line in open("/proc/self/status"):
    if line.startswith(("CapInh", "CapPrm", "CapEff", "CapAmb")):
        assert int(line.split()[1], 16) == 0, line
    if line.startswith(("NoNewPrivs:", "Seccomp:")):
        assert line.split()[1] != "0", line
print("all looked at")
"""
    assert "all looked at" in escapes(walls, program)


def test_a_program_of_root_gives_no_root(walls: Sandbox) -> None:
    result = walls.command(["/bin/sh", "-c", "su -c id root; mount -t tmpfs none /scratch; id -u; cat /etc/shadow"])
    assert "root:" not in result.stdout and "uid=0" not in result.stdout


def test_the_first_process_cannot_be_signalled(walls: Sandbox) -> None:
    program = "import os, signal\nos.kill(1, signal.SIGKILL)\nos.kill(1, signal.SIGSTOP)\nprint('still here')"
    result = walls.run(program)
    assert result.ok and result.stdout == "still here\n"


def test_a_process_of_this_machine_cannot_be_signalled(walls: Sandbox) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        walls.run(f"import os\nfor number in (9, 15):\n  os.kill({sleeper.pid}, number)")
        walls.run("import os; os.kill(-1, 9)")
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_fork_bomb_ends(walls: Sandbox) -> None:
    began = time.monotonic()
    result = walls.run("import os\nwhile True:\n    os.fork()")
    assert result.outcome in ("error", "timeout") and time.monotonic() - began < 25
    assert walls.run("print(1)").ok


def test_threads_are_counted_too(walls: Sandbox) -> None:
    thread = "threading.Thread(target=time.sleep, args=(9,), daemon=True)"
    assert walls.run(f"import threading, time\nfor n in range(100): {thread}.start()").outcome == "error"


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(1 << 30)",
        "x = []\nwhile True: x.append(' ' * 100_000)",
        # Each has little, all have too much.
        "import os, time\nfor n in range(5):\n  if not os.fork(): break\nx = b'x' * (90 << 20)\ntime.sleep(30)",
    ],
)
def test_memory_is_bounded(walls: Sandbox, program: str) -> None:
    result = walls.run(program)
    assert result.outcome == "memory" and "memory" in result.text.lower(), result


def test_files_are_bounded_in_size_and_number(walls: Sandbox) -> None:
    full = "attempt(lambda: [open(str(n), 'wb').write(bytes(1 << 18)) for n in range(9)])"
    assert "No space left" in escapes(walls, full)
    assert "File too large" in escapes(walls, "attempt(lambda: open('one', 'wb').truncate(1 << 40))")
    assert "No space left" in escapes(walls, "import os; attempt(lambda: [os.mkdir(str(n)) for n in range(99)])")
    assert "Too many open files" in escapes(walls, "attempt(lambda: [open('/dev/null') for _ in range(99)].clear())")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_without_end_is_cut(walls: Sandbox, stream: str) -> None:
    result = walls.run(f"import sys\nwhile True: sys.{stream}.write('x' * 100000)")
    assert result.outcome == "output" and len(getattr(result, stream)) <= (1 << 18) + 1


def test_output_of_what_it_leaves_behind_is_not_waited_for(walls: Sandbox) -> None:
    began = time.monotonic()
    program = "import os, time\nif not os.fork():\n  os.setsid()\n  time.sleep(60)\nprint('done')"
    result = walls.run(program)
    assert result.ok and result.stdout == "done\n" and time.monotonic() - began < 15


@pytest.mark.parametrize("program", ["while True: pass", "import os\nos.fork()\nwhile True: pass"])
def test_a_processor_is_not_held(walls: Sandbox, program: str) -> None:
    result = walls.run(program)
    assert result.outcome == "timeout" and "_s=" in result.text


def test_signals_cannot_put_off_the_end(walls: Sandbox) -> None:
    program = """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
"""
    assert walls.run(program).outcome == "timeout"


def test_the_reports_pipe_gives_nothing(walls: Sandbox) -> None:
    """What a program writes to descriptors it has not opened makes its own result no better."""
    program = """
import os
for number in range(3, 64):
    try:
        os.write(number, b'{"text": "", "code": 0, "verdict": ["x", "ok", ""]}' * 99)
    except OSError:
        pass
os._exit(7)
"""
    result = walls.run(program)
    assert result.outcome == "error"
