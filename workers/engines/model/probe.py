"""Which way through a model is exact, found by trying on the model itself, as it is sharded, before its first use.

    rows      A: prompt and response      B: A and more      C: another prompt      short, of different lengths
    truth     each row alone through the library's own forward (eager attention, whole logits)
    tried     the head as a matrix, else the library's own
              packed with shared prompts -> packed -> padded with the library's masks (sdpa, eager)
    leaks     packs again, with other tokens in the other rows: nothing of the kept row may move, in any dtype

The first that agrees is taken; none: `InexactModel`, as for a model whose A changes with what comes after it in B.
Costs seven forward passes of a few tokens where the first ways hold.

What short rows cannot show is decided elsewhere: positions that depend on the length of a row (`rotary.py`) and local
attention (the library's own rule for its masks, `attention.py`); a window, a cap on scores or a sparse choice of keys
that config.json names and no layer of the packed pass asked for is a reason against packing (`unseen.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from rlhf_dist.batch import Batch
from workers.engines.model.unseen import caps_scores, head_cap, unseen
from workers.engines.model.ways import ALONE, Way

logger = logging.getLogger(__name__)

Outputs = Mapping[str, NDArray[np.float32]]
Try = Callable[[Batch, Way], Outputs | Exception]
"""Outputs of the rows by a way through the model (`log_probs` and `entropy`, or `hidden`), or why there are none."""

TOLERANCE = {"float32": 3e-4, "bfloat16": 0.1}
"""Difference from the truth in nats, or as a share of the largest hidden state: the largest in float32; in bfloat16,
where one expert chosen differently moves a token by a nat, the mean (docs/models.md has what families come to)."""
LEAK = {"float32": 3e-4, "bfloat16": 0.01}
"""The same of a row whose neighbours change. Rounding may hide a leak from the truth (mamba2 in bfloat16: 0.08), not
from this: the same products of the same sizes gave 0 in ten families, leaks 0.07 and more."""


class InexactModel(ValueError):
    """No way through the model gives what the library's own forward of a row gives."""


@dataclass(frozen=True)
class Finding:
    """What the probe found."""

    way: Way
    difference: float
    """From the truth, as in `TOLERANCE`."""
    refused: tuple[str, ...]
    """Ways that were tried before, and why each was not taken."""


def probe(
    trial: Try,
    *,
    dtype: str,
    policy: bool,
    asked: Callable[[], tuple[set[int], set[float]]],
    config: PretrainedConfig,
    whole_rows: bool,
) -> Finding:
    """The fastest way that is exact. Every rank makes the same calls and `trial` gives every rank the same answers.

    asked: windows and caps on scores that the last packed pass knew of. whole_rows: a rank has whole rows (sequence
    parallelism cuts them); else packed rows are all there is. Raises InexactModel.
    """
    batch = probe_rows(int(config.get_text_config().vocab_size))
    truth = _truth(trial, batch, policy, dtype)
    refused: list[str] = []
    head = _head(trial, batch, truth, dtype, refused, head_cap(config)) if policy else "matrix"
    for way in _ways(head, whole_rows, config):
        found = trial(batch, way)
        wrong = _difference(found, truth, dtype)
        reason = ""
        if isinstance(found, Exception):
            reason = f"{type(found).__name__}: {found}"
        elif not wrong <= TOLERANCE[dtype]:
            reason = f"{wrong:.2g} off"
        elif not way.grid and (moved := _moved(trial, batch, found, way, dtype)) > LEAK[dtype]:
            reason = f"a row moves by {moved:.2g} with the tokens of other rows"
        elif not way.grid:
            reason = unseen(config, *asked())
        if not reason:
            if refused:
                logger.warning("the model runs with %s (%s)", way, "; ".join(refused))
            return Finding(way, wrong, tuple(refused))
        refused.append(f"{way}: {reason}")
    raise InexactModel(
        "no way through this model gives the log-probs of the library's own forward; " + "; ".join(refused)
    )


def probe_rows(vocabulary: int) -> Batch:
    """Three rows: one, the same going on, another; token ids spread over the vocabulary."""
    ids = ((np.arange(1, 40) * 7919 % max(vocabulary - 3, 1) + 3) % vocabulary).astype(np.int32)
    return Batch.of(prompt_ids=[ids[:5], ids[:5], ids[20:24]], response_ids=[ids[5:8], ids[5:12], ids[24:30]])


