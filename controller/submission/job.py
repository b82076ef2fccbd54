"""What is submitted, and what a cluster that takes jobs must be able to do.

Job  -- submit -->  id  -- follow, info, stop -->  JobInfo
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from controller.submission.files import JobFiles

Status = Literal["waiting", "running", "succeeded", "failed", "stopped"]
OVER: tuple[Status, ...] = ("succeeded", "failed", "stopped")
SETTINGS = "rlhf-dist-settings.yaml"
"""Name under which the --config file travels."""


class SubmitError(RuntimeError):
    """The job could not be sent, found or reached; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to be launched elsewhere."""

    name: str
    recipe: str
    files: JobFiles
    overrides: Sequence[str] = ()
    config: Path | None = None
    """A file of settings, which travels too."""
    slots: int = 1
    """Slots that the placement needs, a CPU or GPU each."""
    host_processes: int = 0
    gpus: bool = False
    """Whether a slot is a GPU."""
    nodes: int = 1
    pip: Sequence[str] = ()
    """Packages to install for the job."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job."""

    def pack(self, folder: Path) -> None:
        """Copy what travels into `folder`, the job's working folder."""
        for path, file in self.files.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / path)
        if self.config is not None:
            shutil.copy(self.config.expanduser(), folder / SETTINGS)

    @property
    def travels(self) -> bool:
        """Whether it has files at all."""
        return bool(self.files.files) or self.config is not None

    def command(self, address: str | None) -> list[str]:
        """`rlhf-dist run ...` in the job's working folder; address: of Ray there, unless the user has given one."""
        options = ["--config", SETTINGS] if self.config is not None else []
        given = any(text.lstrip("+").startswith("ray.address=") for text in self.overrides)
        joins = [] if given or address is None else [f"ray.address={address}"]
        return ["rlhf-dist", "run", self.files.spec, *options, *self.overrides, *joins]

    def command_line(self, address: str | None) -> str:
        """The same for a shell."""
        return shlex.join(self.command(address))


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """What is known of a job."""

    id: str
    name: str
    recipe: str = ""
    status: Status
    message: str = ""
    """Why it waits, or how it ended."""
    started: float | None = None
    """Seconds since 1970."""
    ended: float | None = None


class Target(Protocol):
    """Where jobs go. Every call is bounded; all raise SubmitError."""

    def submit(self, job: Job) -> str:
        """Send it; returns its id."""

    def preview(self, job: Job) -> str:
        """What would be sent, for people."""

    def jobs(self) -> list[JobInfo]:
        """Runs of ours that the cluster remembers, the newest last."""

    def info(self, job: str) -> JobInfo:
        """What is known of one."""

    def log(self, job: str, *, follow: bool) -> JobInfo:
        """Write its log to stdout: what there is, or until the job is over."""

    def stop(self, job: str) -> JobInfo:
        """Ask it to end, and wait a while for it."""


def note(text: str) -> None:
    """A line for people; stdout is the job's."""
    print(text, file=sys.stderr, flush=True)
