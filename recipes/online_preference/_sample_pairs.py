"""Losses on two of the policy's own responses, the first labelled +1 and the second -1 whatever their rewards.

D_t(y) = log pi(y) - log pi_t(y), pi_t the policy that drew them; D_r(y) the same to the reference

    rebel    ((D_t(y) - D_t(y')) / eta - (r(y) - r(y')))^2                                  REBEL, 2404.16767
    copg     -(R(y) - R(y')) (log pi(y) - log pi(y')),   R = r - beta D_r, without gradient CoPG, 2406.19185
    p3o      -min(q g, clip(q, 1 - e, 1 + e) g),   g = (r(y) - r(y')) / 2,  q = exp(D_t(y) - D_t(y')),
             r less beta D_r before the step                                                P3O, 2310.00212
    inpo     (h(w) - h(l) - 1/(2 eta))^2,   h = log pi - s log pi_ref - (1 - s) log pi_t,   s = tau / eta
                                                                                            INPO, 2407.00617
    dno      -s(d) log s(eta (D_t(y) - D_t(y'))) - s(-d) log s(-eta (...)),   d = r_t(y) - r_t(y'),
             r_t(y) the chance that y beats another response of pi_t                        DNO, 2404.03715

and on every response by itself

    sppo     (D_t(y) - eta (r_t(y) - 1/2))^2                                                SPPO, 2405.00675
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from recipes.policy_gradient._advantages import win_shares
from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.kl import LOG_RATIO_LIMIT
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, log_sigmoid
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import HostResult, host_op

if TYPE_CHECKING:
    from torch import Tensor

PairKind = Literal["rebel", "copg", "p3o", "inpo", "dno"]
WITH_REFERENCE = ("copg", "p3o", "inpo")


@loss(
    reads=lambda settings: (
        *("label", "old_log_probs", "win" if settings["kind"] == "dno" else "rewards"),
        *(("ref_log_probs",) if settings["kind"] in WITH_REFERENCE else ()),
    ),
    average="groups",
)
def sample_pair_loss(
    model: ModelOutput,
    rows: Rows,
    kind: PairKind,
    *,
    eta: float = 1.0,
    beta: float = 0.1,
    clip: float = 0.2,
    reference_share: float = 1 / 3,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of the table above, averaged over pairs. reference_share: s of inpo."""
    log_prob = rows.sum_tokens(model.log_probs)
    drawn = rows.sum_tokens(rows["old_log_probs"])
    one, other = chosen_and_rejected(log_prob - drawn, rows)
    moved = one - other
    if kind == "dno":
        better, worse = chosen_and_rejected(rows["win"], rows)
        gap = better - worse
        value = -gap.sigmoid() * log_sigmoid(eta * moved) - (-gap).sigmoid() * log_sigmoid(-eta * moved)
    else:
        rewards = rows["rewards"]
        if kind in WITH_REFERENCE:
            known = rows.sum_tokens(rows["ref_log_probs"])
            rewards = rewards - beta * ((log_prob.detach() if kind == "copg" else drawn) - known)
        good, bad = chosen_and_rejected(rewards, rows)
        gap = good - bad
        if kind == "rebel":
            value = (moved / eta - gap) ** 2
        elif kind == "copg":
            said, unsaid = chosen_and_rejected(log_prob, rows)
            value = -gap * (said - unsaid)
        elif kind == "p3o":
            ratio, half = moved.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp(), gap / 2
            value = -(ratio * half).minimum(ratio.clamp(1 - clip, 1 + clip) * half)
        else:
            mixed = reference_share * known + (1 - reference_share) * drawn
            won, lost = chosen_and_rejected(log_prob - mixed, rows)
            value = (won - lost - 1 / (2 * eta)) ** 2
    return value, {"pair_loss": value.detach(), "moved": moved.detach(), "reward_gap": gap.detach()}


@loss(reads=("old_log_probs", "win"), average="rows")
def win_regression(model: ModelOutput, rows: Rows, eta: float = 1e3) -> tuple[Tensor, dict[str, Tensor]]:
    """sppo of the table above, one number a response; `win` is r_t - 1/2."""
    moved = rows.sum_tokens(model.log_probs - rows["old_log_probs"])
    value = (moved - eta * rows["win"]) ** 2
    return value, {"moved": moved.detach(), "win": rows["win"]}


@host_op(reads=("rewards", "group_id"), writes=("win",), scope="groups", least_group=2)
def wins_in_group(batch: Batch) -> Batch:
    """Share of the group's other responses that a response's reward beats, less 1/2."""
    win = np.zeros(batch.num_rows, np.float32)
    for rows in batch.group():
        win[rows] = win_shares(batch["rewards"].values[rows])
    return Batch({"win": Column(win)})


@host_op(reads=("group_id",), writes=("label",), scope="groups", rows="drop", least_group=2)
def first_two(batch: Batch) -> HostResult:
    """The first two rows of each group, labelled +1 and -1 in their order."""
    keep = np.sort(np.concatenate([rows[:2] for rows in batch.group()])) if batch.num_rows else np.empty(0, np.int64)
    label = np.zeros(batch.num_rows, np.int8)
    for rows in batch.group():
        label[rows[:2]] = 1, -1
    return HostResult(columns=Batch({"label": Column(label[keep])}, len(keep)), keep=keep)


@host_op(reads=("margin", "group_id"), scope="groups", rows="drop")
def wide_pairs(batch: Batch, *, least: float) -> HostResult:
    """Pairs whose rewards are at least `least` apart."""
    keep = np.flatnonzero(batch["margin"].values >= least)
    return HostResult(columns=Batch({}, len(keep)), keep=keep)
