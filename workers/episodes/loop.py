"""Episodes and the engine, each in a thread of its own, so that neither holds up the other.

    the op's thread: engine                          a thread of their own: episodes (asyncio)
      requests from the inbox -> engine.add            at most `concurrent` under way, the next as one ends
      engine.step()                                    await chat.generate():  request -> inbox, wait for its future
      responses -> futures, in one call                await chat.run(tool):   a thread for the tool, wait for it
      nothing in flight: wait for the inbox
      interrupted: abort, keep what was drawn          go on: a request that comes meanwhile waits in the inbox
      going on: what was kept -> engine.add

What unblocks whom: the engine's thread waits for the inbox only while nothing is in flight, a second at a time, and
looks each time whether the episodes' thread still answers. An episode waits for the engine or a tool, and its own
deadline is over both. Code that blocks the episodes' thread (`time.sleep` in `episode`) holds up all of them, never
the engine; once it has done so for `BLOCKED_S`, the op ends with the place where it stands.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import numpy as np

from workers.engines.generation.interface import GenerationEngine, Request, Response, continued, resumed_seed

T = TypeVar("T")
_Asked: TypeAlias = tuple[Request, GenerationEngine]
BLOCKED_S = 60.0
"""Longest that the episodes' thread may not answer."""
_LOOK_S = 1.0


class EpisodesBlocked(RuntimeError):
    """An environment's code blocks the thread that all episodes share."""


