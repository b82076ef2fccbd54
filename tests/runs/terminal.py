"""A command at a terminal of its own, typed into and read from."""

from __future__ import annotations

import os
import pty
import select
import time
from pathlib import Path


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, command: list[str], folder: Path, path: str = "") -> None:
        """path: folders that come before ours in PYTHONPATH."""
        self.said = ""
        self._at = 0
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CI", "PYTHONBREAKPOINT"))}
            environment |= {
                "TERM": "xterm",
                "COLUMNS": "200",
                "PYTHONPATH": f"{path}:{Path(__file__).parents[2]}".lstrip(":"),
            }
            os.execvpe(command[0], command, environment)

    def expect(self, text: str, timeout_s: float = 200.0) -> str:
        """What comes up to and with the next `text`."""
        deadline = time.monotonic() + timeout_s
        while (found := self.said.find(text, self._at)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.said[self._at :]}"
            assert self._read(1.0), f"the command ended without {text!r}:\n{self.said[self._at :]}"
        found += len(text)
        part, self._at = self.said[self._at : found], found
        return part

    def send(self, line: str) -> None:
        os.write(self._fd, f"{line}\n".encode())

    def ended(self, timeout_s: float = 60.0) -> int:
        """Exit code; everything that is still said is read."""
        deadline = time.monotonic() + timeout_s
        while self._read(1.0):
            assert time.monotonic() < deadline, f"it goes on:\n{self.said[self._at :]}"
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self, wait_s: float) -> bool:
        """False at the end."""
        if select.select([self._fd], [], [], wait_s)[0]:
            try:
                new = os.read(self._fd, 1 << 16)
            except OSError:  # how Linux says that the other end is closed
                return False
            self.said += new.decode(errors="replace").replace("\r\n", "\n")
            return bool(new)
        return True
