"""What a training engine is: one small contract in front of FSDP2 and DeepSpeed ZeRO.

Every method is collective over the engine's process group: all ranks call it, each with its own rows, and
a rank may have none. Several engines may live in one process (actor, critic and reference colocated).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlhf_dist.algorithms.contract import Loss
from rlhf_dist.algorithms.outputs import Output
from rlhf_dist.batch import Batch, Column
from rlhf_dist.failure import FailureKind
from rlhf_dist.metrics import Metrics
from rlhf_dist.reshard.layout import Layout
from rlhf_dist.reshard.shards import Shards
from workers.engines.added.lora import Adapter
from workers.engines.files.rank_state import RankState
from workers.engines.movable import Movable

Term = tuple[float, Loss, Batch]
"""One summand of a step: weight, loss, and the rows of this rank."""


WeightPart = Literal["merged", "base", "adapters", "heads"]
"""The model with its adapters added to what they change, without them, the adapters alone, or its own heads alone."""
DevicePart = Literal["parameters", "gradients", "buckets", "optimizer"]
"""What an engine holds on its device between steps: master and compute weights; what gradients are summed in, and go
through, where that stays; optimizer states."""
Use = Literal["forward", "update", "write"]
"""What is needed: parameters, everything, or what other weights are written to (parameters, and optimizer states)."""


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is NaN or infinite; raised on all ranks before any weight has changed."""

    failure_kind = FailureKind.NUMERICS

    def __init__(self, loss: str, step: int, groups: tuple[int, ...]) -> None:
        super().__init__(loss, step, groups)
        self.loss, self.step, self.groups = loss, step, groups
        self.rows_file = ""

    def __str__(self) -> str:
        where = f"in rows with group_id {list(self.groups)}" if self.groups else "in the gradient only"
        rows = f"the rows are in {self.rows_file}" if self.rows_file else "these rows"
        return (
            f"{self.loss} is not finite in optimizer step {self.step}, {where}; the weights are unchanged. "
            f"Look at their rewards, advantages and log-probs ({rows}), lower the learning rate, "
            "or set optimizer.nonfinite=skip to leave such steps out"
        )


class TrainingEngine(Protocol):
    """A sharded model with its optimizer."""

    version: int
    """Optimizer steps done."""
    teacher_folders: Mapping[str, str]
    """Frozen role -> its model's folder, for losses that compare this model with another one."""
    remarks: tuple[str, ...]
    """What a user should know about this model here, a sentence each."""
    before_use: Callable[[Use], None]
    """Called before anything is computed, saved or loaded: brings back what was moved off the device meanwhile."""

    @property
    def gradient_bytes(self) -> int:
        """What the gradients of a step take on the device until it is made, beside `device_parts`."""
        ...

    def forward(
        self, batch: Batch, outputs: Sequence[Output], temperature: float = 1.0, *, base: bool = False
    ) -> dict[str, Column]:
        """`outputs` without gradient, by `key_of`: ragged float32 columns aligned with response_ids, dense ones for
        `scores` [B] and heads at the last token. `top_k.32` gives top_ids (int32), top_log_probs and top_log_rest,
        `logits` logits and largest_logits.

        Reads prompt_ids (at least one token a row) and response_ids (may be empty). Entry j is read at the
        position before response token j: log_probs[j] and entropy[j] are those of token j, values[j] is the
        value of the state before it. `base`: of the model without its adapters.
        """
        ...

    def hidden_states(self, batch: Batch) -> list[npt.NDArray[np.float32]]:
        """[T, hidden] of each row: the last layer's states that its response tokens are predicted from."""
        ...

    def scores(self, batch: Batch) -> npt.NDArray[np.float32]:
        """[B] the value head at the last token of prompt and response: what a reward model says."""
        ...

    def step(self, batch: Batch, loss: Loss, temperature: float = 1.0) -> Metrics:
        """One optimizer step on the loss averaged over the rows of all ranks; the same metrics on every rank.

        A step over no rows at all does nothing. Raises NonFiniteLoss before the weights change.
        """
        ...

    def step_many(self, terms: Sequence[Term], temperature: float = 1.0) -> Metrics:
        """One optimizer step on a weighted sum of losses, each averaged over its own batch."""
        ...

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Weight, as it is called in the model's files, -> the parameters that change it.

        Empty for a model trained whole, and for one whose files cut what adapters change: it is synced merged.
        """
        ...

    def layout(self, part: WeightPart = "merged") -> Layout:
        """What each rank of the group holds of every tensor of the model's files, by name, tied ones once.

        The same on every rank, and the same after every step; ranks are those of the engine's group.
        """
        ...

    def local_shards(self, part: WeightPart = "merged") -> Shards:
        """This rank's boxes of `layout(part)`: views of the master weights where no adapter is added.

        Collective; current until the next step.
        """
        ...

    def full_weights(self, dtype: torch.dtype, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """All tensors of the model's files by name, whole, in buckets of at most `bucket_bytes` (or one parameter).

        Every rank must exhaust the iterator; tied parameters come once.
        """
        ...

    def checksums(self, dtype: torch.dtype) -> dict[str, int]:
        """`full_checksum` of each parameter as `full_weights(dtype, ...)` gives it, without gathering."""
        ...

    def weights_written(self) -> None:
        """Bring what is computed with in line with the master weights: something has written to `local_shards("base")`.

        Collective. Those are whole models' weights: with adapters, none may be written.
        """
        ...

    def save_weights(self, name: str, *, optimizer: bool) -> None:
        """Keep a copy of what is trained (of a frozen model: of its weights) in host memory, under `name`.

        optimizer: the moments and the version too. Checkpoints hold all that is kept.
        """
        ...

    def restore_weights(self, name: str) -> None:
        """The reverse, with all that was kept. Raises KeyError for a name that was never saved."""
        ...

    def copy_state(self) -> RankState:
        """A copy of what a checkpoint holds of this rank, in host memory."""
        ...

    def put_back(self, copy: RankState) -> None:
        """Go on from a copy of this rank, of as many. Raises BrokenCopy."""
        ...

    def device_parts(self) -> Mapping[DevicePart, Movable]:
        """What this rank holds on its device between steps. Optimizer states are made by the first call."""
        ...

    def save(self, folder: Path) -> Future[None]:
        """Copy model, optimizer and version, and write them in the background to a new or empty shared folder.

        The future ends when all ranks have written; the folder is complete only then.
        """
        ...

    def close(self) -> None:
        """Let go of what background saves hold; no rank saves any more."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, on any number of ranks. Raises BrokenCheckpoint."""
        ...

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder: weights (adapters merged), config, tokenizer."""
        ...
