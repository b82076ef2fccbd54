"""Calling a reward function on rows: one call a row, or one for all rows where it takes lists.

An outcome is a row's named scores, `reward` among them, or the text of what went wrong; never a reward of 0 for it.
An `async def` function has up to `concurrency` calls under way at one time, in one event loop that lasts.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import linecache
import math
import os
import signal
import time
import traceback
from bdb import BdbQuit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf_dist.rewards.signature import Adapted, Signature

Scores = dict[str, float]
Outcome = Scores | str
NOT_CALLED = "was not called: another row failed"
"""Outcome of a row that nothing is known of."""
Rows = Mapping[str, Sequence[Any]]
"""Parameter (or column) -> its value in each row: text, numbers, or lists of numbers."""


class Started(Protocol):
    """[calls] when each call that is under way began (`time.monotonic`); 0 for the others."""

    def __setitem__(self, call: int, value: float) -> None: ...


@dataclass(frozen=True)
class Finished:
    """A call that is over."""

    call: int
    outcomes: list[Outcome]
    """One for each row of the call."""
    out_of_memory: bool = False


class Calls:
    """A reward function, ready to be called."""

    def __init__(self, function: Any, signature: Signature, *, timeout_s: float, concurrency: int, alone: bool) -> None:
        """Makes the instance of a class. `timeout_s` ends an async call; who calls ends the others. `alone`: nothing
        else runs in this process, so that alarms and copies of it that a call leaves are the call's, and ended."""
        function = function.function if isinstance(function, Adapted) else function
        self._function: Callable[..., Any] = function() if inspect.isclass(function) else function
        self._signature, self._timeout_s, self.concurrency = signature, timeout_s, concurrency
        self._is_async = inspect.iscoroutinefunction(self._function) or inspect.iscoroutinefunction(
            type(self._function).__call__
        )
        self._runner: asyncio.Runner | None = None
        self._alone = alone

    def run(self, rows: Rows, num_rows: int, started: Started) -> Iterator[Finished]:
        """The outcome of each call, as it ends. `rows`: the arguments."""
        arguments = self._arguments(rows, num_rows)
        if not self._is_async:
            for call, given in enumerate(arguments):
                yield self._call(call, given, num_rows, started)
            return
        self._runner = self._runner or asyncio.Runner()
        loop, ended = self._runner.get_loop(), asyncio.Queue[Finished]()
        running = loop.create_task(self._call_together(arguments, num_rows, started, ended))
        try:
            for _ in arguments:
                yield loop.run_until_complete(ended.get())
            loop.run_until_complete(running)
        finally:
            running.cancel()
            loop.run_until_complete(asyncio.gather(running, return_exceptions=True))
            self._clean_up(os.getpid())

    def _arguments(self, rows: Rows, num_rows: int) -> list[dict[str, Any]]:
        """`rows` are the columns of the parameters, under the parameters' names."""
        values = {name: _values(name, column) for name, column in rows.items()}
        constants = self._signature.constants(rows)
        if self._signature.batched:
            return [values | {name: [value] * num_rows for name, value in constants.items()}]
        return [{name: column[row] for name, column in values.items()} | constants for row in range(num_rows)]

    def _call(self, call: int, given: dict[str, Any], num_rows: int, started: Started) -> Finished:
        process = os.getpid()
        started[call] = time.monotonic()
        try:
            returned = self._function(**given)
            return self._finished(call, returned, num_rows)
        except BaseException as error:
            if not self._alone and isinstance(error, (BdbQuit, KeyboardInterrupt)):  # a person's, at a debugger
                raise
            return self._failed(call, error, num_rows)
        finally:
            self._clean_up(process)
            started[call] = 0.0

    def _clean_up(self, process: int) -> None:
        if self._alone and os.getpid() != process:  # the function forked and came back twice: this is the copy
            os._exit(0)
        if self._alone:
            signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm it left must not ring in the next row

    async def _call_together(
        self, arguments: list[dict[str, Any]], num_rows: int, started: Started, ended: asyncio.Queue[Finished]
    ) -> None:
        free = asyncio.Semaphore(self.concurrency)

        async def one(call: int, given: dict[str, Any]) -> None:
            async with free:
                started[call] = time.monotonic()
                limit = asyncio.timeout(self._timeout_s)
                try:
                    async with limit:
                        returned = await self._function(**given)
                    finished = self._finished(call, returned, num_rows)
                except BaseException as error:
                    finished = self._failed(call, error, num_rows, late=limit.expired())
                started[call] = 0.0
                ended.put_nowait(finished)

        await asyncio.gather(*(one(call, given) for call, given in enumerate(arguments)))

    def _finished(self, call: int, returned: Any, num_rows: int) -> Finished:
        if inspect.isawaitable(returned):
            if inspect.iscoroutine(returned):
                returned.close()
            raise TypeError("it returned something to await; write `async def`, or await it in the function")
        if not self._signature.batched:
            return Finished(call, [self._outcome(returned)])
        return Finished(call, [self._outcome(one) for one in _split(returned, num_rows)])

    def _outcome(self, returned: Any) -> Outcome:
        return _outcome(returned, "score" if self._signature.as_verl else "reward")

    def _failed(self, call: int, error: BaseException, num_rows: int, *, late: bool = False) -> Finished:
        """`late`: our limit ended it, not one of the function's own."""
        if late and isinstance(error, TimeoutError):
            text = f"did not return within {self._timeout_s:g} s"
        elif isinstance(error, SystemExit):
            text = f"called sys.exit({error.code!r})"
        else:
            text = f"raised {type(error).__name__}: {error}{_place(error)}"
            if not isinstance(error, asyncio.CancelledError):  # we left it, since another row failed
                traceback.print_exception(error)  # to the log
        rows = num_rows if self._signature.batched else 1
        return Finished(call, [text] * rows, out_of_memory=isinstance(error, MemoryError))


