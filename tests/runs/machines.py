"""Several machines on one: each has a network, host name, processes, shared memory and a raylet of its own.

    pytest ── pipes ──> switch     a network namespace with a bridge
                    ├─> machine 0  10.87.0.1, Ray's head ──┐ network, mount, host name and process namespaces;
                    └─> machine N  10.87.0.N+1, a raylet ──┘ a cable (veth) from eth0 to the bridge

Each one's /etc/hosts maps its host name to 127.0.1.1, as Debian's installer leaves it. All see one file system; `hide`
puts an empty folder over a path on one of them. A namespace's first process ends when its pipe closes, however this
process ends, and the kernel then ends all others in it and takes the interfaces down: nothing is left to clean up.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

START_S = 120.0
"""Limit of a machine's start."""
PYTHON = Path(sys.executable)
ROOT = Path(__file__).parents[2]

# Its last command must not replace the shell, which as process 1 takes care of orphans.
MACHINE = """
set -e
echo {name} > /proc/sys/kernel/hostname
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > {folder}/hosts
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
echo up
read plugged
ip addr add {address}/24 dev eth0
ip link set eth0 up
{ray} start {how} --node-ip-address={address} --num-cpus={cpus} --object-store-memory=100000000 --disable-usage-stats
echo ready
cat
echo over
"""


class Machines:
    """A context manager; leaving it ends everything on them."""

    def __init__(self, folder: Path, cpus: tuple[int, ...]) -> None:
        """folder: for logs; cpus: what each machine says it has."""
        self._folder, self._cpus = folder, cpus
        self._machines: list[subprocess.Popen[str]] = []
        self._ends = ExitStack()

    def __enter__(self) -> Machines:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End them all."""
        self._ends.close()

    @staticmethod
    def address(machine: int) -> str:
        """Of its eth0."""
        return f"10.87.0.{machine + 1}"

    def run(self, machine: int, *command: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """A command there, in its folder; the output is text."""
        pid = self._machines[machine].pid
        inside = ("nsenter", f"--target={pid}", "--net", "--mount", "--uts", f"--pid=/proc/{pid}/ns/pid_for_children")
        return subprocess.run(
            [*inside, *command],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=self._own(machine),
            env=self._environment(machine),
        )

    def hide(self, machine: int, path: Path) -> None:
        """Put an empty folder over `path`, a folder, on this machine only."""
        self.run(machine, "mount", "-t", "tmpfs", "tmpfs", str(path)).check_returncode()

    def show(self, machine: int, path: Path) -> None:
        """Undo `hide`."""
        self.run(machine, "umount", str(path)).check_returncode()

    def cut(self, machine: int) -> None:
        """Pull its cable: no packet goes or comes, and nobody is told."""
        self._bridged("set", f"port{machine}", "down")

    def power_off(self, machine: int) -> None:
        """End it and all its processes at once."""
        self._machines[machine].kill()

    def _bridged(self, *command: str) -> None:
        subprocess.run(["nsenter", f"--target={self._switch.pid}", "--net", "ip", "link", *command], check=True)

    def _start(self) -> None:
        switch = self._begin(["unshare", "--net", "--kill-child", "sh", "-c", "echo up; cat; echo over"], "switch")
        self._await(switch, "up", "switch")
        self._switch = switch
        self._bridged("add", "bridge", "type", "bridge")
        self._bridged("set", "bridge", "up")
        for machine in range(len(self._cpus)):
            self._machines.append(self._boot(machine))
        for machine, process in enumerate(self._machines):
            self._await(process, "up", f"machine {machine}")
            cable = f"port{machine}"
            self._bridged("add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
            self._bridged("set", cable, "master", "bridge", "up")
        self._plug_in(0)
        self._await(self._machines[0], "ready", "machine 0")
        for machine in range(1, len(self._cpus)):
            self._plug_in(machine)
        for machine in range(1, len(self._cpus)):
            self._await(self._machines[machine], "ready", f"machine {machine}")

    def _boot(self, machine: int) -> subprocess.Popen[str]:
        head = machine == 0
        script = MACHINE.format(
            name=f"machine{machine}",
            folder=shlex.quote(str(self._own(machine))),
            address=self.address(machine),
            ray=shlex.quote(str(PYTHON.parent / "ray")),
            how="--head --port=6379 --include-dashboard=false" if head else f"--address={self.address(0)}:6379",
            cpus=self._cpus[machine],
        )
        unshared = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        return self._begin([*unshared, "bash", "-c", script], f"machine{machine}", self._environment(machine))

    def _begin(self, command: list[str], name: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        log = self._ends.enter_context((self._folder / f"{name}.log").open("w"))
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        self._ends.callback(_end, process)
        return process

    def _await(self, process: subprocess.Popen[str], word: str, name: str) -> None:
        assert process.stdout is not None, "the process was started with a pipe"
        deadline = time.monotonic() + START_S
        for line in process.stdout:
            if line.strip() == word:
                return
            if time.monotonic() > deadline:
                break
        log = (self._folder / f"{name.replace(' ', '')}.log").read_text()
        raise RuntimeError(f"{name} ended, or did not say {word!r} within {START_S:g} s: {log[-2000:]}")

    def _plug_in(self, machine: int) -> None:
        pipe = self._machines[machine].stdin
        assert pipe is not None, "the process was started with a pipe"
        pipe.write("plugged\n")
        pipe.flush()

    def _own(self, machine: int) -> Path:
        folder = self._folder / f"machine{machine}"
        folder.mkdir(exist_ok=True)
        return folder

    def _environment(self, machine: int) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "GLOO_", "NCCL_", "VLLM_", "PYTEST_"))
        }
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        own = {"HOME": str(self._own(machine)), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return {**kept, **own, "RAY_raylet_start_wait_time_s": f"{START_S:g}"}


def refusal() -> str | None:
    """Why this process may not make machines; None where it may."""
    try:
        made = subprocess.run(
            [
                "unshare",
                "--net",
                "--mount",
                "--uts",
                "--pid",
                "--fork",
                "--mount-proc",
                "ip",
                "link",
                "set",
                "lo",
                "up",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "`unshare` (util-linux) is not there"
    return None if made.returncode == 0 else f"namespaces need root: {made.stderr.strip()}"


def _end(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)
