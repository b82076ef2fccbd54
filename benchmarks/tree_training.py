"""Training on the leaves of branching episodes: what leaves share computed once, against flat rows.

    rows       every leaf with its whole path
    prompts    equal prompts once, as for any group
    tree       every stretch between two forks once

The same rows, log-probs and gradients (`tests/engines/test_prefixes.py`), a forward and backward pass of each, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rlhf_dist.batch import Batch
from rlhf_dist.config import EngineConfig, ModelConfig
from rlhf_dist.environments import Chat, Environment, Row
from workers.engines.files.load import fill_whole
from workers.engines.model import prefixes
from workers.engines.model.models import build_model
from workers.engines.model.packing import micro_batches, pack
from workers.engines.model.ways import Way

CPU = torch.device("cpu")
EXPAND, DEPTH = 3, 3


class Branching(Environment):
    """A tree of three branches at each of three forks."""

    leaves = EXPAND**DEPTH

    def __init__(self, turn_tokens: int) -> None:
        self.turn_tokens = turn_tokens

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        await chat.generate(max_tokens=self.turn_tokens)
        await self._grow(chat, DEPTH)

    async def _grow(self, chat: Chat, left: int) -> None:
        async def go_on(branch: Chat) -> None:
            await branch.generate(max_tokens=self.turn_tokens)
            if left > 1:
                await self._grow(branch, left - 1)
            else:
                branch.reward(1.0)

        await chat.branch(go_on, n=EXPAND)


def tree_training(model: Path, batch: Batch, budget: int, turns: int) -> dict[str, Any]:
    """Tokens and median seconds of a pass over `batch` in each way, micro-batches of `budget` tokens."""
    built = build_model(
        ModelConfig(path=str(model)), EngineConfig(dtype="float32"), head="policy", seed=0, trained=True
    )
    if built.weights is not None:
        fill_whole(built.hf, built.weights, CPU)
    parts = [batch.take(rows) for rows in micro_batches(batch, budget, whole_groups=False)]
    sides: dict[str, tuple[Way, int]] = {
        "rows": (Way(rows="packed", attention="packed"), prefixes.LEAST_SHARED),
        "prompts": (Way(rows="shared", attention="packed"), budget),
        "tree": (Way(rows="shared", attention="packed"), prefixes.LEAST_SHARED),
    }

    def once(way: Way, least: int) -> int:
        tokens, usual = 0, prefixes.LEAST_SHARED
        prefixes.LEAST_SHARED = least
        try:
            for part in parts:
                packed = pack(part, CPU, way=way)
                tokens += packed.input_ids.numel()
                built(packed, ("log_probs",), 1.0)["log_probs"].sum().backward()
        finally:
            prefixes.LEAST_SHARED = usual
        built.zero_grad()
        return tokens

    return _in_turn(
        {name: lambda way=way, least=least: once(way, least) for name, (way, least) in sides.items()}, turns
    )


def _in_turn(sides: dict[str, Callable[[], int]], turns: int) -> dict[str, Any]:
    """Each side's tokens and median seconds; in turn, so that a busy moment meets all; the first is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, int] = {}
    for _ in range(turns + 1):
        for name, side in sides.items():
            started = time.process_time()
            tokens[name] = side()
            seconds[name].append(time.process_time() - started)
    return {
        name: {"tokens": tokens[name], "cpu_seconds": round(median(times[1:]), 3)} for name, times in seconds.items()
    }
