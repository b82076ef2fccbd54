"""What runs on every node of a SLURM job: Ray, and on node 0 the run.

    node 0     free port, ray start --head --block    head.json    all nodes there?   rlhf-dist run   over.json
    others     wait for head.json,  ray start --block              ...                wait for over.json

Started by srun with the job's folder, which all nodes see. Every wait is bounded; each node ends the processes that
it started, and no others: two jobs may share a node.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

HEAD_S = 180.0
"""Longest wait for the head, and then for all nodes."""
END_S = 30.0
"""Longest wait for Ray to end."""
POLL_S = 0.5
_PORTS = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")


class NodeError(RuntimeError):
    """The nodes did not become a cluster."""


def main(folder: Path) -> int:
    """Be node SLURM_PROCID of the job; returns the run's exit code on node 0, 0 on others."""
    orders = json.loads((folder / "command.json").read_text())
    place = int(os.environ.get("SLURM_PROCID", "0"))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        **orders["variables"],
    }
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        environment.pop(name, None)
    return _head(folder, orders, environment) if place == 0 else _worker(folder, environment)


def _head(folder: Path, orders: Mapping[str, Any], environment: dict[str, str]) -> int:
    scratch = Path(tempfile.mkdtemp(prefix="rd"))  # short: Ray puts Unix sockets into it, on all nodes
    address = f"{_own_address()}:{_free_port()}"
    host, _, port = address.rpartition(":")
    options = [
        "--head",
        f"--node-ip-address={host}",
        f"--port={port}",
        "--include-dashboard=false",
        f"--temp-dir={scratch}",
    ]
    told: list[int] = []
    run: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        told.append(number)
        if run is not None:
            run.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    ray = _start_ray(options, environment, folder / "ray-0.log")
    code = 1
    try:
        _wait_for_nodes({"address": address, "scratch": str(scratch)}, int(orders["nodes"]), environment, ray, folder)
        if not told:
            program = str(Path(sys.executable).with_name(orders["command"][0]))
            run = subprocess.Popen([program, *orders["command"][1:], f"ray.address={address}"], env=environment)
            code = run.wait()
    except NodeError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    finally:
        _publish(folder / "exit.json", {"code": code})
        _end(ray, scratch)
    return code if not told or code else 130


def _worker(folder: Path, environment: dict[str, str]) -> int:
    head = _awaited(folder / "head.json", HEAD_S, folder)
    if head is None:
        return 1
    log = folder / f"ray-{os.environ['SLURM_PROCID']}.log"
    ray = _start_ray([f"--address={head['address']}", f"--node-ip-address={_own_address()}"], environment, log)
    ended = False

    def leave(*_: Any) -> None:
        nonlocal ended
        ended = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # node 0 ends the run, and then says so
    signal.signal(signal.SIGUSR2, leave)
    try:
        while not ended and not (folder / "exit.json").is_file():
            if ray.poll() is not None:
                print(f"error: Ray on {socket.gethostname()} ended with code {ray.returncode}: {log}", file=sys.stderr)
                return 1
            time.sleep(POLL_S)
    finally:
        _end(ray, Path(head["scratch"]))
    return 0


def _start_ray(options: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    cpus = os.environ.get("SLURM_CPUS_ON_NODE")
    given = [f"--num-cpus={cpus}"] if cpus else []
    # Ray's own choices are the same for every cluster, and another job may be on this node.
    ports = [f"--{name}-port={_free_port()}" for name in _PORTS]
    ports += ["--min-worker-port=0", "--max-worker-port=0"]
    command = [str(Path(sys.executable).with_name("ray")), "start", *options, *given, *ports, "--block"]
    with log.open("wb") as said:
        return subprocess.Popen(
            [*command, "--disable-usage-stats"], env=dict(environment), stdout=said, stderr=said, start_new_session=True
        )


def _wait_for_nodes(
    head: Mapping[str, str], nodes: int, environment: Mapping[str, str], ray: subprocess.Popen[bytes], folder: Path
) -> None:
    """Publishes `head` once the head answers; raises NodeError where not all nodes come."""
    deadline, there, address = time.monotonic() + HEAD_S, 0, head["address"]
    while time.monotonic() < deadline:
        if ray.poll() is not None:
            raise NodeError(
                f"Ray's head on {socket.gethostname()} ended with code {ray.returncode}: {folder}/ray-0.log"
            )
        there = _nodes_there(address, environment)
        if there and not (folder / "head.json").is_file():
            _publish(folder / "head.json", head)
        if there >= nodes:
            return
        time.sleep(POLL_S)
    raise NodeError(f"{there} of {nodes} nodes joined Ray at {address} within {HEAD_S:g} s; do they see {folder}?")


def _nodes_there(address: str, environment: Mapping[str, str]) -> int:
    """Live nodes; 0 while the head is silent. Asked in a process of its own: Ray reads its token when imported."""
    code = (
        "import sys; from ray._raylet import GcsClient; "
        "print(sum(one.state == 0 for one in GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10).values()))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, address],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 0
    return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.split() else 0


def _awaited(path: Path, limit_s: float, folder: Path) -> Any:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and not (folder / "exit.json").is_file():
        if path.is_file():
            return json.loads(path.read_text())
        time.sleep(POLL_S)
    print(f"error: no Ray head within {limit_s:g} s ({path})", file=sys.stderr)
    return None


def _publish(path: Path, value: Any) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value))
    beside.replace(path)


def _end(ray: subprocess.Popen[bytes], scratch: Path) -> None:
    """End Ray on this node: the command that waits on its processes, all that it started, and its files."""
    if ray.poll() is None:
        ray.send_signal(signal.SIGTERM)
        try:
            ray.wait(END_S)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(ray.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    shutil.rmtree(scratch, ignore_errors=True)


def _own_address() -> str:
    """As other nodes reach this one."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        found = socket.gethostbyname(name)
    except OSError:
        found = "127.0.0.1"
    if not found.startswith("127."):
        return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks which address would be taken
            return str(probe.getsockname()[0])
        except OSError:
            return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
