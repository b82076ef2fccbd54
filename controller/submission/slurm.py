"""SLURM: a batch job whose nodes become a Ray cluster for as long as it lasts.

    here                                  allocation
    FOLDER/files, job.sh, token           sbatch job.sh
    sbatch job.sh  ------------------->   srun slurm_node FOLDER: node 0 starts Ray's head and the run,
    tail -f FOLDER/log.txt                                        the others join it, and leave with it
    squeue, scontrol (status)             FOLDER/exit.json: how the run ended
    scancel  ------------------------->   SIGTERM to the run: checkpoint, clean-up

FOLDER must be seen by the nodes. SLURM's own queue waits for nodes; its limits on time and partition are options of
`sbatch` (`--option`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from controller.submission.job import OVER, Job, JobInfo, Status, SubmitError, note

COMMAND_S = 60.0
"""Longest wait for one of SLURM's commands."""
POLL_S = 1.0
STOP_S = 60.0
LOST_S = 120.0
"""Longest time without an answer of SLURM before a follower gives up (the job goes on)."""
NOTICE_S = 120
"""Seconds before its time limit at which a job is told to end."""
PREFIX = "rlhf-dist:"
_STATUS: dict[str, Status] = {
    "PENDING": "waiting", "CONFIGURING": "waiting", "REQUEUED": "waiting", "SUSPENDED": "waiting",
    "RUNNING": "running", "COMPLETING": "running", "COMPLETED": "succeeded", "CANCELLED": "stopped",
}  # fmt: skip