class EpisodeLoop:
    """Runs coroutines that may ask the engine for responses, its own or others. One at a time an engine: `run`, or
    `begin` and `go_on` until that has results."""

    def __init__(self, engine: GenerationEngine, blocked_s: float = BLOCKED_S) -> None:
        self._engine, self._blocked_s = engine, blocked_s
        self._inbox: queue.SimpleQueue[_Asked | str | None] = queue.SimpleQueue()
        self._futures: dict[str, asyncio.Future[Response]] = {}
        self._loop = asyncio.new_event_loop()
        self._in_flight: dict[str, _Asked] = {}
        self._held: dict[str, _Asked] = {}
        """What was in flight when it was interrupted."""
        self._begun: dict[str, Response] = {}
        """Of requests that were interrupted: what had been drawn by then."""
        self._results: list[Any] = []
        self._failure: list[BaseException] = []
        self._thread: threading.Thread | None = None
        self._asked, self._asked_s = False, 0.0

    def run(self, coroutines: Sequence[Callable[[], Awaitable[T]]], concurrent: int) -> list[T]:
        """Results of all, in their order. Raises what the engine raised, or a coroutine, and EpisodesBlocked."""
        self.begin(coroutines, concurrent)
        results = self.go_on()
        assert results is not None, "nobody interrupts it"
        return results

    def begin(self, coroutines: Sequence[Callable[[], Awaitable[T]]], concurrent: int) -> None:
        """Let the coroutines run, up to what they ask of an engine."""

        def episodes() -> None:
            asyncio.set_event_loop(self._loop)
            try:
                self._results.extend(self._loop.run_until_complete(_all(coroutines, concurrent)))
            except BaseException as error:  # noqa: BLE001 - raised in the op's thread
                self._failure.append(error)
            self._inbox.put(None)

        self._thread = threading.Thread(target=episodes, daemon=True, name="episodes")
        self._thread.start()

    def go_on(self, stop: Callable[[], bool] | None = None) -> list[Any] | None:
        """Results of all, in their order; None once `stop`, which is asked after every token, is true before that:
        nothing is in flight then, so that weights may change, and the next call goes on. Raises as `run`."""
        assert self._thread is not None, "go_on() needs begin()"
        try:
            over = self._serve(self._thread, stop)
        except BaseException:
            self.abandon()
            raise
        if not over:
            for name, (_, engine) in self._in_flight.items():
                self._begun[name] = continued(self._begun.get(name), engine.abort(name))
            self._held, self._in_flight = self._in_flight, {}
            return None
        self.abandon()
        if self._failure:
            raise self._failure[0]
        return self._results

    def abandon(self) -> None:
        """End what has not ended; engines are left as they were found."""
        for name, (_, engine) in self._in_flight.items():
            engine.abort(name)
        self._in_flight = {}
        if self._thread is not None:
            self._close(self._thread)

    async def generate(self, request: Request, engine: GenerationEngine | None = None) -> Response:
        """Have an engine (None: the loop's own) draw a response; called in the episodes' thread."""
        future: asyncio.Future[Response] = self._loop.create_future()
        self._futures[request.name] = future
        self._inbox.put((request, engine or self._engine))
        try:
            return await future
        finally:
            del self._futures[request.name]
            if future.cancelled():
                self._inbox.put(request.name)

    def _serve(self, thread: threading.Thread, stop: Callable[[], bool] | None) -> bool:
        """Whether all are over; else it was stopped."""
        held, self._held = self._held, {}
        for asked in held.values():
            self._add(*asked)
        while True:
            for item in self._arrived():
                if item is None:
                    return True
                if isinstance(item, tuple):
                    self._add(*item)
                elif item in self._in_flight:
                    self._begun.pop(item, None)
                    self._in_flight.pop(item)[1].abort(item)
            self._check_answers(thread)
            for engine in {id(one): one for _, one in self._in_flight.values()}.values():
                done = engine.step()
                if done:
                    for name, _ in done:
                        del self._in_flight[name]
                    whole = [(name, continued(self._begun.pop(name, None), response)) for name, response in done]
                    self._loop.call_soon_threadsafe(self._deliver, whole)
            if stop is not None and stop():
                return False

    def _arrived(self) -> list[_Asked | str | None]:
        """All that has come; waits a little where there is nothing else to do."""
        items: list[_Asked | str | None] = []
        try:
            if not self._in_flight:
                items.append(self._inbox.get(timeout=min(_LOOK_S, self._blocked_s)))
            while True:
                items.append(self._inbox.get_nowait())
        except queue.Empty:
            return items

    def _add(self, request: Request, engine: GenerationEngine) -> None:
        begun = self._begun.get(request.name)
        try:
            engine.add(request if begun is None else _rest(request, begun))
        except ValueError as error:
            self._loop.call_soon_threadsafe(self._refuse, request.name, error)
            return
        self._in_flight[request.name] = (request, engine)

    def _deliver(self, done: Sequence[tuple[str, Response]]) -> None:
        for name, response in done:
            future = self._futures.get(name)
            if future is not None and not future.done():
                future.set_result(response)

    def _refuse(self, name: str, error: ValueError) -> None:
        future = self._futures.get(name)
        if future is not None and not future.done():
            future.set_exception(error)

    def _check_answers(self, thread: threading.Thread) -> None:
        if not self._asked:
            self._asked, self._asked_s = True, time.monotonic()
            self._loop.call_soon_threadsafe(self._answer)
        elif time.monotonic() - self._asked_s > self._blocked_s:
            frame = sys._current_frames().get(thread.ident or 0)
            where = "".join(traceback.format_stack(frame)[-4:]) if frame is not None else "its thread has ended"
            raise EpisodesBlocked(
                f"an environment has blocked the thread of all episodes for {self._blocked_s:g} s; call what blocks "
                f"with `await chat.run(function, ...)`; it stands at\n{where}"
            )

    def _answer(self) -> None:
        self._asked = False

    def _close(self, thread: threading.Thread) -> None:
        if thread.is_alive():
            try:
                self._loop.call_soon_threadsafe(self._cancel_all)
            except RuntimeError:  # it has just ended
                pass
            thread.join(_LOOK_S)
        if not thread.is_alive():
            self._loop.close()

    def _cancel_all(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()


def _rest(request: Request, begun: Response) -> Request:
    """What is left to draw of a request that was interrupted."""
    drawn = len(begun.token_ids)
    return replace(
        request,
        token_ids=np.concatenate([request.token_ids, begun.token_ids]),
        sampling=replace(request.sampling, max_tokens=request.sampling.max_tokens - drawn),
        seed=resumed_seed(request.seed, drawn),
    )


async def _all(coroutines: Sequence[Callable[[], Awaitable[T]]], concurrent: int) -> list[T]:
    room = asyncio.Semaphore(concurrent)

    async def one(start: Callable[[], Awaitable[T]]) -> T:
        async with room:
            return await start()

    return list(await asyncio.gather(*(one(start) for start in coroutines)))
