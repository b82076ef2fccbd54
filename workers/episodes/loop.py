"""Episodes and the engine, each in a thread of its own, so that neither holds up the other.

    the op's thread: engine                          a thread of their own: episodes (asyncio)
      requests from the inbox -> engine.add            at most `concurrent` under way, the next as one ends
      engine.step()                                    await chat.generate():  request -> inbox, wait for its future
      responses -> futures, in one call                await chat.run(tool):   a thread for the tool, wait for it
      nothing in flight: wait for the inbox

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
from typing import TypeAlias, TypeVar

from workers.engines.generation.interface import GenerationEngine, Request, Response

T = TypeVar("T")
_Asked: TypeAlias = tuple[Request, GenerationEngine]
BLOCKED_S = 60.0
"""Longest that the episodes' thread may not answer."""
_LOOK_S = 1.0


class EpisodesBlocked(RuntimeError):
    """An environment's code blocks the thread that all episodes share."""


class EpisodeLoop:
    """Runs coroutines that may ask the engine for responses, its own or others. One at a time an engine."""

    def __init__(self, engine: GenerationEngine, blocked_s: float = BLOCKED_S) -> None:
        self._engine, self._blocked_s = engine, blocked_s
        self._inbox: queue.SimpleQueue[_Asked | str | None] = queue.SimpleQueue()
        self._futures: dict[str, asyncio.Future[Response]] = {}
        self._loop = asyncio.new_event_loop()
        self._in_flight: dict[str, GenerationEngine] = {}
        self._asked, self._asked_s = False, 0.0

    def run(self, coroutines: Sequence[Callable[[], Awaitable[T]]], concurrent: int) -> list[T]:
        """Results of all, in their order. Raises what the engine raised, or a coroutine, and EpisodesBlocked."""
        results: list[T] = []
        failure: list[BaseException] = []

        def episodes() -> None:
            asyncio.set_event_loop(self._loop)
            try:
                results.extend(self._loop.run_until_complete(_all(coroutines, concurrent)))
            except BaseException as error:  # noqa: BLE001 - raised in the op's thread
                failure.append(error)
            self._inbox.put(None)

        thread = threading.Thread(target=episodes, daemon=True, name="episodes")
        thread.start()
        try:
            self._serve(thread)
        finally:
            for name, engine in self._in_flight.items():  # engines are left as they were found
                engine.abort(name)
            self._close(thread)
        if failure:
            raise failure[0]
        return results

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

    def _serve(self, thread: threading.Thread) -> None:
        while True:
            for item in self._arrived():
                if item is None:
                    return
                if isinstance(item, tuple):
                    self._add(*item)
                elif item in self._in_flight:
                    self._in_flight.pop(item).abort(item)
            self._check_answers(thread)
            for engine in {id(one): one for one in self._in_flight.values()}.values():
                done = engine.step()
                if done:
                    for name, _ in done:
                        del self._in_flight[name]
                    self._loop.call_soon_threadsafe(self._deliver, done)

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
        try:
            engine.add(request)
        except ValueError as error:
            self._loop.call_soon_threadsafe(self._refuse, request.name, error)
            return
        self._in_flight[request.name] = engine

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


async def _all(coroutines: Sequence[Callable[[], Awaitable[T]]], concurrent: int) -> list[T]:
    room = asyncio.Semaphore(concurrent)

    async def one(start: Callable[[], Awaitable[T]]) -> T:
        async with room:
            return await start()

    return list(await asyncio.gather(*(one(start) for start in coroutines)))
