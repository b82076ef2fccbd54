"""What a program in a sandbox may take, and what came of it: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "wrong", "error", "timeout", "memory", "output", "killed", "refused"]
"""ok: it ended by itself (exit code 0), or its tests passed. wrong: a test's assert failed, or its output is another.
error: it raised, or ended with another exit code. timeout, memory, output: it took more than it may. killed: a signal
that is none of these ended it. refused: it was not run, since nothing on this machine isolates it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one run of a program may take."""

    wall_s: float = 10.0
    """Seconds by the clock."""
    cpu_s: float = 5.0
    """Seconds of a processor, for each process."""
    memory_bytes: int = 512 << 20
    """Of all its processes and its files; also the address space of each."""
    processes: int = 16
    """Processes and threads at one time."""
    open_files: int = 64
    """Descriptors of a process."""
    output_bytes: int = 1 << 20
    """Written to stdout and stderr together."""
    scratch_bytes: int = 16 << 20
    """Of all files it writes, which are gone with it."""
    scratch_files: int = 1024
    """Files, folders and links it makes."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"sandbox limit {name} must be > 0, got {value}")
        if self.processes < 2:
            raise ValueError(f"sandbox limit processes must be >= 2 (tests and code are two), got {self.processes}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one run."""

    outcome: Outcome
    text: str = ""
    """What was wrong, in one line: the exception, the limit, the signal."""
    stdout: str = ""
    stderr: str = ""
    """What was written, up to the limit; bytes that are no UTF-8 are replaced."""
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the outcome is ok."""
        return self.outcome == "ok"


class SandboxError(RuntimeError):
    """The sandbox itself failed, twice: nothing is known of the program."""
