"""One attempt at an episode: what the environment says and asks, within the limits, and what is recorded of it."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np

from rlhf_dist.data.conversation import Conversation
from rlhf_dist.data.messages import Messages
from rlhf_dist.environments import Branch, Chat, EpisodeLimits, Reply, Row, ToolTimeout
from rlhf_dist.environments.outcomes import Outcome
from rlhf_dist.sampling import Sampling, seed_of
from workers.engines.generation.interface import Request, Response

T = TypeVar("T")
Generate = Callable[[Request], Awaitable[Response]]
"""Has the engine draw a response; a cancelled wait lets go of it."""


class EpisodeEnded(BaseException):
    """The episode is over; no `Exception`, so that code which catches those does not go on."""

    of: LiveChat | None = None
    """Whose limit it was."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(outcome, detail)
        self.outcome, self.detail = outcome, detail


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an episode may use, and how its tokens are drawn."""

    limits: EpisodeLimits
    sampling: Sampling
    """n is 1, max_tokens those of the whole row's response."""
    prompt_tokens: int
    """Most tokens of the prompt."""
    leaves: int = 1
    """Most rows of an episode; 1: it neither branches nor compacts its context."""
    environment: str = "the environment"
    """What its class is called, for errors."""


Segment = tuple[tuple[int, ...], int]
"""A stretch between two forks: the branch it is of, and which of the branch's."""


@dataclass(eq=False)
class Tree:
    """What all branches of one attempt at an episode share."""

    branches: int = 0
    """Made so far."""
    over: bool = False
    """No branch takes anything more."""
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    """Those of branches."""
    names: Iterator[int] = field(default_factory=itertools.count)


@dataclass(frozen=True, eq=False)
class Context:
    """A conversation that was closed by `compact`."""

    conversation: Conversation
    number: int
    """Which of the contexts on its path."""
    first_turn: int
    segments: tuple[tuple[int, Segment], ...]


class BranchPlayer(Protocol):
    """Plays branches of a chat to their ends."""

    async def __call__(
        self, chat: LiveChat, function: Callable[[Chat], Awaitable[T]], n: int, seconds: float | None
    ) -> list[Branch[T]]:
        """See Chat.branch."""
        ...


