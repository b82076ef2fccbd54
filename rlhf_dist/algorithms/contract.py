"""What a loss is: a small picklable object that travels to the workers and sees one micro-batch.

    engine                                   loss (this file's protocol)
    ------                                   ---------------------------
    packs rows, runs the model        ->     ModelOutput: log_probs [T], values [T], ... (outputs.py has them all)
    turns columns into tensors        ->     Rows: rows["advantages"] [T], rows["label"] [B], ...
    sums what comes back, divides by  <-     one number per token [T], row [B] or group [G], unreduced
    the count over the *whole* batch

A loss never averages over tokens, rows or groups itself: it says over what it is to be averaged
(`average`), and the engine divides the sum by the count over all micro-batches of all ranks. That is
what makes the gradient of a batch the same however it is cut.

T: response tokens of the micro-batch, all rows one after the other. B: rows. G: groups (rows of one
group are always in one micro-batch when `average == "groups"`).

torch is imported only for type checkers: recipes name losses, and a recipe can be traced, checked and
drawn on a machine that has no torch. Losses use tensor methods, or import torch where they need more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from rlhf_dist.algorithms.outputs import Output, argument_of, columns_for, kind_of

if TYPE_CHECKING:
    from torch import Tensor

Average = Literal["tokens", "rows", "rows_with_tokens", "groups"]
"""Counted tokens, all rows, rows with a counted token, or groups."""


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What the model said, differentiable. Only what the loss asked for is set; see `outputs.py`."""

    log_probs: Tensor | None = None
    """[T] log pi(y_t | ...), nats."""
    entropy: Tensor | None = None
    """[T] entropy of pi(. | ...), nats."""
    values: Tensor | None = None
    """[T] V(s_t), reward units; [T, K] of a model with K labels."""
    scores: Tensor | None = None
    """[B] the value head at the last token of each row: what a reward model says; [B, K] of one with K labels."""
    hidden: Tensor | None = None
    """[T, H] the last states, float32, that each response token is predicted from."""
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    """Head -> what it says: [T] or [B], with K > 1 outputs [T, K] or [B, K]."""
    log_probs_at: Mapping[str, Tensor] = field(default_factory=dict)
    """Column of token ids [T, k] -> [T, k] log pi of each of them, nats."""
    log_rest: Mapping[str, Tensor] = field(default_factory=dict)
    """The same column -> [T] log of the probability of all other tokens."""
    over_vocabulary: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of an `OverVocabulary` -> [T] (or [T, K]), what its function gave."""

    @staticmethod
    def of(found: Mapping[str, Tensor]) -> ModelOutput:
        """From outputs by `key_of`; `log_probs_at.COLUMN` is [T, k + 1], the others' log-prob last."""
        plain: dict[str, Any] = {}
        nested: dict[str, Any] = {"heads": {}, "log_probs_at": {}, "log_rest": {}, "over_vocabulary": {}}
        for key, value in found.items():
            kind, argument = kind_of(key), argument_of(key)
            if kind == "log_probs_at":
                nested[kind][argument], nested["log_rest"][argument] = value[..., :-1], value[..., -1]
            elif kind in nested:
                nested[kind][argument] = value
            else:
                plain[key] = value
        return ModelOutput(**plain, **nested)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One micro-batch of rows as tensors."""

    columns: Mapping[str, Tensor]
    """Per-token columns [T] or [T, K], per-row columns [B] or [B, K]."""
    mask: Tensor
    """[T] float; 1 where the token counts (response_mask)."""
    row_of_token: Tensor
    """[T] int64; which row a token belongs to."""
    group_of_row: Tensor
    """[B] int64 in 0..G-1; which group a row belongs to."""
    num_groups: int

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    @property
    def num_rows(self) -> int:
        return len(self.group_of_row)

    def sum_tokens(self, per_token: Tensor) -> Tensor:
        """[T] -> [B]: sum over the counted tokens of each row."""
        # Tokens that do not count may hold anything, and NaN times 0 is NaN.
        counted = per_token.where(self.mask > 0, 0.0) * self.mask
        return counted.new_zeros(self.num_rows).index_add(0, self.row_of_token, counted)

    def mean_tokens(self, per_token: Tensor) -> Tensor:
        """[T] -> [B]: mean over the counted tokens of each row; 0 for a row without any."""
        return self.sum_tokens(per_token) / self.sum_tokens(self.mask).clamp(min=1)

    def sum_groups(self, per_row: Tensor) -> Tensor:
        """[B] -> [G]: sum over the rows of each group."""
        return per_row.new_zeros(self.num_groups).index_add(0, self.group_of_row, per_row)


@runtime_checkable
class Loss(Protocol):
    """A loss over one micro-batch: made of a function under `@loss` (loss.py), or any object of this form."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns it needs besides the sequence, the mask and the group id."""
        ...

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What it needs of the model."""
        ...

    @property
    def average(self) -> Average:
        """What its value is averaged over: counted tokens, rows (all, or those with a counted token), or groups."""
        ...

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """The unreduced loss ([T], [B] or [G] as `average` says) and metrics of that same shape.

        The engine masks token losses with `rows.mask` before it sums; metrics are averaged the same way. A row
        without a counted token must have loss 0 where it is not counted (`rows_with_tokens`).
        """
        ...


def columns_read(loss: Loss) -> tuple[str, ...]:
    """What it reads, and what the model reads to give what it asks for."""
    return tuple(dict.fromkeys((*loss.reads, *columns_for(loss.outputs))))


def is_given(model: ModelOutput, output: Output) -> bool:
    """Whether the model's answer to `output` is set."""
    found = getattr(model, kind_of(output), None)
    return argument_of(output) in found if isinstance(found, Mapping) else found is not None


def loss_name(loss: Loss) -> str:
    """What errors and metrics call a loss: its function's name, or its class's."""
    return str(getattr(loss, "name", type(loss).__name__))
