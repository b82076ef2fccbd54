"""Episodes in lock-step: all turns of a round are drawn, then the slowest of the round's tools is waited for.

What `benchmarks/episodes.py` compares with: the same rows, the same tools, and the same tokens.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.data.conversation import Conversation
from rlhf_dist.data.ends import end_token_ids
from rlhf_dist.data.tokenizer import TextTokenizer
from rlhf_dist.sampling import Sampling, seed_of
from rlhf_dist.testing.tiny_model import VOCABULARY
from rlhf_dist.wire import Call
from workers.engines.generation.interface import GenerationEngine

TURNS, SIGMA, MEAN_S = 6, 1.0, 0.5
SAID = "\nok:"


def latencies_of(rng: np.random.Generator) -> list[float]:
    """Seconds that each tool of an episode takes: one less than it has turns."""
    turns = int(rng.integers(1, TURNS + 1))
    return [float(value) for value in rng.lognormal(math.log(MEAN_S) - SIGMA**2 / 2, SIGMA, turns - 1)]


def rows_of(count: int) -> tuple[Batch, Call]:
    """A sum each, and the call that they are of."""
    texts = [f"{row}+1=" for row in range(count)]
    ids = [[1, *(VOCABULARY[character] for character in text)] for text in texts]
    columns = {"prompt_ids": Column.ragged(ids, np.int32), "prompt": Column.strings(texts)}
    return Batch(columns), Call(num_rows=count, row_index=np.arange(count), step=0, node="bench", line="", seed=0)


def play_waves(
    engine: GenerationEngine, model: Path, count: int, concurrent: int | None, turn_tokens: int
) -> list[Conversation]:
    """The episodes of `count` rows, a wave of `concurrent` of them (None: all) after the other."""
    batch, call = rows_of(count)
    tokenizer, ends = TextTokenizer(model), end_token_ids(model)
    prompts, texts = batch["prompt_ids"].rows(), batch["prompt"].rows()
    talks = [Conversation(tokenizer, ids.tolist(), text, ends) for ids, text in zip(prompts, texts, strict=True)]
    for wave in _waves(count, concurrent):
        seeds, tools = [_seed(call, row) for row in wave], [_tools(call, row) for row in wave]
        _play_wave(engine, [talks[row] for row in wave], seeds, tools, turn_tokens)
    return talks


def tool_seconds(count: int, concurrent: int | None) -> dict[str, float]:
    """What no engine can save: the tools of the longest episode, and the slowest tools of all rounds of waves."""
    waves = [[_tools(rows_of(1)[1], row) for row in wave] for wave in _waves(count, concurrent)]
    rounds = [_slowest(tools, turn) for tools in waves for turn in range(TURNS)]
    longest = max(sum(latencies) for tools in waves for latencies in tools)
    return {"longest_episode": round(longest, 2), "waves": round(sum(rounds), 2)}


def _play_wave(
    engine: GenerationEngine, talks: list[Conversation], seeds: list[str], tools: list[list[float]], turn_tokens: int
) -> None:
    """Round by round: one blocking call of the engine for all that go on, then all their tools at one time."""
    for turn in range(TURNS):
        left = [at for at, latencies in enumerate(tools) if len(latencies) >= turn]
        if not left:
            break
        contexts = [talks[at].context() for at in left]
        drawn = engine.generate(contexts, Sampling(max_tokens=turn_tokens), [seed_of(seeds[at], turn) for at in left])
        for at, response in zip(left, drawn, strict=True):
            talks[at].drew(response.token_ids, response.log_probs, response.versions)
        time.sleep(_slowest(tools, turn))
        for at in left:
            if len(tools[at]) > turn:
                talks[at].say("user", SAID)


def _waves(count: int, concurrent: int | None) -> list[range]:
    size = concurrent or count
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _seed(call: Call, row: int) -> str:
    """What all seeds of a row's only episode begin with (`workers/episodes/run.py`)."""
    return f"{call.seed}/{call.step}/{call.node}/{row}/0"


def _tools(call: Call, row: int) -> list[float]:
    return latencies_of(np.random.default_rng(seed_of(_seed(call, row), "environment")))


def _slowest(tools: list[list[float]], turn: int) -> float:
    return max((latencies[turn] for latencies in tools if len(latencies) > turn), default=0.0)
