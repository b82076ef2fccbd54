"""Made-up micro-batches for a loss: random columns and model outputs, and the same ones at their edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.algorithms.contract import Loss, ModelOutput, Rows
from rlhf_dist.algorithms.outputs import Head, Output, argument_of, key_of, kind_of
from rlhf_dist.schema import COLUMNS, Shape
from rlhf_dist.testing.failed import CheckFailed

LENGTHS = (3, 5, 1, 4, 6, 2, 4, 3)
"""Response tokens of the rows of the usual batch, two rows a group."""
WIDTH = 4
"""K of columns and outputs with several numbers an entry, where nothing says how many."""
Draw = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class MadeUp:
    """A batch of B rows with T response tokens, and what a model says about it. Floats are float64."""

    lengths: tuple[int, ...]
    groups: tuple[int, ...]
    """[B]; rows of one group are neighbours."""
    mask: Tensor
    """[T]; 1 where the token counts."""
    columns: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    """What the loss asked for, as leaves that take a gradient."""
    per_row: frozenset[str]
    """Columns and outputs that are [B] or [B, K]; the others are [T] or [T, K]."""

    def take(self, rows: Sequence[int]) -> tuple[ModelOutput, Rows]:
        """These rows as a micro-batch; gradients arrive at the leaves of the whole."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        tokens = torch.from_numpy(
            np.concatenate([np.empty(0, np.int64), *(np.arange(starts[row], starts[row + 1]) for row in rows)])
        )
        at, lengths = torch.tensor(rows), torch.tensor([self.lengths[row] for row in rows])

        def cut(name: str, values: Tensor) -> Tensor:
            return values[at if name in self.per_row else tokens]

        _, groups = torch.unique(torch.tensor([self.groups[row] for row in rows]), return_inverse=True)
        outputs = {name: cut(name, values) for name, values in self.outputs.items()}
        return ModelOutput.of(outputs), Rows(
            columns={name: cut(name, values) for name, values in self.columns.items()},
            mask=self.mask[tokens],
            row_of_token=torch.repeat_interleave(torch.arange(len(rows)), lengths),
            group_of_row=groups,
            num_groups=len(set(groups.tolist())),
        )


def made_up(
    name: str,
    loss: Loss,
    shapes: Mapping[str, Shape],
    seed: int,
    lengths: Sequence[int] = LENGTHS,
    in_group: int = 2,
    heads: Sequence[Head] = (),
) -> MadeUp:
    """A random batch with what `loss` reads and asks for; one token in four does not count, nor does all of row 2.

    shapes: of columns that the vocabulary does not know; heads: that it asks for. Raises CheckFailed, naming the loss
    `name`, for a column of no known shape, text, or a head that is not among these.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, rows = sum(lengths), len(lengths)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def count(*size: int) -> Tensor:
        return torch.randint(0, 2, size, generator=generator)

    columns: dict[str, Tensor] = {}
    per_row = {"scores"}
    for column in loss.reads:
        shape, dtype = _kind(name, column, shapes)
        per_row |= {column} if shape in ("[B]", "[B, K]") else set()
        make: Draw = draw if dtype.startswith("float") else count
        columns[column] = make(rows if column in per_row else tokens, *((WIDTH,) if "K" in shape else ()))
    if "label" in columns:
        columns["label"] = torch.tensor([1, -1] * rows)[:rows]
    row_of_token = torch.repeat_interleave(torch.arange(rows), torch.tensor(lengths))
    mask = ((torch.rand(tokens, generator=generator) < 0.75) & (row_of_token != 2)).double()
    outputs: dict[str, Tensor] = {}
    for output in loss.outputs:
        key, (is_row, width) = key_of(output), _shape_of(name, output, {head.name: head for head in heads})
        per_row |= {key} if is_row else set()
        said = draw(rows if is_row else tokens, *((width,) if width else ()))
        outputs[key] = (said.log_softmax(-1) if kind_of(output) == "log_probs_at" else said).requires_grad_()
    groups = tuple(row // in_group for row in range(rows))
    return MadeUp(
        lengths=tuple(lengths),
        groups=groups,
        mask=mask,
        columns=columns,
        outputs=outputs,
        per_row=frozenset(per_row),
    )


def all_masked(batch: MadeUp) -> MadeUp:
    """The batch without a token that counts."""
    return replace(batch, mask=torch.zeros_like(batch.mask))


def all_equal(batch: MadeUp, value: float) -> MadeUp:
    """The batch with one value in every column of floats and in what the model says: no advantage, ratios of 1."""
    columns = {
        name: torch.full_like(values, value) if values.is_floating_point() else values
        for name, values in batch.columns.items()
    }
    outputs = {name: torch.full_like(values, value).requires_grad_() for name, values in batch.outputs.items()}
    return replace(batch, columns=columns, outputs=outputs)


def _shape_of(name: str, output: Output, heads: Mapping[str, Head]) -> tuple[bool, int]:
    """Whether it has an entry a row, and how many numbers each entry has; 0 for one that is a number."""
    kind, argument = kind_of(output), argument_of(output)
    if kind == "heads":
        if argument not in heads:
            raise CheckFailed(
                name,
                f"it asks for heads.{argument}; say what that is: check_loss(..., heads=(Head(name={argument!r}),))",
            )
        head = heads[argument]
        return head.at == "last_token", head.outputs if head.outputs > 1 else 0
    widths = {"hidden": WIDTH, "log_probs_at": WIDTH + 1}
    return kind == "scores", widths.get(kind, 0)


def _kind(name: str, column: str, shapes: Mapping[str, Shape]) -> tuple[Shape, str]:
    if column in shapes:
        return shapes[column], "float32"
    if column not in COLUMNS:
        raise CheckFailed(
            name,
            f"it reads {column!r}, a column of your own; say its shape: check_loss(..., columns="
            f"{{{column!r}: '[B, T]'}}) for one number a response token, '[B]' for one a row",
        )
    spec = COLUMNS[column]
    if spec.dtype == "text" or spec.shape == "[B, P]":
        raise CheckFailed(
            name,
            f"it reads {column!r} ({spec.shape} {spec.dtype}); a loss gets numbers, one a row or one a response token; "
            "make one of it in a host op",
        )
    return spec.shape, spec.dtype
