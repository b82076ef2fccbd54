"""All episodes of one op on one rank: rows in, finished episodes out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from workers.episodes.leaves import Episode
from workers.episodes.loop import EpisodeLoop
from workers.episodes.play import play, play_branches


def run_episodes(
    engine: GenerationEngine,
    model: str,
    batch: Batch,
    call: Call,
    environment: Environment,
    limits: EpisodeLimits,
    sampling: Sampling,
    prompt_tokens: int,
) -> list[Episode]:
    """`sampling.n` episodes of each row, the copies of one adjacent, and each one's leaves, where it branched.

    model: the folder with the tokenizer. What is drawn depends on (run seed, step, node, row, copy, branch, turn) only.
    """
    tokenizer = TextTokenizer(model, environment.template_args)
    ends = frozenset(end_token_ids(model))
    loop = EpisodeLoop(engine)
    budget = Budget(
        limits=limits,
        sampling=replace(sampling, n=1),
        prompt_tokens=prompt_tokens,
        leaves=environment.leaves,
        environment=type(environment).__name__,
    )

    attempts = itertools.count()

    def new_chat(at: int, copy: int) -> LiveChat:
        seed = f"{call.seed}/{call.step}/{call.node}/{call.row_index[at]}/{copy}"
        return LiveChat(
            row=Row({name: column.row(at) for name, column in batch.items() if name != "prompt_ids"}),
            rng=np.random.default_rng(seed_of(seed, "environment")),
            conversation=Conversation(
                tokenizer,
                row_prompt=batch["prompt_ids"].row(at).tolist(),
                row_text=batch["prompt"].row(at),
                ends=ends,
                tools=environment.tools,
            ),
            budget=budget,
            seed=seed,
            name=f"{seed}/{next(attempts)}",
            generate_one=loop.generate,
            play_branches=play_branches,
        )

    starts: Sequence[Callable[[], Any]] = [
        partial(play, environment, partial(new_chat, at, copy), limits, at * sampling.n + copy)
        for at in range(batch.num_rows)
        for copy in range(sampling.n)
    ]
    played = loop.run(starts, limits.concurrent) if starts else []
    return [episode for leaves in played for episode in leaves]
