"""Untrusted programs, each in an interpreter of its own that is ready before it is asked for, and used once.

    run(code) --> takes a ready interpreter --> one program, once or with several inputs --> ends the interpreter
                         ^
    a thread ------------+  keeps `warm` of them ready; sleeps while there are

At most `most` are in use at a time; who comes later waits. The kernel ends all of them with this process, even where
that is killed, and their files lie in memory of their own: nothing is left to sweep.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from rlhf_dist.sandbox.interpreter import Interpreter
from rlhf_dist.sandbox.isolation import Isolation, found, tried
from rlhf_dist.sandbox.limits import Limits, Result, SandboxError

T = TypeVar("T")
GoOn = Callable[[int, Result], bool]
IDLE_S = 0.5
TRIES = 2


class Sandbox:
    """A pool of interpreters for untrusted programs; a context manager. Threads may share it."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        warm: int | None = None,
        most: int | None = None,
        packages: Sequence[str] = (),
        isolation: Isolation = "auto",
    ) -> None:
        """`warm`: interpreters kept ready (default: one a processor). `most`: in use at a time (default: as many as
        processors, and at least 8). `packages`: folders that programs import from, beside the standard library.
        `isolation`: "none" runs programs of this machine's user on this machine, with limits only."""
        self.limits = limits or Limits()
        processors = os.cpu_count() or 1
        self._warm = processors if warm is None else warm
        self._free = threading.BoundedSemaphore(max(8, processors) if most is None else most)
        self._packages = tuple(packages)
        self.isolation, self.refusal = _chosen(isolation)
        self._ready: deque[Interpreter | SandboxError] = deque()
        self._changed = threading.Condition()
        self._wanted, self._in_use, self._closed = 0, 0, False
        self._starter: threading.Thread | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, code: str, stdin: str = "", files: Mapping[str, str] | None = None) -> Result:
        """The program `code`, run as a main module with that input, beside `files` (name -> text) in its folder."""
        return self.run_each(code, [stdin], files)[0]

    def run_each(
        self,
        code: str,
        inputs: Sequence[str],
        files: Mapping[str, str] | None = None,
        go_on: GoOn = lambda number, result: True,
    ) -> list[Result]:
        """The program once for each input, one after the other, until `go_on` of a number and its result says no."""
        job = {"kind": "program", "code": code, "files": self._files(files)}
        if self.refusal:
            return [self._refused()]
        results: list[Result] = []
        while len(results) < len(inputs) and (not results or go_on(len(results) - 1, results[-1])):
            results += self._use(partial(_ran, job=job, inputs=inputs, first=len(results), go_on=go_on))
        return results

    def command(self, argv: Sequence[str], stdin: str = "", files: Mapping[str, str] | None = None) -> Result:
        """A command of this machine's /usr, beside `files` in its folder."""
        job = {"kind": "command", "argv": list(argv), "stdin": stdin, "files": self._files(files)}
        return self._refused() if self.refusal else self._use(lambda interpreter: interpreter.run(job)[0])

    def test(self, code: str, tests: str) -> Result:
        """Whether the asserts of `tests` hold for the names that `code` defines; each is in a process of its own.

        Names of builtins and standard modules mean themselves in tests, whatever the code makes of them.
        """
        return self.test_each(code, [tests])[0]

    def test_each(self, code: str, tests: Sequence[str], go_on: GoOn = lambda number, result: True) -> list[Result]:
        """The same for several tests, one after the other, the code run anew for each, until `go_on` says no."""
        if self.refusal:
            return [self._refused()]
        results: list[Result] = []
        while len(results) < len(tests) and (not results or go_on(len(results) - 1, results[-1])):
            results += self._use(partial(_tested, code=code, tests=tests, first=len(results), go_on=go_on))
        return results

    def close(self) -> None:
        """End all interpreters that are not in use; no more are started."""
        with self._changed:
            self._closed = True
            ready = [one for one in self._ready if isinstance(one, Interpreter)]
            self._ready.clear()
            self._changed.notify_all()
        for one in ready:
            one.close()

    def _files(self, files: Mapping[str, str] | None) -> dict[str, str]:
        given = dict(files or {})
        size = sum(len(text.encode("utf-8", "replace")) for text in given.values())
        if size > self.limits.scratch_bytes or len(given) + 1 >= self.limits.scratch_files:
            raise ValueError(
                f"{len(given)} files of {size} bytes do not fit scratch_bytes={self.limits.scratch_bytes} and "
                f"scratch_files={self.limits.scratch_files}"
            )
        return given

    def _refused(self) -> Result:
        return Result(outcome="refused", text=self.refusal)

    def _use(self, work: Callable[[Interpreter], T]) -> T:
        """Raises SandboxError if two interpreters, one after the other, fail: that is the machine, not the program."""
        failure = None
        for _ in range(TRIES):
            with self._free, self._taken() as interpreter:
                try:
                    return work(interpreter)
                except SandboxError as error:
                    failure = error
        raise SandboxError(f"{failure}; of {TRIES} interpreters, none was able to run the program") from failure

    @contextlib.contextmanager
    def _taken(self) -> Iterator[Interpreter]:
        with self._changed:
            if self._closed:
                raise SandboxError("the sandbox is closed")
            if self._starter is None:
                self._starter = threading.Thread(target=self._keep_ready, name="sandbox-starter", daemon=True)
                self._starter.start()
            self._wanted += 1
            self._changed.notify_all()
            while not self._ready and not self._closed:
                self._changed.wait(IDLE_S)
            self._wanted -= 1
            if self._closed:
                raise SandboxError("the sandbox is closed")
            interpreter = self._ready.popleft()
            self._changed.notify_all()
            if isinstance(interpreter, SandboxError):
                raise interpreter
            self._in_use += 1
        try:
            yield interpreter
        finally:
            interpreter.close()
            with self._changed:
                self._in_use -= 1
                self._changed.notify_all()

    def _keep_ready(self) -> None:
        """One thread starts all interpreters and outlives them: they end with the thread that made them."""
        while True:
            with self._changed:
                while len(self._ready) >= max(self._warm, self._wanted) and not self._closed:
                    self._changed.wait()
                while self._closed and self._in_use:
                    self._changed.wait()
                if self._closed:
                    return
            try:
                started: Interpreter | SandboxError = Interpreter(self.isolation, self.limits, self._packages)
            except OSError as error:
                started = SandboxError(f"no interpreter was started: {error}")
            with self._changed:
                if not self._closed:
                    self._ready.append(started)
                    self._changed.notify_all()
                    continue
            if isinstance(started, Interpreter):
                started.close()