@dataclass(eq=False)
class LiveChat:
    """See `rlhf_dist.environments.Chat`."""

    row: Row
    rng: np.random.Generator
    conversation: Conversation
    budget: Budget
    seed: str
    """What every seed of the episode (of this branch of it) begins with."""
    name: str
    """Unique among all attempts at episodes and branches: what its requests are called."""
    generate_one: Generate
    play_branches: BranchPlayer
    begins: Callable[[int], None] = lambda turns: None
    """Told of each turn before it is drawn: how many there are with it."""
    tree: Tree = field(default_factory=Tree)
    path: tuple[int, ...] = ()
    """Which branch of which branch it is, from the episode itself."""
    rewards: dict[int, float] = field(default_factory=dict)
    """Turn -> its reward; those of closed contexts, too."""
    ended: EpisodeEnded | None = None
    """How it ended; it takes nothing more then, but for rewards while the tree goes on."""
    traceback: str = ""
    """Of the error that it ended with."""
    first_turn: int = 0
    """Turns before this context."""
    forked_at: int = 0
    """Turns that it began with."""
    segments: tuple[tuple[int, Segment], ...] = ((0, ((), 0)),)
    """(piece of the conversation from which on, segment), the last of one piece counts."""
    contexts: int = 0
    """Closed on its path before this one."""
    closed: list[Context] = field(default_factory=list)
    """Those of them that were closed in this branch."""
    children: list[LiveChat] = field(default_factory=list)
    discarded: bool = False
    drew: bool = False
    """Has drawn something since it began, or last branched: it is a row of its own."""
    speakers: Mapping[str, LiveChat] = field(default_factory=dict)
    """Name -> the side of another role that speaks in the same episode."""
    learns: bool = True
    """Whether the conversation is a row of the batch: its limits are ends of the episode."""
    whole: LiveChat | None = None
    """Of another's side: the episode's own chat, which ends for all."""
    _generating: bool = False

    def speaker(self, name: str) -> LiveChat:
        """See Chat."""
        if name not in self.speakers:
            has = ", ".join(self.speakers) or "none"
            raise ValueError(
                f"no {name!r} speaks in this episode, there are: {has}; write run_episodes(..., speakers={{{name!r}: "
                "ROLE})"
            )
        return self.speakers[name]

    @property
    def limits(self) -> EpisodeLimits:
        """See Chat."""
        return self.budget.limits

    @property
    def messages(self) -> Messages:
        """See Chat."""
        return self.conversation.messages or [{"role": "user", "content": self.conversation.row_text}]

    @property
    def turns(self) -> int:
        """Turns from the start of the episode."""
        return self.first_turn + self.conversation.turns

    def say(self, text: str, role: str = "user") -> None:
        """See Chat."""
        self._open()
        most = self.budget.limits.message_characters
        if not isinstance(text, str):
            raise TypeError(f"chat.say() takes text, got {type(text).__name__}; write str(...) where that is meant")
        if len(text) > most:
            raise ValueError(
                f"chat.say() takes at most {most} characters (EpisodeLimits.message_characters), got {len(text)}; cut "
                "it where that is meant"
            )
        self.conversation.say(role, text)

    async def generate(self, *, max_tokens: int | None = None) -> Reply:
        """See Chat."""
        self._open()
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
            raise ValueError(f"max_tokens must be a number >= 1, got {max_tokens!r}")
        if self._generating:
            raise RuntimeError("chat.generate() may be awaited once at a time: the next turn is behind this one")
        talk, turn = self.conversation, self.turns
        if self.learns and turn >= self.budget.limits.turns:
            self._end("turns", f"{turn} turns (EpisodeLimits.turns)")
        tokens = talk.context()
        if len(talk.prompt) > self.budget.prompt_tokens:
            raise ValueError(
                f"the prompt must have at most {self.budget.prompt_tokens} tokens (rollout.max_prompt_tokens), got "
                f"{len(talk.prompt)}; say less before the first generation"
            )
        left = self.budget.sampling.max_tokens - talk.response_tokens
        if left < 1:
            self._out_of_tokens()
        most = left if max_tokens is None else min(left, max_tokens)
        self.begins(turn + 1)
        request = Request(
            name=f"{self.name}/{turn}",
            token_ids=tokens,
            sampling=replace(self.budget.sampling, max_tokens=most),
            seed=seed_of(self.seed, turn),
        )
        self._generating = True
        try:
            response = await self.generate_one(request)
        finally:
            self._generating = False
        text, raw = talk.drew(response.token_ids, response.log_probs, response.versions)
        self.drew = True
        if self.learns and not response.finished and len(response.token_ids) == left:
            self._out_of_tokens()
        return Reply(text=text, raw=raw, finished=response.finished, tokens=len(response.token_ids))

    def reward(self, value: float) -> None:
        """See Chat."""
        if self.tree.over or not self.path:
            self._open()
        if isinstance(value, str) or not math.isfinite(float(value)):
            raise ValueError(f"a reward must be a finite number, got {value!r}")
        if not self.turns:
            raise ValueError(
                "chat.reward() is for a turn of the model, and it has had none; call chat.generate() first"
            )
        if not self.drew and any(not child.discarded for child in self.children):
            raise ValueError(
                f"chat.reward() is for a row, and a chat that has branched and drawn nothing since is none, got "
                f"{float(value):g}, which would be lost; reward before chat.branch(), or reward the branches"
            )
        turn = self.turns - 1
        self.rewards[turn] = self.rewards.get(turn, 0.0) + float(value)

    async def run(self, function: Callable[..., T], *arguments: Any, seconds: float | None = None) -> T:
        """See Chat."""
        self._open()
        return await in_thread(function, arguments, self.budget.limits.tool_seconds if seconds is None else seconds)

    def end(self) -> None:
        """See Chat."""
        self._open()
        self._end("finished", "")

    async def branch(
        self, function: Callable[[Chat], Awaitable[T]], *, n: int = 2, seconds: float | None = None
    ) -> list[Branch[T]]:
        """See Chat."""
        if self.tree.over or (not self.path and self.ended is not None):
            self._open()
        self._check_leaves("branch")
        if self._generating:
            raise RuntimeError("chat.branch() goes on behind a turn that is drawn; await chat.generate() first")
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"chat.branch() makes n >= 1 branches, got n={n!r}")
        if self.ended is not None and self.ended.outcome != "finished":
            raise ValueError(
                f"a branch that has finished may be branched further, this one ended as {self.ended.outcome} "
                f"({self.ended.detail}); look at Branch.outcome first"
            )
        most = self.budget.limits.branches
        if self.tree.branches + n > most:
            raise ValueError(
                f"an episode may make at most {most} branches (EpisodeLimits.branches), this would be "
                f"{self.tree.branches + n}"
            )
        self.tree.branches += n
        return await self.play_branches(self, function, n, seconds)

    def fork(self, number: int) -> LiveChat:
        """Branch `number` of this chat, which goes on from here; it is not yet among `children`."""
        path, seed = (*self.path, number), f"{self.seed}/b{number}"
        pieces = len(self.conversation.pieces)
        made = replace(
            self,
            rng=np.random.default_rng(seed_of(seed, "environment")),
            conversation=self.conversation.copy(),
            seed=seed,
            name=f"{self.name}/b{number}.{next(self.tree.names)}",
            path=path,
            rewards=dict(self.rewards),
            ended=None,
            traceback="",
            forked_at=self.turns,
            segments=(*self.segments, (pieces, (path, 0))),
            closed=[],
            children=[],
            discarded=False,
            drew=False,
            _generating=False,
        )
        made.speakers = {name: replace(one.fork(number), whole=made) for name, one in self.speakers.items()}
        return made

    def snapshot(self) -> LiveChat:
        """The chat as it is now, to fork from later."""
        speakers = {name: one.snapshot() for name, one in self.speakers.items()}
        return replace(self, conversation=self.conversation.copy(), rewards=dict(self.rewards), speakers=speakers)

    def begin_segment(self) -> None:
        """What is said and drawn from here on is shared with none of the branches made so far."""
        self.drew = False
        self.segments = (*self.segments, (len(self.conversation.pieces), self._next_segment()))

    def compact(self) -> None:
        """See Chat."""
        self._open()
        self._check_leaves("compact")
        if not self.conversation.turns or self._generating:
            raise ValueError("chat.compact() closes a context in which the model has had a turn; generate first")
        self.closed.append(Context(self.conversation, self.contexts, self.first_turn, self.segments))
        self.first_turn, self.drew = self.turns, False
        self.contexts += 1
        self.conversation = self.conversation.anew()
        self.segments = ((0, self._next_segment()),)

    def discard(self) -> None:
        """See Chat."""
        if not self.path:
            raise ValueError("chat.discard() is for branches; an episode that is not wanted raises PolicyError or ends")
        self.discarded = True

    def _next_segment(self) -> Segment:
        return self.path, 1 + max((number for _, (path, number) in self.segments if path == self.path), default=0)

    def _check_leaves(self, what: str) -> None:
        if self.budget.leaves < 2:
            raise ValueError(
                f"chat.{what}() makes several rows of an episode; set {self.budget.environment}.leaves to the most "
                "there may be"
            )

    def _open(self) -> None:
        ended = (self.whole or self).ended
        if ended is not None:
            raise ended

    def _out_of_tokens(self) -> NoReturn:
        used = f"{self.conversation.response_tokens} tokens behind the prompt"
        if not self.learns:  # no doing of the policy's
            raise RuntimeError(f"another speaker has used up its {used} (its own rollout.max_response_tokens)")
        self._end("length", f"{used} (rollout.max_response_tokens)")

    def _end(self, outcome: Outcome, detail: str) -> NoReturn:
        ended = EpisodeEnded(outcome, detail)
        ended.of = self
        (self.whole or self).ended = ended
        raise ended