def _values(parameter: str, column: Sequence[Any]) -> list[Any]:
    """verl's functions look into extra_info and ground_truth; a text column holds an object or a list as JSON."""
    if parameter not in ("extra_info", "ground_truth", "ground_truths"):
        return list(column)
    values = [_object(value) for value in column]
    return [value or {} for value in values] if parameter == "extra_info" else values


def _object(value: Any) -> Any:
    """What a text that is a JSON object or list holds; anything else as it is."""
    if not isinstance(value, str) or not value.startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _split(returned: Any, num_rows: int) -> list[Any]:
    """What a batched function returned, by row: a list of numbers or of dicts, or a dict of lists."""
    if isinstance(returned, Mapping):
        columns = {name: _split(values, num_rows) for name, values in returned.items()}
        return [{name: values[row] for name, values in columns.items()} for row in range(num_rows)]
    try:
        values = list(returned.tolist() if hasattr(returned, "tolist") else returned)
    except TypeError:
        raise TypeError(f"it takes lists, so it must return one, got {short(repr(returned))}") from None
    if len(values) != num_rows:
        raise ValueError(f"it must return one reward for each of {num_rows} rows, got {len(values)}")
    return values


def _outcome(returned: Any, reward: str) -> Outcome:
    scores = dict(returned) if isinstance(returned, Mapping) else {"reward": returned}
    if "reward" not in scores and reward in scores:
        scores["reward"] = scores.pop(reward)
    if "reward" not in scores:
        return f"returned a dict without 'reward': {short(repr(returned))}"
    finite: Scores = {}
    for name, value in scores.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            return f"returned {name} = {short(repr(value))}, not a number"
        if not math.isfinite(number):
            return f"returned {name} = {number}; it must be finite"
        finite[str(name)] = number
    return finite


def _place(error: BaseException) -> str:
    """Where it was raised, with the line of source if that can be read; "" where that is this file."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames or frames[-1][0].f_code.co_filename == __file__:
        return ""
    frame, number = frames[-1]
    file = frame.f_code.co_filename
    if file.startswith("<"):  # A function that travelled by value: cloudpickle leaves its file in its globals only.
        file = frame.f_globals.get("__file__", file)
    line = linecache.getline(file, number).strip()
    return f"; at {file}:{number} in {frame.f_code.co_name}" + (f": {line}" if line else "")


def short(text: str, limit: int = 80) -> str:
    """The text, cut."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