def _chosen(isolation: Isolation) -> tuple[str, str]:
    if isolation == "auto":
        return found()
    if isolation == "none":
        return "none", ""
    reason = tried(isolation)
    return isolation, f"{isolation}: {reason}" if reason else ""


def _ran(
    interpreter: Interpreter, job: Mapping[str, Any], inputs: Sequence[str], first: int, go_on: GoOn
) -> list[Result]:
    """From input `first` on, one after the other, until `go_on` says no, or the program left no room for another."""
    results: list[Result] = []
    for number in range(first, len(inputs)):
        results.append(interpreter.run({**job, "stdin": inputs[number]})[0])
        if not interpreter.again or not go_on(number, results[-1]):
            break
    return results


def _tested(interpreter: Interpreter, code: str, tests: Sequence[str], first: int, go_on: GoOn) -> list[Result]:
    """From test `first` on, one after the other. The last is one that `go_on` did not like, or that ended without a
    verdict: then its message may still wait to be read, and the interpreter is good for no more."""
    results: list[Result] = []
    for number in range(first, len(tests)):
        nonce = secrets.token_hex(16)
        result, verdict = interpreter.run({"kind": "tests", "code": code}, {"tests": tests[number], "nonce": nonce})
        through = isinstance(verdict, list) and len(verdict) == 3 and verdict[0] == nonce
        if result.ok and through:
            result = replace(result, outcome=verdict[1], text=str(verdict[2]))
        elif result.ok:
            result = replace(result, outcome="killed", text="the process of the tests ended before they were through")
        results.append(result)
        if not through or not interpreter.again or not go_on(number, result):
            break
    return results
