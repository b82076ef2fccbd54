"""A real SLURM of two nodes on this machine: one slurmctld, and a slurmd for each node."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 60.0
NODES = ("n1", "n2")


def why_not() -> str:
    """Why SLURM cannot run here; empty where it can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
    if missing:
        return f"needs SLURM on this machine (apt-get install slurm-wlm), there is no {missing[0]}"
    return "" if os.geteuid() == 0 else "slurmd runs as root"


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the environment in which SLURM's commands find it. Ends the processes that it started."""
    config = folder / "slurm.conf"
    user = getpass.getuser()
    ports = {name: _free_port() for name in ("ctld", *NODES)}
    nodes = "\n".join(
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[name]} CPUs={_cpus()} RealMemory=1000"
        for name in NODES
    )
    config.write_text(
        f"""ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports["ctld"]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
KillWait=10
{nodes}
PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
"""
    )
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    environment = {**os.environ, "SLURM_CONF": str(config)}
    commands = [["slurmctld", "-D", "-f", str(config)], *(["slurmd", "-D", "-N", n, "-f", str(config)] for n in NODES)]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    try:
        deadline = time.monotonic() + START_S
        while _idle(environment) < len(NODES):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.5)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _idle(environment: dict[str, str]) -> int:
    shown = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%t"], env=environment, capture_output=True, text=True, check=False
    )
    return shown.stdout.split().count("idle")


def _cpus() -> int:
    return os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
