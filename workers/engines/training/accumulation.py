"""One optimizer step as a sum over micro-batches and ranks, exact however the batch is cut.

counts   tokens, rows or groups of each term, over all ranks   (before the first backward pass)
passes   rank 0  [ a a a a ] [ b b ]                           the same number on every rank:
         rank 1  [ c c ]     [ filler ]                        a filler adds exact zeros
loss     sum over passes of  weight * sum(values) / count      so gradients are summed, never averaged
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_dist.algorithms.contract import Loss, ModelOutput, Rows, columns_read, loss_name
from rlhf_dist.algorithms.ragged import last_counted
from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.schema import TRAINABLE
from workers.engines.model.packing import longest_row, micro_batches, rows_of
from workers.engines.training.interface import NonFiniteLoss, Term

_NAMED_GROUPS = 16
"""Most group ids an error names."""


def even_passes(
    batch: Batch, budget_tokens: int, whole_groups: bool, pad_to: int, group: dist.ProcessGroup, device: torch.device
) -> list[IntArray]:
    """`micro_batches` of this rank's rows, as many on every rank (empty ones where nothing is left). Collective."""
    cut = micro_batches(batch, budget_tokens, whole_groups=whole_groups, pad_to=pad_to) if batch.num_rows else []
    most = torch.tensor(len(cut), dtype=torch.int64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    passes = int(most)
    if cut and passes > len(cut):
        cut = micro_batches(batch, budget_tokens, whole_groups=whole_groups, pad_to=pad_to, passes=passes)
    return cut + [np.empty(0, np.int64)] * (passes - len(cut))


class Accumulation:
    """The passes of one step on this rank, and what has been summed over them so far."""

    def __init__(
        self,
        terms: Sequence[Term],
        *,
        budget_tokens: int,
        padded: bool,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """Counts over all ranks and cuts this rank's rows. `group`: ranks with different rows. Collective."""
        self.terms = terms
        self._group, self._device = group, device
        self.pad_to = max((longest_row(batch) for _, _, batch in terms), default=0) if padded else 0
        local = [_count(loss, batch) for _, loss, batch in terms] + [_tokens(batch) for _, _, batch in terms]
        local += [sum(batch.num_rows for _, _, batch in terms)]
        counts = torch.tensor(local, dtype=torch.int64, device=device)
        dist.all_reduce(counts, group=group)
        *totals, self.num_rows = counts.tolist()
        self.counts, self.tokens = totals[: len(terms)], sum(totals[len(terms) :])
        self._passes: list[tuple[int, IntArray] | None] = []
        for k, (_, loss, batch) in enumerate(terms):
            whole_groups = loss.average == "groups"
            cut = even_passes(batch, budget_tokens, whole_groups, self.pad_to, group, device)
            self._passes += [(k, rows) if len(rows) else None for rows in cut]
        self._notes: dict[str, npt.NDArray[np.float64]] = {}
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._bad: list[tuple[int, Tensor, IntArray]] = []

    def __len__(self) -> int:
        return len(self._passes)

    def __iter__(self) -> Iterator[tuple[int, Batch] | None]:
        """(term, rows) of each pass, or None where the rank has to pass a filler through the model."""
        for one in self._passes:
            if one is None:
                yield None
                continue
            k, rows = one
            _, loss, batch = self.terms[k]
            yield k, batch.select(*dict.fromkeys((*TRAINABLE, *columns_read(loss)))).take(rows)

    def note(self, name: str, total: float, count: float) -> None:
        """Add to a metric that is `total` / `count` over all passes and ranks."""
        self._notes[name] = self._notes.get(name, np.zeros(2)) + (total, count)

    def add(self, term: int, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        """What one pass adds to the step's loss (a scalar to call backward on); keeps its metrics.

        Raises ValueError if the loss returns another shape than it averages over.
        """
        weight, loss, _ = self.terms[term]
        rows = rows_of(batch, loss.reads, self._device)
        values, metrics = loss(ModelOutput.of(outputs), rows)
        total = _total(loss, "its value", values, rows)
        self._keep(term, "loss", total)
        for name, metric in metrics.items():
            self._keep(term, name, _total(loss, f"metric {name!r}", metric, rows))
        self._bad.append((term, _bad_rows(loss, values.detach(), rows), batch["group_id"].values))
        scaled: Tensor = total * (weight / max(self.counts[term], 1))
        return scaled

    def metrics(self, step: int) -> Metrics:
        """Metrics over all ranks, the same on each; raises NonFiniteLoss on all if any rank saw one. Collective.

        With several terms a loss's metrics are called `LossName/metric` (`LossName#2/metric` for the second of a name),
        and `loss` is the weighted sum.
        """
        bad = [(k, int(g)) for k, mask, groups in self._bad for g in np.unique(groups[mask.cpu().numpy()])]
        values = {key: float(value) for key, value in self._sums.items()}
        mine = (values, bad[:_NAMED_GROUPS], self._notes)
        gathered: list[
            tuple[dict[tuple[int, str], float], list[tuple[int, int]], dict[str, npt.NDArray[np.float64]]] | None
        ]
        gathered = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(gathered, mine, group=self._group)
        sums: dict[str, Mean] = {}
        names = [""] if len(self.terms) == 1 else [f"{name}/" for name in _told_apart(self.terms)]
        bad = []
        notes: dict[str, npt.NDArray[np.float64]] = {}
        for part in gathered:
            assert part is not None, "all_gather_object fills every rank's place"
            for name, numbers in part[2].items():
                notes[name] = notes.get(name, np.zeros(2)) + numbers
            for (k, name), total in part[0].items():
                old = sums.get(names[k] + name, Mean(0.0, self.counts[k]))
                sums[names[k] + name] = Mean(old.total + total, old.count)
            bad += part[1]
        if bad:
            groups = tuple(sorted({g for k, g in bad if k == bad[0][0]})[:_NAMED_GROUPS])
            raise NonFiniteLoss(loss_name(self.terms[bad[0][0]][1]), step, groups)
        if len(self.terms) > 1:
            parts = [(weight, sums.get(f"{name}loss")) for (weight, _, _), name in zip(self.terms, names, strict=True)]
            sums["loss"] = Mean(sum(weight * part.value for weight, part in parts if part), 1.0)
        return {**sums, **{name: Mean(float(total), float(count)) for name, (total, count) in notes.items()}}

    def _keep(self, term: int, name: str, total: Tensor) -> None:
        total = total.detach().double()
        key = (term, name)
        self._sums[key] = self._sums[key] + total if key in self._sums else total


def _told_apart(terms: Sequence[Term]) -> list[str]:
    names = [loss_name(loss) for _, loss, _ in terms]
    earlier = [names[:k].count(name) for k, name in enumerate(names)]
    return [f"{name}#{count + 1}" if count else name for name, count in zip(names, earlier, strict=True)]


def _count(loss: Loss, batch: Batch) -> int:
    if loss.average == "tokens":
        return _tokens(batch)
    if loss.average == "groups":
        return len(np.unique(batch["group_id"].values)) if batch.num_rows else 0
    if loss.average == "rows_with_tokens":
        mask = batch["response_mask"]
        return int((last_counted(_offsets(mask), mask.values) >= 0).sum()) if batch.num_rows else 0
    return batch.num_rows


def _offsets(column: Column) -> IntArray:
    assert column.offsets is not None, "the mask is ragged"
    return column.offsets


def _tokens(batch: Batch) -> int:
    return int(np.count_nonzero(batch["response_mask"].values)) if batch.num_rows else 0


def _total(loss: Loss, what: str, values: Tensor, rows: Rows) -> Tensor:
    size = {"tokens": len(rows.mask), "groups": rows.num_groups}.get(loss.average, rows.num_rows)
    if tuple(values.shape) != (size,):
        raise ValueError(
            f"{loss_name(loss)} averages over {loss.average}, so {what} must have shape [{size}] here, "
            f"got {list(values.shape)}; return it unreduced"
        )
    if loss.average == "tokens":
        values = torch.where(rows.mask > 0, values, 0.0)
    return values.float().sum()


def _bad_rows(loss: Loss, values: Tensor, rows: Rows) -> Tensor:
    """[B] bool: rows that a value which is not finite comes from."""
    bad = ~values.isfinite()
    if loss.average == "tokens":
        bad = rows.sum_tokens(bad.float()) > 0
    elif loss.average == "groups":
        bad = bad[rows.group_of_row]
    return bad
