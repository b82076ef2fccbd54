"""Workers of the executor's benchmark: real processes and real columns, with sleep or copying in place of a model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.wire import Call, OpResult, WorkerContext
from workers.process import WorkerProcess

NOTHING = Batch({}, 0)
PER_TOKEN = np.float32


class SleepingRole:
    """Any role of PPO: an op takes the seconds it is given and writes small columns of the right shape."""

    remarks: tuple[str, ...] = ()

    def __init__(self, context: WorkerContext, seconds: Mapping[str, float], rows: int) -> None:
        """rows: prompts of a step, for a source."""
        self._seconds, self._rows = seconds, rows

    def __getattr__(self, op: str) -> Any:
        if op.startswith("_") or op == "close":
            raise AttributeError(op)
        return lambda batch, call, **settings: self._run(op, batch, call)

    def _run(self, op: str, batch: Batch, call: Call) -> OpResult:
        time.sleep(self._seconds.get(op, 0.0))
        if op == "next_batch":
            return _prompts(call.step, self._rows)
        if op == "generate_sequences":
            return _responses(batch)
        written = {
            "compute_log_prob": ("log_probs", "entropy"),
            "compute_values": ("values",),
            "compute_ref_log_prob": ("ref_log_probs",),
        }.get(op, ())
        if op == "compute_reward":
            return OpResult(columns=Batch({"rewards": Column(np.ones(batch.num_rows, np.float32))}, batch.num_rows))
        if written:
            like = batch["response_ids"]
            zeros = Column(np.zeros(len(like.values), PER_TOKEN), like.offsets)
            return OpResult(columns=Batch(dict.fromkeys(written, zeros), batch.num_rows))
        return OpResult(columns=NOTHING)


def _prompts(step: int, rows: int) -> OpResult:
    text = Column.strings([""] * rows)
    groups = np.arange(rows, dtype=np.int64) + step * rows
    ids = Column(np.ones(4 * rows, np.int32), np.arange(rows + 1, dtype=np.int64) * 4)
    texts = dict.fromkeys(("prompt", "answer", "source", "fields"), text)
    columns = Batch({"group_id": Column(groups), "prompt_ids": ids, **texts}, rows)
    return OpResult(columns=columns, tokens=np.full(rows, 4), groups=groups)


def _responses(batch: Batch) -> OpResult:
    rows = batch.num_rows
    offsets = np.arange(rows + 1, dtype=np.int64) * 8
    columns = {
        "response_ids": Column(np.ones(8 * rows, np.int32), offsets),
        "response_mask": Column(np.ones(8 * rows, np.uint8), offsets),
        "rollout_log_probs": Column(np.zeros(8 * rows, PER_TOKEN), offsets),
        "response": Column.strings([""] * rows),
        "raw_response": Column.strings([""] * rows),
        "finished": Column(np.ones(rows, np.uint8)),
        "policy_version": Column(np.zeros(8 * rows, np.int32), offsets),
    }
    return OpResult(columns=Batch(columns, rows), parent=np.arange(rows), tokens=np.full(rows, 12))


class ChainRole:
    """A CPU worker of the data plane's chain: holds rollouts, copies and adds up what a model would read and write."""

    def __init__(self, context: WorkerContext, rows: int, prompt_tokens: int, lengths: np.ndarray[Any, Any]) -> None:
        """lengths: [B] response tokens of the whole batch, cut evenly over the ranks."""
        mine = np.array_split(lengths, context.world)[context.rank].astype(np.int64)
        prompts = np.arange(len(mine) + 1, dtype=np.int64) * prompt_tokens
        responses = np.concatenate([[0], np.cumsum(mine)]).astype(np.int64)
        total, rng = int(responses[-1]), np.random.default_rng(context.rank)
        self._groups = np.array_split(np.arange(rows, dtype=np.int64), context.world)[context.rank]
        self.rollouts = Batch(
            {
                "group_id": Column(self._groups),
                "prompt_ids": Column(rng.integers(0, 32000, prompts[-1], dtype=np.int32), prompts),
                "response_ids": Column(rng.integers(0, 32000, total, dtype=np.int32), responses),
                "response_mask": Column(np.ones(total, np.uint8), responses),
                "rollout_log_probs": Column(rng.standard_normal(total, dtype=np.float32), responses),
            },
            len(mine),
        )
        self._tokens = prompt_tokens + mine

    def next_batch(self, batch: Batch, call: Call, **settings: Any) -> OpResult:
        """The rollouts that generation left on this rank."""
        return OpResult(columns=self.rollouts, tokens=self._tokens, groups=self._groups)

    def compute_values(self, batch: Batch, call: Call) -> OpResult:
        """[B, T] from the tokens."""
        return OpResult(columns=Batch({"values": _per_token(batch["response_ids"])}, batch.num_rows))

    def compute_ref_log_prob(self, batch: Batch, call: Call) -> OpResult:
        """[B, T] from the tokens."""
        return OpResult(columns=Batch({"ref_log_probs": _per_token(batch["response_ids"])}, batch.num_rows))

    def compute_reward(self, batch: Batch, call: Call) -> OpResult:
        """[B] from the tokens."""
        sums = np.add.reduceat(batch["response_ids"].values, batch["response_ids"].offsets[:-1])
        return OpResult(columns=Batch({"rewards": Column(sums.astype(np.float32))}, batch.num_rows))

    def update_actor(self, batch: Batch, call: Call, **settings: Any) -> OpResult:
        """Reads every column once."""
        for _, column in batch.items():
            column.values.sum()
        return OpResult(columns=NOTHING)