class Slurm:
    """The cluster whose `sbatch` is on this machine."""

    def __init__(
        self, folder: Path | None = None, options: Sequence[str] = (), gpus_per_node: int | None = None
    ) -> None:
        """folder: where job folders are made, seen by all nodes; None: ./rlhf-dist-jobs. options: of sbatch."""
        self._folder = (folder or Path("rlhf-dist-jobs")).expanduser().resolve()
        self._options, self._gpus = list(options), gpus_per_node
        if shutil.which("sbatch") is None:
            raise SubmitError("`--to slurm` needs SLURM's commands (sbatch, squeue, scontrol, scancel) on this machine")

    def submit(self, job: Job) -> str:
        """See Target."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = self._folder / f"{_plain(job.name)}-{stamp}-{secrets.token_hex(2)}"
        try:
            folder.mkdir(parents=True, mode=0o700)
            (folder / "files").mkdir()
            job.pack(folder / "files")
        except OSError as error:
            raise SubmitError(
                f"cannot write {folder}: {error.strerror}; name a folder that all nodes see (--folder)"
            ) from error
        _write(folder / "token", secrets.token_hex(32), 0o600)
        _write(folder / "command.json", json.dumps(self._orders(job)), 0o600)
        _write(folder / "job.sh", self.script(job, folder), 0o700)
        answer = _slurm("sbatch", "--parsable", str(folder / "job.sh"))
        return answer.strip().split(";")[0]

    def preview(self, job: Job) -> str:
        """See Target."""
        return self.script(job, self._folder / f"{_plain(job.name)}-TIME")

    def script(self, job: Job, folder: Path) -> str:
        """The batch script."""
        lines = [f"--job-name={PREFIX}{_plain(job.recipe)}:{_plain(job.name)}", f"--nodes={job.nodes}"]
        lines += ["--ntasks-per-node=1", f"--cpus-per-task={self._cpus(job)}"]
        lines += [f"--output={folder}/log.txt", f"--signal=B:TERM@{NOTICE_S}"]
        if self._gpus:
            lines.append(f"--gpus-per-node={self._gpus}")
        lines += self._options
        program = shlex.join([sys.executable, "-m", "controller.submission.slurm_node", str(folder)])
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH {line}" for line in lines),
                f"# rlhf-dist: {job.command_line(None)}",
                f"cd {shlex.quote(str(folder / 'files'))} || exit 1",
                # The batch shell is told to end, and tells the run, which ends with a checkpoint.
                # srun takes that number no longer from the job by itself (SLURM 22.05).
                f"srun --ntasks-per-node=1 --cpus-per-task=$SLURM_CPUS_PER_TASK --kill-on-bad-exit=0 {program} &",
                "run=$!",
                # Not to srun, which would end the step at once.
                "trap 'scancel --signal=TERM $SLURM_JOB_ID' TERM INT",
                "wait $run; code=$?",
                "while kill -0 $run 2>/dev/null; do wait $run; code=$?; done",
                "exit $code",
                "",
            ]
        )

    def jobs(self) -> list[JobInfo]:
        """See Target: those in the queue; SLURM forgets a job some minutes after its end."""
        shown = _slurm("scontrol", "--oneliner", "show", "jobs")
        found = [_info(line) for line in shown.splitlines() if f"JobName={PREFIX}" in line]
        return sorted(found, key=lambda one: int(one.id))

    def info(self, job: str) -> JobInfo:
        """See Target."""
        return _info(self._line(job))

    def log(self, job: str, *, follow: bool) -> JobInfo:
        """See Target."""
        file = Path(_field(self._line(job), "StdOut"))
        shown, answered = 0, time.monotonic()
        while True:
            try:
                found, answered = self.info(job), time.monotonic()
            except SubmitError as error:
                if time.monotonic() - answered > LOST_S:
                    raise SubmitError(f"job {job}: no answer for {LOST_S:g} s ({error}); it may still run") from error
                found = None
            shown = _show(file, shown)
            if found is not None and (found.status in OVER or not follow):
                _show(file, shown)
                return found
            time.sleep(POLL_S)

    def stop(self, job: str) -> JobInfo:
        """See Target. The run is told first, and has its time to save."""
        if self.info(job).status in OVER:
            return self.info(job)
        waiting = self.info(job).status == "waiting"
        _slurm("scancel", *([] if waiting else ["--signal=TERM"]), job)
        deadline = time.monotonic() + STOP_S
        while (found := self.info(job)).status not in OVER and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if found.status not in OVER:
            _slurm("scancel", job)
            return replace(found, message=f"not over after {STOP_S:g} s; SLURM ends it now")
        return found

    def _line(self, job: str) -> str:
        line = _slurm("scontrol", "--oneliner", "show", "job", job).strip()
        if f"JobName={PREFIX}" not in line:
            raise SubmitError(f"SLURM's job {job} is none of rlhf-dist's; `rlhf-dist jobs list --to slurm` names those")
        return line

    def _cpus(self, job: Job) -> int:
        """Of a node, whose task would have one otherwise: each slot there and each host process takes one."""
        slots = self._gpus or (-(-job.slots // job.nodes) if _places(job) else job.slots)
        return slots + job.host_processes

    def _orders(self, job: Job) -> dict[str, object]:
        own = [] if job.nodes == 1 or _places(job) else [f"placement.pools.main.nodes={job.nodes}"]
        command = job.command(None)
        return {"command": [*command, *own], "nodes": job.nodes, "variables": dict(job.variables)}


def _places(job: Job) -> bool:
    """Whether the user says how pools lie on nodes; else each node has as many slots as one would have alone."""
    return any("placement.pools" in text.partition("=")[0] or text.startswith("placement=") for text in job.overrides)


def _info(line: str) -> JobInfo:
    _, recipe, name = (_field(line, "JobName") + "::").split(":")[:3]
    state = _field(line, "JobState").split()[0]
    status = _STATUS.get(state, "failed")
    why, folder = _field(line, "Reason"), Path(_field(line, "StdOut")).parent
    message = "" if status in ("running", "succeeded") else f"{state.lower()}" + (f": {why}" if why != "None" else "")
    if (told := folder / "exit.json").is_file() and status in ("failed", "stopped"):
        message = f"{message}; the run ended with code {json.loads(told.read_text())['code']}"
    return JobInfo(
        id=_field(line, "JobId"), name=name, recipe=recipe, status=status, message=message,
        started=_seconds(_field(line, "StartTime")) if status != "waiting" else None,
        ended=_seconds(_field(line, "EndTime")) if status in OVER else None,
    )  # fmt: skip


def _field(line: str, name: str) -> str:
    found = re.search(rf"(?:^|\s){name}=(\S*)", line)
    return found[1] if found else ""


def _seconds(text: str) -> float | None:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise SubmitError(f"`{command[0]}` did not answer within {COMMAND_S:g} s; is slurmctld up?") from error
    except FileNotFoundError as error:
        raise SubmitError(f"there is no `{command[0]}` on this machine; run this where SLURM's commands are") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise SubmitError(f"`{shlex.join(command)}` failed: {said[-1]}")
    return done.stdout


def _show(file: Path, shown: int) -> int:
    """Write what the file has grown by; returns its length."""
    try:
        with file.open("rb") as stream:
            stream.seek(shown)
            text = stream.read()
    except FileNotFoundError:
        return shown
    if text:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
    return shown + len(text)


def _write(path: Path, text: str, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)


def _plain(name: str) -> str:
    """Without what SLURM's listings, or a path, take for something else."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name) or "run"


def warn_if_not_shared(folder: Path) -> None:
    """Say what a job's folder must be, where it is in a place that is a machine's own."""
    if folder.resolve().parts[1:2] and folder.resolve().parts[1] in ("tmp", "var", "dev"):
        note(f"{folder} looks like this machine's own; all nodes must see it (--folder)")
