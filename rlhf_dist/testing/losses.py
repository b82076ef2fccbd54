"""`check_loss`: what the engine relies on in a loss, tried on made-up batches without a model.

invariant     sums and gradients of one pass over all rows = those of several passes, however cut
masked        a token that response_mask leaves out gets no gradient
finite        with an empty response, one row, all equal, all masked
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import cloudpickle
import torch
from torch import Tensor

from rlhf_dist.algorithms.contract import Loss, Rows, loss_name
from rlhf_dist.algorithms.outputs import OF_LANGUAGE_MODELS, OF_VALUE_MODELS, Head, described, known
from rlhf_dist.schema import Shape
from rlhf_dist.testing.failed import CheckFailed
from rlhf_dist.testing.made_up import LENGTHS, MadeUp, all_equal, all_masked, made_up

TOLERANCE = 1e-5
"""Of the largest entry: losses may compute in float32."""


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """What passes over a batch add up to."""

    value: Tensor
    metrics: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    """Of `value`, at every output of the model; zeros where it does not depend on one."""


def check_loss(
    loss: Loss, *, columns: Mapping[str, Shape] | None = None, heads: Sequence[Head] = (), seed: int = 0
) -> None:
    """Raises CheckFailed for a loss that depends on how a batch is cut, trains on masked tokens, or is not finite.

    columns: shape of each column that the loss reads and the vocabulary (`rlhf-dist columns`) does not know: "[B]" or
    "[B, T]", "[B, K]" or "[B, T, K]". heads: those that it asks for, as the role declares them. Takes milliseconds; the
    same batches for the same seed.
    """
    name, shapes = loss_name(loss), dict(columns or {})
    if not isinstance(loss, Loss):
        missing = [part for part in ("reads", "outputs", "average", "__call__") if not hasattr(loss, part)]
        raise CheckFailed(name, f"it is no loss: it has no {', '.join(missing)} (rlhf_dist.algorithms.contract.Loss)")
    for output in loss.outputs:
        if not known(output):
            there = described(dict.fromkeys((*OF_LANGUAGE_MODELS, *OF_VALUE_MODELS, "heads.NAME")), ())
            raise CheckFailed(name, f"it asks the model for {output!r}; there is {there}")
    try:
        cloudpickle.dumps(loss)
    except Exception as error:
        raise CheckFailed(name, f"it cannot travel to the workers: {error}; keep to numbers in its fields") from error
    usual = made_up(name, loss, shapes, seed, heads=heads)
    whole = _sums(name, loss, usual, [range(len(LENGTHS))], "a random batch")
    _check_teaches(name, whole)
    _check_masked(name, usual, whole)
    _check_cuts(name, loss, usual, whole)
    for edge, batch, passes in _edges(name, loss, shapes, seed, heads):
        _check_finite(name, edge, _sums(name, loss, batch, passes, edge))


def _edges(
    name: str, loss: Loss, shapes: Mapping[str, Shape], seed: int, heads: Sequence[Head]
) -> Iterator[tuple[str, MadeUp, list[Sequence[int]]]]:
    """What it is, the batch, and its passes."""
    pairs = "label" in loss.reads
    usual = made_up(name, loss, shapes, seed, heads=heads)
    some_empty = made_up(name, loss, shapes, seed, heads=heads, lengths=(0, *LENGTHS[1:]))
    yield "an empty response", some_empty, [range(len(LENGTHS))]
    yield "an empty response in a pass of its own", some_empty, _one_by_one(loss, some_empty)
    yield "empty responses alone", made_up(name, loss, shapes, seed, heads=heads, lengths=(0, 0, 0, 0)), [range(4)]
    one = made_up(name, loss, shapes, seed, heads=heads, lengths=LENGTHS[: 2 if pairs else 1])
    yield "one pair" if pairs else "one row", one, [range(len(one.lengths))]
    for value in (0.0, 1.0):
        yield f"all values equal to {value:g}", all_equal(usual, value), [range(len(LENGTHS))]
    yield "all tokens masked", all_masked(usual), [range(len(LENGTHS))]


# --- what is checked -----------------------------------------------------------------------------------------
def _check_teaches(name: str, whole: _Sums) -> None:
    _check_finite(name, "a random batch", whole)
    if not any(bool(gradient.any()) for gradient in whole.gradients.values()):
        asked = ", ".join(whole.gradients)
        raise CheckFailed(
            name, f"its gradient at {asked} is 0 on a random batch; it must not detach what it is a loss of"
        )


def _check_masked(name: str, batch: MadeUp, whole: _Sums) -> None:
    for output, gradient in whole.gradients.items():
        if output in batch.per_row:
            continue
        worst = float(gradient[batch.mask == 0].abs().max())
        if worst > 0:
            raise CheckFailed(
                name,
                f"a token that response_mask leaves out has a gradient of {worst:.3g} at {output}; sum over tokens "
                "with rows.sum_tokens or rows.mean_tokens",
            )


def _check_cuts(name: str, loss: Loss, batch: MadeUp, whole: _Sums) -> None:
    singles = _one_by_one(loss, batch)
    unit = "group" if loss.average == "groups" else "row"
    by_length = sorted(singles, key=lambda rows: -sum(batch.lengths[row] for row in rows))
    cuts = {
        f"passes of one {unit}": singles,
        "two passes": _in_two(singles, len(singles) // 2),
        "two uneven passes": _in_two(singles, 1),
        "two passes in order of length": _in_two(by_length, len(singles) // 2),
    }
    for cut, passes in cuts.items():
        sums = _sums(name, loss, batch, passes, cut)
        pairs = [
            *(("its value", sums.value, whole.value),),
            *((f"its gradient at {at}", sums.gradients[at], one) for at, one in whole.gradients.items()),
            *((f"metric {at!r}", sums.metrics.get(at, torch.tensor(0.0)), one) for at, one in whole.metrics.items()),
        ]
        for what, parts, one in pairs:
            apart, scale = float((parts - one).abs().max()), float(one.abs().max())
            if not apart <= TOLERANCE * max(scale, 1.0):
                raise CheckFailed(
                    name,
                    f"{what} depends on how a batch is cut into micro-batches: {cut} and one pass over all rows are "
                    f"{apart:.3g} apart (largest entry {scale:.3g}); return one number per "
                    f"{loss.average.split('_')[0].removesuffix('s')}, divided by nothing of the micro-batch: the "
                    "engine divides by the count over the whole batch",
                )


def _check_finite(name: str, edge: str, sums: _Sums) -> None:
    found = {"its value": sums.value}
    found |= {f"its gradient at {output}": gradient for output, gradient in sums.gradients.items()}
    found |= {f"metric {metric!r}": total for metric, total in sums.metrics.items()}
    for what, values in found.items():
        bad = values[~values.isfinite()]
        if len(bad):
            raise CheckFailed(name, f"with {edge}, {what} is {float(bad.flatten()[0])}; it must be finite")


# --- as an engine sums ---------------------------------------------------------------------------------------
def _one_by_one(loss: Loss, batch: MadeUp) -> list[Sequence[int]]:
    """Passes of one row; of one group where groups are kept whole."""
    rows = range(len(batch.lengths))
    if loss.average != "groups":
        return [[row] for row in rows]
    return [[row for row in rows if batch.groups[row] == group] for group in dict.fromkeys(batch.groups)]


def _in_two(singles: Sequence[Sequence[int]], first: int) -> list[Sequence[int]]:
    """Two passes; the first has the rows of `first` of these."""
    return [list(chain.from_iterable(singles[:first])), list(chain.from_iterable(singles[first:]))]


def _sums(name: str, loss: Loss, batch: MadeUp, passes: Sequence[Sequence[int]], case: str) -> _Sums:
    """Values, metrics and gradients added up over `passes`, each a micro-batch of these rows."""
    value, metrics = torch.zeros((), dtype=torch.float64), dict[str, Tensor]()
    for taken in passes:
        outputs, rows = batch.take(taken)
        try:
            values, said = loss(outputs, rows)
            value = value + _total(name, loss, "its value", values, rows)
            for metric, of_metric in said.items():
                total = _total(name, loss, f"metric {metric!r}", of_metric, rows).detach()
                metrics[metric] = metrics.get(metric, torch.zeros((), dtype=torch.float64)) + total
        except CheckFailed:
            raise
        except Exception as error:  # the user's own code
            raise CheckFailed(name, f"with {case}, {type(error).__name__}: {error}") from error
    leaves = list(batch.outputs.values())
    found = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
    gradients = {
        output: torch.zeros_like(leaf) if gradient is None else gradient
        for (output, leaf), gradient in zip(batch.outputs.items(), found, strict=True)
    }
    return _Sums(value=value.detach(), metrics=metrics, gradients=gradients)


def _total(name: str, loss: Loss, what: str, values: Tensor, rows: Rows) -> Tensor:
    """As the engine does: masked tokens add nothing, rows without a counted token neither where they do not count."""
    sizes = {"tokens": len(rows.mask), "groups": rows.num_groups}
    size = sizes.get(loss.average, rows.num_rows)
    if tuple(values.shape) != (size,):
        raise CheckFailed(
            name,
            f"it averages over {loss.average}, so {what} must have shape [{size}] for this micro-batch, got "
            f"{list(values.shape)}; return it unreduced",
        )
    if loss.average == "tokens":
        values = torch.where(rows.mask > 0, values, 0.0)
    empty = rows.sum_tokens(rows.mask) == 0
    if loss.average == "rows_with_tokens" and what == "its value" and bool(values[empty].any()):
        raise CheckFailed(
            name,
            f"a row without a counted token has loss {float(values[empty].abs().max().detach()):.3g}; it must be 0, as "
            "average='rows_with_tokens' leaves it out of the count",
        )
    return values.double().sum()
