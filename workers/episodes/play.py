"""One episode from its start to its outcome, infrastructure errors retried; and branches of it, each in the same way.

    attempt ──> returned ─────────────────────────────> finished (once it has drawn something, and rewarded it)
       ^    ├─> ended by the chat ────────────────────> length, turns, finished
       │    ├─> PolicyError ──────────────────────────> policy_error
       │    ├─> out of seconds ───────────────────────> deadline
       │    ├─> stopped from outside ─────────────────> surplus, step_deadline (`groups.py`)
       │    ├─> InfrastructureError, ConnectionError ──> infrastructure_error, after the last attempt
       └────┘
            └─> anything else ────────────────────────> environment_error, with its traceback

Whatever the environment's code makes of an end that the chat has said, that end stands. An episode's rows are made once
it is over (`leaves.py`): a branch may be rewarded until then.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from rlhf_dist.environments import Branch, Chat, Environment, EpisodeLimits, InfrastructureError, PolicyError
from rlhf_dist.environments.outcomes import Outcome
from workers.episodes.chat import EpisodeEnded, LiveChat
from workers.episodes.leaves import Episode, episodes_of

T = TypeVar("T")
GRACE_S = 1.0
"""What an episode has to end once it is cancelled; it is left behind then."""


async def play(
    environment: Environment,
    new_chat: Callable[[], LiveChat],
    limits: EpisodeLimits,
    number: int = 0,
    stop: asyncio.Future[EpisodeEnded] | None = None,
) -> list[Episode]:
    """Play one episode and return what it became: itself, or the leaves of its tree; `new_chat` begins an attempt.

    number: of the episode, among those that are played. stop: once it has a result, the episode ends as that says.
    Raises nothing of the environment's.
    """
    started = time.monotonic()
    attempts = 0
    while True:
        chat, attempts = new_chat(), attempts + 1
        await _attempt(lambda chat: environment.episode(chat, chat.row), chat, limits.seconds, stop)
        chat.tree.over = True
        for task in chat.tree.tasks:
            task.cancel()
        if _outcome(chat) != "infrastructure_error" or attempts > limits.retries:
            break
    return episodes_of(environment, chat, number=number, attempts=attempts, seconds=time.monotonic() - started)


async def play_branches(
    chat: LiveChat, function: Callable[[Chat], Awaitable[T]], n: int, seconds: float | None
) -> list[Branch[T]]:
    """See Chat.branch."""
    first, origin = len(chat.children), chat.snapshot()
    chat.children += [origin.fork(first + k) for k in range(n)]
    chat.begin_segment()
    return list(await asyncio.gather(*(_play_branch(chat, origin, first + k, function, seconds) for k in range(n))))


async def _play_branch(
    parent: LiveChat, origin: LiveChat, number: int, function: Callable[[Chat], Awaitable[T]], seconds: float | None
) -> Branch[T]:
    """Child `number` of the parent, begun (each time) at `origin`, the parent as it was when it branched."""
    attempts = 0
    while True:
        branch, attempts = parent.children[number], attempts + 1
        returned = await _attempt(function, branch, seconds)
        if _outcome(branch) != "infrastructure_error" or attempts > parent.budget.limits.retries:
            break
        parent.children[number] = origin.fork(number)
    assert branch.ended is not None, "an attempt ends in an outcome"
    return Branch(chat=branch, outcome=branch.ended.outcome, detail=branch.ended.detail, returned=returned)


def _outcome(chat: LiveChat) -> Outcome | None:
    return None if chat.ended is None else chat.ended.outcome


async def _attempt(
    function: Callable[[LiveChat], Awaitable[T]],
    chat: LiveChat,
    seconds: float | None,
    stop: asyncio.Future[EpisodeEnded] | None = None,
) -> T | None:
    """Have the environment's code play the chat, which then has ended; returns what that code returned."""
    if stop is not None and stop.done():
        chat.ended = stop.result()
        return None
    task = asyncio.ensure_future(_guarded(function, chat))
    chat.tree.tasks.append(task)
    try:
        ends: set[asyncio.Future[Any]] = {task} if stop is None else {task, stop}
        await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:  # of a branch whose episode is over, or did not wait for it
        chat.ended = chat.ended or EpisodeEnded("environment_error", "what it branched from did not wait for it")
        task.cancel()
        raise
    if not task.done():
        limit = "EpisodeLimits.seconds" if not chat.path else "seconds of chat.branch()"
        late = EpisodeEnded("deadline", f"not over within {seconds:g} s ({limit})")
        chat.ended = stop.result() if stop is not None and stop.done() else late
        task.cancel()
        await asyncio.wait({task}, timeout=GRACE_S)
        if task.done() and not task.cancelled():
            task.exception()  # it is looked at, so that asyncio does not complain that nobody did
        return None
    if task.cancelled():
        chat.ended = EpisodeEnded("environment_error", "the environment cancelled itself")
        return None
    error = task.exception()
    if chat.ended is None:
        chat.ended, chat.traceback = _classified(error)
    return task.result() if error is None else None


async def _guarded(function: Callable[[LiveChat], Awaitable[T]], chat: LiveChat) -> T:
    try:
        return await function(chat)
    except (SystemExit, KeyboardInterrupt) as error:  # would end the loop that all episodes share
        raise RuntimeError(f"the environment raised {error!r}") from error


def _classified(error: BaseException | None) -> tuple[EpisodeEnded, str]:
    """How the environment's code ended, where the chat had not said so before; and the traceback of an error."""
    if error is None:
        return EpisodeEnded("finished", ""), ""
    if isinstance(error, PolicyError):
        return EpisodeEnded("policy_error", str(error)), ""
    kind: Outcome = "environment_error"
    if isinstance(error, InfrastructureError | ConnectionError):
        kind = "infrastructure_error"
    return EpisodeEnded(kind, _line(error)), _trace(error)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-8000:]
