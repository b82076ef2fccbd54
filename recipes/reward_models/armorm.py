"""ArmoRM: many objectives and a gate (Wang et al. 2024, arXiv 2406.12845).

    1. K regression heads at the last token:  sum_k (r_k - y_k)^2, over the objectives that a row has a rating of
    2. r = sum_k g_k(x) (r_k - lambda r_v),   g = softmax of a head on the prompt's last state,   -log s(r(w) - r(l))

v is the objective that stands for verbosity, and is taken off all others. The gate reads the state before the first
response token, which is of the prompt alone; through it the heads of stage 1 take no gradient. Both losses are one step
here. Rows of `ratings` have `ratings`: a JSON list of K numbers, null where there is none.
"""

import json
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlhf_dist.algorithms import Head, loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, log_sigmoid
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples, Preferences

OBJECTIVES = 5
VERBOSITY = OBJECTIVES - 1
"""The last objective."""
PAPERS = {
    "armorm": Paper(
        title="ArmoRM with a mixture-of-experts gate",
        year=2024,
        arxiv="2406.12845",
        rows=(104,),
        needs=("RMT", "MRM", "HID"),
        assumed=(
            "5 objectives, the last is verbosity, one lambda for all; the gate is linear; both stages in one step, on "
            "a trunk that learns"
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class ArmoRM:
    """Settings of ArmoRM."""

    verbosity_price: float = 0.1
    """lambda."""
    gate_coef: float = 1.0
    """Weight of the gate's loss beside that of the heads."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the sources."""


class Gated(Actor, Protocol):
    """A trunk with K ratings of what it has read, and a gate at the prompt."""

    heads = (
        Head(name="objectives", at="last_token", outputs=OBJECTIVES, scale=0.1),
        Head(name="gate", at="token", outputs=OBJECTIVES, scale=0.1),
    )


class Multi(Examples):
    """Responses with several ratings."""

    fields = {"ratings": "json"}


@host_op(reads=("ratings",), writes=("rated", "has_rating"))
def as_numbers(batch: Batch) -> Batch:
    """[B, K] ratings, 0 where there is none, and which there are."""
    given = [json.loads(text) for text in batch["ratings"].rows()]
    rows = np.array([[np.nan if one is None else one for one in row] for row in given], np.float32)
    rows = rows.reshape(len(given), -1)
    if rows.shape[1] != OBJECTIVES:
        raise ValueError(f"ratings must have {OBJECTIVES} numbers or nulls, got {rows.shape[1]} in {given[:1]}")
    there = ~np.isnan(rows)
    return Batch({"rated": Column(np.nan_to_num(rows)), "has_rating": Column(there.astype(np.float32))})


@loss(reads=("rated", "has_rating"), outputs=("heads.objectives",), average="rows")
def regression(model, rows):
    """Squared error, over the ratings that a row has."""
    error = (model.heads["objectives"] - rows["rated"]) ** 2 * rows["has_rating"]
    value = error.sum(-1)
    return value, {"rating_error": value.detach()}


@loss(reads=("label",), outputs=("heads.objectives", "heads.gate"), average="groups")
def gated_preference(model, rows, price: float = 0.1):
    """Bradley-Terry on the gated sum; the objectives carry no gradient."""
    objectives = model.heads["objectives"].detach()
    first = rows.row_of_token.diff(prepend=rows.row_of_token.new_full((1,), -1)) > 0
    said = model.heads["gate"].where((first & (rows.mask > 0))[:, None], 0.0)
    gate = objectives.new_zeros(objectives.shape).index_add(0, rows.row_of_token, said)
    corrected = objectives - price * objectives[:, VERBOSITY:]
    won, lost = chosen_and_rejected((gate.softmax(-1) * corrected).sum(-1), rows)
    value = -log_sigmoid(won - lost)
    return value, {"accuracy": (won > lost).to(value.dtype), "margin": (won - lost).detach()}


@recipe
def armorm(ratings: Multi, pairs: Preferences, judge: Gated, cfg: ArmoRM) -> None:
    """Ratings by regression, the gate by preferences."""
    gate = gated_preference(cfg.verbosity_price)
    terms = [(as_numbers(ratings), regression()), (pairs, gate, cfg.gate_coef)]
    judge.update_actor(terms, mini_batches=cfg.mini_batches)