async def in_thread(function: Callable[..., T], arguments: tuple[Any, ...], seconds: float) -> T:
    """Call a function that blocks; raises what it raises, ToolTimeout after `seconds`.

    The thread is its own and ends with the process: one that hangs is left behind, and holds nobody up.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def deliver(set_it: Callable[[Any], None], value: Any) -> None:
        if not answer.done():
            set_it(value)

    def call() -> None:
        try:
            result, setter = function(*arguments), answer.set_result
        except BaseException as error:  # noqa: BLE001 - whatever a tool raises is raised where it was called
            kept = error if isinstance(error, Exception) else RuntimeError(f"the function raised {error!r}")
            setter_of_errors = answer.set_exception
            _tell(loop, deliver, setter_of_errors, kept)
            return
        _tell(loop, deliver, setter, result)

    threading.Thread(target=call, daemon=True, name=f"tool-{getattr(function, '__name__', 'call')}").start()
    try:
        return await asyncio.wait_for(answer, seconds)
    except TimeoutError as error:
        if answer.done() and not answer.cancelled():  # the function's own
            raise
        name = getattr(function, "__name__", repr(function))
        raise ToolTimeout(f"{name} did not return within {seconds:g} s") from error


def _tell(loop: asyncio.AbstractEventLoop, deliver: Callable[..., None], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(deliver, *arguments)
    except RuntimeError:  # the loop is closed: the episode is long over
        pass