def _per_token(tokens: Column) -> Column:
    return Column(tokens.values.astype(np.float32), tokens.offsets)


class ChainProcess(WorkerProcess):
    """The same process, which also takes and returns whole tensors: what the plain ways need."""

    def run_tensors(self, op: str, tensors: dict[str, Any] | None) -> dict[str, Any]:
        """One op on padded [B, T] or flat (all rows one after the other) torch tensors; returns what it writes."""
        import torch

        if op == "next_batch":
            rollouts: Batch = self._roles["rollouts"].rollouts
            return {name: torch.from_numpy(np.array(column.values)) for name, column in rollouts.items()} | {
                "prompt_lengths": torch.from_numpy(rollouts["prompt_ids"].lengths),
                "lengths": torch.from_numpy(rollouts["response_ids"].lengths),
            }
        assert tensors is not None, f"{op} needs tensors"
        if op == "update_actor":
            for tensor in tensors.values():
                tensor.sum()
            return {}
        if op == "compute_reward":
            responses = tensors["response_ids"]
            if responses.ndim == 2:
                return {"rewards": responses.sum(1, dtype=torch.int64).float()}
            rows = torch.repeat_interleave(torch.arange(len(tensors["lengths"])), tensors["lengths"])
            return {"rewards": torch.zeros(len(tensors["lengths"])).index_add(0, rows, responses.float())}
        name = {"compute_values": "values", "compute_ref_log_prob": "ref_log_probs"}[op]
        return {name: tensors["response_ids"].float()}

    def run_rows(self, op: str, rows: dict[str, list[Any]] | None) -> dict[str, list[Any]]:
        """The same on ragged columns as torch has them: one tensor per row."""
        import torch

        if op == "next_batch":
            rollouts: Batch = self._roles["rollouts"].rollouts
            return {
                name: [torch.from_numpy(np.array(row, ndmin=1)) for row in column.rows()]
                for name, column in rollouts.items()
            }
        assert rows is not None, f"{op} needs rows"
        if op == "update_actor":
            for column in rows.values():
                for row in column:
                    row.sum()
            return {}
        if op == "compute_reward":
            return {"rewards": [row.sum(dtype=torch.int64).float() for row in rows["response_ids"]]}
        name = {"compute_values": "values", "compute_ref_log_prob": "ref_log_probs"}[op]
        return {name: [row.float() for row in rows["response_ids"]]}

    def run_padded_source(self, prompt_tokens: int, response_tokens: int) -> dict[str, Any]:
        """The rollouts as padded tensors, [B, prompt_tokens] and [B, response_tokens]."""
        import torch

        rollouts: Batch = self._roles["rollouts"].rollouts
        padded: dict[str, Any] = {}
        for name, column in rollouts.items():
            flat = torch.from_numpy(np.array(column.values))
            if column.offsets is None:
                padded[name] = flat
                continue
            width = prompt_tokens if name == "prompt_ids" else response_tokens
            padded[name] = torch.zeros(rollouts.num_rows, width, dtype=flat.dtype)
            inside = torch.arange(width)[None] < torch.from_numpy(column.lengths)[:, None]
            padded[name][inside] = flat
        return padded