def _moved(trial: Try, batch: Batch, found: Outputs, way: Way, dtype: str) -> float:
    """How far B moves when A and C say something else, or C when A and B do; A and B have their prompt in common."""
    ends = np.cumsum(batch["response_ids"].lengths)
    worst = 0.0
    for kept in (1, 2):
        prompts, responses = list(batch["prompt_ids"].rows()), list(batch["response_ids"].rows())
        # Tokens backwards are other ones, and of the vocabulary; A and B keep a prompt in common.
        for row in {0, 1, 2} - {kept}:
            responses[row] = responses[row][::-1]
        for row in (2,) if kept == 1 else (0, 1):
            prompts[row] = prompts[row][::-1]
        again = trial(Batch.of(prompt_ids=prompts, response_ids=responses), way)
        mine = slice(ends[kept - 1], ends[kept])
        if isinstance(again, Exception):
            return float("inf")
        was = {name: values[mine] for name, values in found.items()}
        worst = max(worst, _difference({name: values[mine] for name, values in again.items()}, was, dtype))
    return worst


def _truth(trial: Try, batch: Batch, policy: bool, dtype: str) -> Outputs:
    way = ALONE if policy else replace(ALONE, head="matrix")
    found: list[Outputs] = []
    for row in range(batch.num_rows):
        one = trial(batch.take(np.array([row])), way)
        if isinstance(one, Exception):
            raise InexactModel(f"the library's own forward of a short row fails: {type(one).__name__}: {one}") from one
        if not all(np.isfinite(values).all() for values in one.values()):
            raise InexactModel("the library's own forward of a short row is not finite; are the weights whole?")
        found.append(one)
    tokens = int(batch["response_ids"].lengths[0])
    later = _difference({name: values[:tokens] for name, values in found[1].items()}, found[0], dtype)
    if later > TOLERANCE[dtype]:
        raise InexactModel(
            f"tokens of this model see tokens after them (log-probs change by {later:.2g}), so it is no causal "
            "language model; an encoder's config.json may want is_decoder=true"
        )
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def _head(trial: Try, batch: Batch, truth: Outputs, dtype: str, refused: list[str], cap: str) -> Any:
    """`matrix` or `library`, on the first row alone. cap: why it is no matrix where small logits do not show it."""
    first = batch.take(np.array([0]))
    tokens = first["response_ids"].lengths[0]
    for head in ("matrix", "library"):
        found = trial(first, Way(rows="alone", attention="eager", head=head))
        wrong = _difference(found, {name: values[:tokens] for name, values in truth.items()}, dtype)
        if wrong <= TOLERANCE[dtype] and not (head == "matrix" and cap):
            return head
        why = f"{type(found).__name__}: {found}" if isinstance(found, Exception) else cap or f"{wrong:.2g} off"
        refused.append(f"the head as {'one matrix' if head == 'matrix' else 'its own code over hidden states'}: {why}")
    raise InexactModel("the model's logits cannot be computed from its trunk's last states; " + "; ".join(refused))


def _ways(head: Any, whole_rows: bool, config: PretrainedConfig) -> Iterator[Way]:
    if whole_rows:
        yield Way(rows="shared", attention="packed", head=head)
    yield Way(rows="packed", attention="packed", head=head)
    if whole_rows:
        # The library's sdpa leaves soft caps on scores out, which small scores do not show.
        for attention in ("eager",) if caps_scores(config) else ("sdpa", "eager"):
            yield Way(rows="grid", attention=attention, head=head)


def _difference(found: Outputs | Exception, truth: Outputs, dtype: str) -> float:
    """As in `TOLERANCE`; infinite for what is not finite."""
    if isinstance(found, Exception):
        return float("inf")
    worst = 0.0
    for name, values in truth.items():
        scale = max(float(np.abs(values).max()), 1e-6) if name == "hidden" else 1.0
        differences = np.abs(found[name] - values) / scale
        difference = float(differences.mean() if dtype == "bfloat16" else differences.max())
        worst = max(worst, difference if np.isfinite(difference) else float("inf"))
    return worst
