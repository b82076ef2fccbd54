"""All episodes of one op on one rank, and who speaks in them: rows in, finished episodes out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch
from rlhf_dist.data.conversation import Conversation
from rlhf_dist.data.ends import end_token_ids
from rlhf_dist.data.tokenizer import TextTokenizer
from rlhf_dist.environments import Environment, EpisodeLimits, Row
from rlhf_dist.sampling import Sampling, seed_of
from rlhf_dist.wire import Call
from workers.engines.generation.interface import GenerationEngine
from workers.episodes.chat import Budget, LiveChat
from workers.episodes.groups import First, FirstGroups
from workers.episodes.leaves import Episode
from workers.episodes.loop import EpisodeLoop
from workers.episodes.play import play, play_branches
from workers.gathered import Gathered

Hand = Callable[[int, Sequence[Episode]], None]
"""(piece, all that its episodes became, in the order of rows and copies)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Speaker:
    """A role that speaks in episodes."""

    name: str
    """As the environment calls it; empty for the role whose episodes they are."""
    engine: GenerationEngine
    model: str
    """The folder with its tokenizer."""
    sampling: Sampling
    prompt_tokens: int
    """Most tokens of its prompt."""
    learns: bool
    """Whether its side of an episode is a row."""


class _Voice:
    """What all conversations of a speaker share."""

    def __init__(self, of: Speaker, environment: Environment, limits: EpisodeLimits) -> None:
        self.of, self._tools = of, environment.tools if not of.name else ()
        self._tokenizer = TextTokenizer(of.model, environment.template_args)
        self._ends = frozenset(end_token_ids(of.model))
        self.budget = Budget(
            limits=limits,
            sampling=replace(of.sampling, n=1),
            prompt_tokens=of.prompt_tokens,
            leaves=1 if of.name else environment.leaves,
            environment=type(environment).__name__,
        )

    def conversation(self, text: str, ids: list[int]) -> Conversation:
        """A new one, about a row's prompt: as its source has rendered it, or another's as that one's template does."""
        if self.of.name:
            chat = self._tokenizer.has_chat_template
            rendered = self._tokenizer.render([{"role": "user", "content": text}]) if chat else text
            ids = self._tokenizer.encode([rendered], special_tokens=not chat)[0]
        return Conversation(self._tokenizer, row_prompt=ids, row_text=text, ends=self._ends, tools=self._tools)


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodesUnderWay:
    """Episodes of one op on one rank, which new weights may interrupt."""

    loop: EpisodeLoop
    groups: FirstGroups
    behind: dict[int, int] = field(default_factory=dict)
    """Version of the weights that drew -> updates that it was behind."""

    def go_on(self, stop: Callable[[], bool] | None = None) -> list[Episode] | None:
        """See `begin_episodes`; None once `stop`, asked after every token, is true: nothing is in flight then, and the
        next call goes on. What tools do meanwhile, and how long, counts for the episodes' deadlines."""
        played = self.loop.go_on(stop)
        return None if played is None else self.groups.chosen([episode for leaves in played for episode in leaves])


def run_episodes(*given: Any, **more: Any) -> list[Episode]:
    """What `begin_episodes` begins, played to its end."""
    episodes = begin_episodes(*given, **more).go_on()
    assert episodes is not None, "nobody interrupts it"
    return episodes


def begin_episodes(
    engine: GenerationEngine,
    model: str,
    batch: Batch,
    call: Call,
    environment: Environment,
    limits: EpisodeLimits,
    sampling: Sampling,
    prompt_tokens: int,
    speakers: Sequence[Speaker] = (),
    *,
    wanted: int | None = None,
    first: First = "turns",
    hand: Hand | None = None,
) -> EpisodesUnderWay:
    """`sampling.n` episodes of each row, the copies of one adjacent, and each one's leaves, where it branched; behind
    them the sides of those `speakers` that learn from it.

    model: the folder with the tokenizer. wanted: rows whose episodes are kept, the others are surplus; None: all. hand:
    gets the episodes of each of `call.pieces` once they are over; None: nobody does. What is drawn depends on (run
    seed, step, node, row, copy, branch, turn) only.
    """
    environment.prepare()
    loop = EpisodeLoop(engine)
    own = Speaker(name="", engine=engine, model=model, sampling=sampling, prompt_tokens=prompt_tokens, learns=True)
    voices = {one.name: _Voice(one, environment, limits) for one in (own, *speakers)}
    attempts = itertools.count()
    groups = FirstGroups(batch.num_rows, sampling.n, wanted=wanted, first=first, step_seconds=limits.step_seconds)
    gathered: Gathered[Sequence[Episode]] | None = None
    if hand is not None and call.pieces is not None:
        gathered = Gathered(
            call.pieces.of_row, sampling.n, lambda piece, made: hand(piece, [leaf for _, some in made for leaf in some])
        )

    def side(voice: _Voice, at: int, seed: str, attempt: int, **more: Any) -> LiveChat:
        return LiveChat(
            row=Row({name: column.row(at) for name, column in batch.items() if name != "prompt_ids"}),
            rng=np.random.default_rng(seed_of(seed, "environment")),
            conversation=voice.conversation(batch["prompt"].row(at), batch["prompt_ids"].row(at).tolist()),
            budget=voice.budget,
            seed=seed,
            name=f"{seed}/{attempt}",
            generate_one=partial(loop.generate, engine=voice.of.engine),
            play_branches=play_branches,
            learns=voice.of.learns,
            **more,
        )

    def new_chat(at: int, copy: int) -> LiveChat:
        seed, attempt = f"{call.seed}/{call.step}/{call.node}/{call.row_index[at]}/{copy}", next(attempts)
        whole = side(voices[""], at, seed, attempt, begins=partial(groups.begins, at * sampling.n + copy))
        whole.speakers = {
            one.name: side(voices[one.name], at, f"{seed}/{one.name}", attempt, whole=whole) for one in speakers
        }
        return whole

    async def one(at: int, copy: int) -> list[Episode]:
        number = at * sampling.n + copy
        leaves = await play(environment, partial(new_chat, at, copy), limits, number, groups.stop_of(number))
        groups.over(number, leaves)
        if gathered is not None:
            gathered.over(number, leaves)
        return leaves

    starts: Sequence[Callable[[], Any]] = [
        partial(one, at, copy) for at in range(batch.num_rows) for copy in range(sampling.n)
    ]
    loop.begin(starts, limits.concurrent)
    return EpisodesUnderWay(loop=loop, groups=groups)
