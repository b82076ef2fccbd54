"""What a user writes for episodes of several turns: an `Environment`, and the `Chat` that it is given.

    class Calculator(Environment):
        async def episode(self, chat, row):
            while True:
                reply = await chat.generate(max_tokens=64)
                calls = JsonCalls().calls(reply.text)
                if not calls:
                    break
                for call in calls:
                    chat.say(await chat.run(evaluate, call.arguments["expression"]), role="tool")
            chat.reward(float(row.answer in reply.text))

    batch = actor.run_episodes(prompts, environment=Calculator(), n=8, limits=EpisodeLimits(turns=4))

The object travels to the workers by value and serves all their episodes at one time: what belongs to one episode is
kept in local variables of `episode`, never on `self`.

An episode may part into branches, each of which goes on from what was said and drawn so far, and is a row of its own:

    class Answers(Environment):
        leaves = 4                                            # rows that an episode may become

        async def episode(self, chat, row):
            await chat.generate(max_tokens=32)                # a beginning that all four share
            await chat.branch(self.answer, n=4)

        async def answer(self, branch):
            reply = await branch.generate(max_tokens=32)
            branch.reward(float(branch.row.answer in reply.text))
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from rlhf_dist.environments.outcomes import Outcome

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EpisodeLimits:
    """How far an episode may go. Tokens are limited by the role's `rollout.max_response_tokens`, for all turns
    together."""

    turns: int = 8
    """Generations of one episode; one more ends it as `turns`."""
    seconds: float = 120.0
    """Longest that an episode may take from its start; then it ends as `deadline`."""
    step_seconds: float | None = None
    """Longest that all episodes of a step may take in each process that generates; then those that are not over, or not
    begun, end as `step_deadline`. None: as long as the last of them takes."""
    tool_seconds: float = 20.0
    """Longest that a function called with `chat.run` may take, where the call does not say otherwise."""
    concurrent: int = 256
    """Episodes under way at one time, in each process that generates."""
    retries: int = 2
    """Times that an episode is started again after an infrastructure error; a branch by itself."""
    branches: int = 256
    """Branches that one episode may make in all, those that are no rows included."""
    message_characters: int = 20_000
    """Longest text that may be said at one time; a longer one is an environment error, never cut in silence."""

    def __post_init__(self) -> None:
        for name in ("turns", "seconds", "tool_seconds", "concurrent", "branches", "message_characters"):
            if not getattr(self, name) > 0:
                raise ValueError(f"EpisodeLimits.{name} must be > 0, got {getattr(self, name)}")
        if self.step_seconds is not None and not self.step_seconds > 0:
            raise ValueError(
                f"EpisodeLimits.step_seconds must be > 0, or None for no deadline, got {self.step_seconds}"
            )
        if self.retries < 0:
            raise ValueError(f"EpisodeLimits.retries must be >= 0 (0: never again), got {self.retries}")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model wrote in one turn."""

    text: str
    """Without special tokens."""
    raw: str
    """With them."""
    finished: bool
    """Ended itself; False when cut at max_tokens."""
    tokens: int


