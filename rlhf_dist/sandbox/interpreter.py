"""One warm interpreter in a sandbox, from outside: started, given one program, ended."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from rlhf_dist.sandbox.inside.frames import LENGTH_BYTES
from rlhf_dist.sandbox.isolation import start
from rlhf_dist.sandbox.limits import Limits, Result, SandboxError

START_S = 60.0
GRACE_S = 30.0
"""How much longer than its limits a run may take to be reported: the machine is slow, or something is wrong."""
CHUNK = 1 << 16
FRAME_BYTES = 1 << 16
"""Of a report besides the program's output."""


class Interpreter:
    """Only the thread that made it may end first: the kernel ends it with that thread."""

    def __init__(self, isolation: str, limits: Limits, packages: Sequence[str]) -> None:
        """Raises SandboxError if it does not come up."""
        self._limits, self._errors = limits, tempfile.TemporaryFile()
        self._scratch = tempfile.mkdtemp(prefix="rlhf-dist-sandbox-") if isolation == "none" else ""
        self._process = subprocess.Popen(
            start(isolation, limits, packages, self._scratch).command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None, "they are pipes"
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._ready, self.again = False, True

    def wait_until_ready(self) -> None:
        """Raises SandboxError if it does not come up."""
        if not self._ready:
            self._exchange((), time.monotonic() + START_S, FRAME_BYTES)
            self._ready = True

    def run(self, *messages: dict[str, Any]) -> tuple[Result, Any]:
        """What came of one program, and the verdict of its tests. Raises SandboxError if the interpreter fails.

        `again` is False afterwards where the program left what cannot be removed: no other run has room then.
        """
        self.wait_until_ready()
        deadline = time.monotonic() + self._limits.wall_s + GRACE_S
        most = FRAME_BYTES + 2 * self._limits.output_bytes
        answer = self._exchange(messages, deadline, most)
        result = Result(
            outcome=answer["outcome"],
            text=answer["text"],
            stdout=base64.b64decode(answer["stdout"]).decode("utf-8", "replace"),
            stderr=base64.b64decode(answer["stderr"]).decode("utf-8", "replace"),
            wall_s=answer["wall_s"],
            cpu_s=answer["cpu_s"],
        )
        self.again = bool(answer["again"])
        return result, answer["verdict"]

    def close(self) -> None:
        """End it and all that it started, and remove what it wrote."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, 9)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._errors.close()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _exchange(self, messages: Sequence[dict[str, Any]], deadline: float, most: int) -> Any:
        """Send messages, read one answer of at most `most` bytes."""
        texts = [json.dumps(message).encode() for message in messages]
        out = memoryview(b"".join(len(text).to_bytes(LENGTH_BYTES, "big") + text for text in texts))
        read, poller = bytearray(), select.poll()
        poller.register(self._from, select.POLLIN)
        if out:
            poller.register(self._to, select.POLLOUT)
        while len(read) < LENGTH_BYTES or len(read) < LENGTH_BYTES + int.from_bytes(read[:LENGTH_BYTES], "big"):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise SandboxError(f"a sandbox did not answer in time{self._said()}")
            for descriptor, event in poller.poll(1000 * left_s):
                if descriptor == self._to:
                    out = out[
                        len(out) if event & (select.POLLERR | select.POLLHUP) else os.write(self._to, out[:CHUNK]) :
                    ]
                    if not out:
                        poller.unregister(self._to)
                    continue
                part = os.read(self._from, CHUNK)
                read += part
                if not part or len(read) > most:
                    raise SandboxError(f"a sandbox {'ended' if not part else 'said too much'}{self._said()}")
        return json.loads(read[LENGTH_BYTES:])

    def _said(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read(1 << 16).decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""
