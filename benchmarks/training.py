"""`make bench-training`: training tokens per second, packed and padded, on both engines; and against a plain loop.

Rows have lognormal lengths whose mean is a quarter of the maximum, on a random Llama of 16M parameters. Two ranks train
the same batch packed and padded, step by step in turn. One rank alternates between FSDP2 and a plain PyTorch loop over
the same packs. Medians; prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.algorithms.contract import Loss, ModelOutput
from rlhf_dist.batch import Batch
from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf_dist.wire import WorkerContext
from tests.engines import world as worlds
from tests.engines.world import World

MAX_TOKENS = 512
MEAN_TOKENS = MAX_TOKENS // 4
PROMPT_TOKENS = 16
ROWS = 32
BUDGET = 2048
OPTIMIZER = OptimizerConfig(lr=1e-5)
LOSS: Loss = ppo_clip()


def lognormal_lengths(rows: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[rows] tokens from 2 * PROMPT_TOKENS to MAX_TOKENS: one row has the maximum, the mean is a quarter of it."""
    draws = np.random.default_rng(seed).lognormal(0.0, 0.8, rows)
    low, high = 0.0, float(MAX_TOKENS)
    for _ in range(60):  # the scale whose clipped mean is the wanted one
        scale = (low + high) / 2
        lengths = np.clip(draws * scale, 2 * PROMPT_TOKENS, MAX_TOKENS)
        low, high = (scale, high) if lengths.mean() < MEAN_TOKENS else (low, scale)
    lengths[np.argmax(lengths)] = MAX_TOKENS
    return lengths.astype(np.int64)


def make_rows(vocabulary: int) -> Batch:
    """ROWS rows of random tokens with advantages."""
    rng = np.random.default_rng(1)
    responses = [int(n) - PROMPT_TOKENS for n in lognormal_lengths(ROWS)]
    return Batch.of(
        prompt_ids=[rng.integers(0, vocabulary, PROMPT_TOKENS).astype(np.int32) for _ in responses],
        response_ids=[rng.integers(0, vocabulary, n).astype(np.int32) for n in responses],
        advantages=[rng.standard_normal(n).astype(np.float32) for n in responses],
        response_mask=[np.ones(n, np.int8) for n in responses],
        group_id=np.arange(ROWS),
        old_log_probs=[np.full(n, -9.0, np.float32) for n in responses],
    )


def save_model(folder: Path) -> Path:
    """A random Llama of 16M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=MAX_TOKENS, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# --- on the ranks ----------------------------------------------------------------------------------
def new_engine(folder: Path, name: str, dtype: str, **settings: Any) -> Any:
    """An engine over the ranks of the world."""
    from workers.build_engines import new_training_engine

    context = WorkerContext(role="actor", rank=dist.get_rank(), world=dist.get_world_size(), device="cpu", seed=0)
    config = EngineConfig(name=name, dtype=dtype, micro_batch_tokens=BUDGET, **settings)
    return new_training_engine(ModelConfig(path=str(folder)), config, OPTIMIZER, "policy", context)


def timed_in_turn(sides: dict[str, Callable[[], object]], steps: int) -> dict[str, list[float]]:
    """Seconds of each side's steps, taken in turn so that a busy moment meets both; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(steps + 1):
        for name, side in sides.items():
            dist.barrier()
            started = time.perf_counter()
            side()
            dist.barrier()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def packed_and_padded(folder: Path, name: str, dtype: str, steps: int) -> dict[str, list[float]]:
    """Both ways of one engine, on this rank's half of the rows."""
    batch = make_rows(8192)
    mine = batch.take(np.arange(dist.get_rank(), batch.num_rows, dist.get_world_size()))
    engines = {way: new_engine(folder, name, dtype, packing=way == "packed") for way in ("packed", "padded")}
    return timed_in_turn({way: lambda e=engine: e.step(mine, LOSS) for way, engine in engines.items()}, steps)


def one_rank(folder: Path, dtype: str, steps: int) -> dict[str, list[float]]:
    """FSDP2 on one rank, and a plain loop over the same packs."""
    engine = new_engine(folder, "fsdp", dtype)
    batch = make_rows(8192)
    plain = PlainLoop(folder, dtype)
    return timed_in_turn({"fsdp": lambda: engine.step(batch, LOSS), "plain": lambda: plain.step(batch)}, steps)


class PlainLoop:
    """What one would write by hand: a module, micro-batches, autocast, AdamW."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from workers.engines.files.load import fill_whole
        from workers.engines.model.models import build_model

        settings = EngineConfig(dtype=dtype)
        self._model = build_model(ModelConfig(path=str(folder)), settings, head="policy", seed=0, trained=True)
        if self._model.weights is not None:
            fill_whole(self._model.hf, self._model.weights, torch.device("cpu"))
        self._dtype = getattr(torch, dtype)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=OPTIMIZER.lr)

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        from workers.engines.model.packing import micro_batches, pack, rows_of

        device = torch.device("cpu")
        tokens = int(batch["response_ids"].lengths.sum())
        for rows in micro_batches(batch, BUDGET, whole_groups=False):
            part = batch.take(rows)
            with torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
                outputs = self._model(pack(part, device), LOSS.outputs, 1.0)
            values, _ = LOSS(ModelOutput(**outputs), rows_of(part, LOSS.reads, device))
            (values.sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()


# --- the driver ------------------------------------------------------------------------------------
def in_world(size: int, function: Callable[..., dict[str, list[float]]], *args: Any) -> dict[str, float]:
    """Median tokens per second of each side, as rank 0 saw it, and the spread."""
    world = World(size)
    try:
        seconds = world.run(function, *args)[0]
    finally:
        world.close()
    tokens = int(lognormal_lengths(ROWS).sum())
    rates = {f"{side}_tok_s": round(tokens / median(times), 1) for side, times in seconds.items()}
    spread = {
        f"{side}_range": [round(tokens / max(times), 1), round(tokens / min(times), 1)]
        for side, times in seconds.items()
    }
    return rates | spread


def main() -> int:
    """Run it and print the result."""
    worlds.CALL_TIMEOUT_S = 600.0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    given = parser.parse_args()
    result: dict[str, Any] = {"dtype": given.dtype, "rows": ROWS, "tokens": int(lognormal_lengths(ROWS).sum())}
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_model(Path(scratch) / "model")
        for name in ("fsdp", "deepspeed"):
            result[name] = in_world(2, packed_and_padded, folder, name, given.dtype, given.steps)
            result[name]["packed_over_padded"] = round(result[name]["packed_tok_s"] / result[name]["padded_tok_s"], 2)
        alone = in_world(1, one_rank, folder, given.dtype, given.steps)
    result |= {"plain_tok_s": alone["plain_tok_s"], "fsdp_1rank_tok_s": alone["fsdp_tok_s"]}
    result |= {"plain_range": alone["plain_range"], "fsdp_1rank_range": alone["fsdp_range"]}
    result["fsdp_1rank_over_plain"] = round(alone["fsdp_tok_s"] / alone["plain_tok_s"], 3)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