class Row:
    """The row of the batch that an episode is of: `row.prompt`, `row.answer`, `row.source`, `row.fields` (its other
    fields in the data file, a dict), and what the environment's `reads` name."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns = dict(columns)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle ask of every object
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __getitem__(self, name: str) -> Any:
        if name not in self._columns:
            has = ", ".join(self._columns)
            raise KeyError(f"the row has no {name!r}; it has {has}; name others in the environment's `reads`")
        value = self._columns[name]
        return json.loads(value) if name == "fields" else value


class Chat(Protocol):
    """One episode, as its environment sees it."""

    row: Row
    rng: np.random.Generator
    """Random numbers that depend on (run seed, step, node, row, copy, branch) only."""

    @property
    def limits(self) -> EpisodeLimits:
        """How far the episode may go."""
        ...

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """The conversation so far, as `{"role": ..., "content": ...}`; the first is the prompt."""
        ...

    def say(self, text: str, role: str = "user") -> None:
        """Put a message (user, tool, system) behind what is there; the model reads it at the next `generate`.

        What is said before the first generation is the prompt; where nothing is, the row's own prompt is. Raises
        TypeError for what is no text, ValueError for a text longer than `EpisodeLimits.message_characters`.
        """
        ...

    async def generate(self, *, max_tokens: int | None = None) -> Reply:
        """Let the model write a turn, of `max_tokens` at most. A turn that was cut goes on where nothing is said
        between.

        The episode ends here, as `length` or `turns`, where its tokens or turns are used up.
        """
        ...

    def reward(self, value: float) -> None:
        """Reward the last turn: the number is added to what its last token has. Raises ValueError before the first
        turn and for what is no finite number."""
        ...

    def speaker(self, name: str) -> Chat:
        """Another role that speaks in this episode, as its own side of it: with `say`, `generate` and `reward` of its
        own, and nothing said to it yet. Names are those of `run_episodes(..., speakers={name: role})`; raises
        ValueError for another."""
        ...

    async def run(self, function: Callable[..., T], *arguments: Any, seconds: float | None = None) -> T:
        """Call a function that blocks, in a thread of its own. Raises what it raises, ToolTimeout after `seconds`."""
        ...

    def end(self) -> None:
        """End the episode (a branch: itself alone) here, as `finished`."""
        ...

    async def branch(
        self, function: Callable[[Chat], Awaitable[T]], *, n: int = 2, seconds: float | None = None
    ) -> list[Branch[T]]:
        """Play `n` branches that go on from here, all at one time, and wait for them: `function` is given each one.

        A branch has all that was said, drawn and rewarded so far, turns and tokens used up included, random numbers of
        its own, and an outcome of its own: what ends it or goes wrong in it is no error here. It is a row of the batch,
        unless it is discarded, or branches further and draws nothing after that. This chat may go on, too, and is a row
        where it draws something. `seconds`: longest that a branch may take; it then ends as `deadline`.

        Raises ValueError where the environment's `leaves` or `EpisodeLimits.branches` forbid it, and on a branch that
        ended otherwise than `finished`.
        """
        ...

    def compact(self) -> None:
        """Close the context: what was said and drawn so far is a row, and the conversation goes on behind a new prompt,
        which is what is said next (the row's own where nothing is). Turns are counted on, tokens anew.

        All rows of an episode have its whole reward; see `docs/episodes.md`.
        """
        ...

    def discard(self) -> None:
        """Make no rows of this branch, nor of those that go on from it; counted. Not for the episode itself."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch(Generic[T]):
    """A branch that has been played."""

    chat: Chat
    """It takes rewards, may be discarded and (where it has finished) branched further until the episode is over."""
    outcome: Outcome
    detail: str
    """Why, one line; empty where it just finished."""
    returned: T | None
    """What the function returned; None where it did not."""


class Environment(ABC):
    """See the module's docstring."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Columns that `row` has besides prompt, answer, source and fields."""
    tools: Sequence[Mapping[str, Any]] = ()
    """JSON schemas that the chat template is given, where `episode` says the prompt itself."""
    template_args: Mapping[str, Any] = {}
    """Arguments of the chat template beside messages and tools, as `data.train.template_args` has."""
    leaves: int = 1
    """Most rows that an episode becomes, where it branches or compacts its context; the batch has the columns `tree`,
    `branch`, `leaf` and `segment` where that is more than 1."""
    rewards: ClassVar[bool] = True
    """Whether episodes give rewards: one that finishes without any is an environment error. False: a reward role
    does."""
    unfinished_reward: float = 0.0
    """Added where an episode ends as `length`, `turns` or `policy_error`; such rows are counted."""

    def prepare(self) -> None:
        """Called before episodes are played, in each process that plays them and at every step: where what they share
        is loaded, an index or a sandbox, once. It may take its time; what it raises ends the run."""
        return None

    @abstractmethod
    async def episode(self, chat: Chat, row: Row) -> None:
        """Play one episode. What it raises is classified in `outcomes.py`."""
