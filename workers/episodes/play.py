"""One episode from its start to its outcome, infrastructure errors retried.

    attempt ──> returned ─────────────────────────────> finished (once it has drawn something, and rewarded it)
       ^    ├─> ended by the chat ────────────────────> length, turns, finished
       │    ├─> PolicyError ──────────────────────────> policy_error
       │    ├─> out of seconds ───────────────────────> deadline
       │    ├─> InfrastructureError, ConnectionError ──> infrastructure_error, after the last attempt
       └────┘
            └─> anything else ────────────────────────> environment_error, with its traceback

Whatever the environment's code makes of an end that the chat has said, that end stands.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

from rlhf_dist.environments import Environment, EpisodeLimits, InfrastructureError, PolicyError
from rlhf_dist.environments.outcomes import OF_POLICY, Outcome
from workers.episodes.chat import EpisodeEnded, LiveChat

GRACE_S = 1.0
"""What an episode has to end once it is cancelled; it is left behind then."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """How one ended."""

    outcome: Outcome
    detail: str
    """Why, one line; empty where it just finished."""
    traceback: str
    """Of an environment or infrastructure error."""
    chat: LiveChat
    """Of the last attempt."""
    unrewarded: bool
    """Ended otherwise than finished, without a reward."""
    attempts: int
    seconds: float

    @property
    def trains(self) -> bool:
        """Whether it is a row of the batch."""
        return self.outcome in OF_POLICY and self.chat.conversation.turns > 0

    @property
    def sides(self) -> list[tuple[str | None, Episode]]:
        """The episode as each that learns from it saw it: by the name of the speaker, None for the role itself.
        Who has not drawn anything has no side."""
        others = [(name, chat) for name, chat in self.chat.speakers.items() if chat.learns and chat.conversation.turns]
        return [(None, self), *((name, replace(self, chat=chat)) for name, chat in others)]


async def play(environment: Environment, new_chat: Callable[[], LiveChat], limits: EpisodeLimits) -> Episode:
    """Play one episode; `new_chat` begins an attempt. Raises nothing of the environment's."""
    started = time.monotonic()
    attempts = 0
    while True:
        chat, attempts = new_chat(), attempts + 1
        outcome, detail, trace = await _attempt(environment, chat, limits.seconds)
        of = chat.ended.of if chat.ended is not None else None
        chat.ended = EpisodeEnded(outcome, detail, of)
        if outcome != "infrastructure_error" or attempts > limits.retries:
            break
    unrewarded = environment.rewards and outcome in OF_POLICY and not chat.rewards
    stopped = of or chat  # whose limit it was; what the policy wrote is the role's own
    if outcome in OF_POLICY and outcome != "finished" and environment.unfinished_reward and stopped.conversation.turns:
        turn = stopped.conversation.turns - 1
        stopped.rewards[turn] = stopped.rewards.get(turn, 0.0) + environment.unfinished_reward
    return Episode(
        outcome=outcome,
        detail=detail,
        traceback=trace,
        chat=chat,
        unrewarded=unrewarded,
        attempts=attempts,
        seconds=time.monotonic() - started,
    )


async def _attempt(environment: Environment, chat: LiveChat, seconds: float) -> tuple[Outcome, str, str]:
    """Outcome, detail and traceback of one attempt."""
    task = asyncio.ensure_future(_guarded(environment, chat))
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        late = f"not over within {seconds:g} s (EpisodeLimits.seconds)"
        chat.ended = EpisodeEnded("deadline", late)
        task.cancel()
        await asyncio.wait({task}, timeout=GRACE_S)
        if task.done() and not task.cancelled():
            task.exception()  # it is looked at, so that asyncio does not complain that nobody did
        return "deadline", late, ""
    if task.cancelled():
        return "environment_error", "the environment cancelled itself", ""
    return _classified(environment, chat, task.exception())


async def _guarded(environment: Environment, chat: LiveChat) -> None:
    try:
        await environment.episode(chat, chat.row)
    except (SystemExit, KeyboardInterrupt) as error:  # would end the loop that all episodes share
        raise RuntimeError(f"the environment raised {error!r}") from error


def _classified(environment: Environment, chat: LiveChat, error: BaseException | None) -> tuple[Outcome, str, str]:
    if chat.ended is not None:
        outcome, detail = chat.ended.outcome, chat.ended.detail
    elif isinstance(error, PolicyError):
        outcome, detail = "policy_error", str(error)
    elif isinstance(error, InfrastructureError | ConnectionError):
        return "infrastructure_error", _line(error), _trace(error)
    elif error is not None:
        return "environment_error", _line(error), _trace(error)
    else:
        outcome, detail = "finished", ""
    if not chat.conversation.turns:
        return "environment_error", "the episode ended before chat.generate() had drawn anything", ""
    sides = [chat, *(one for one in chat.speakers.values() if one.learns and one.conversation.turns)]
    if outcome == "finished" and environment.rewards and not all(one.rewards for one in sides):
        who = "" if not chat.rewards else " of another speaker, whose rows are kept"
        detail = f"the episode finished without chat.reward(){who}; set `rewards = False` where a reward role scores it"
        return "environment_error", detail, ""
    return outcome, detail, ""


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-8000:]
