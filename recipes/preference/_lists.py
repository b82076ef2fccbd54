"""Losses on lists, several scored responses to each prompt, all of one group. r: their rewards; s: the policy's scores.

    pro            -sum_k log softmax_{i >= k}(s_k) - c log pi(best),   s = mean log pi               PRO, 2306.17492
    plackett_luce  the same sum with s = beta log pi/pi_ref                                   DPO, 2305.18290, eq. 20
    lipo           sum_{i > j} |2^r_i - 2^r_j| |1/D(t_i) - 1/D(t_j)| log(1 + exp(-(s_i - s_j)))        LiPO, 2402.01878
                   s = beta log pi/pi_ref, t the place of a response by s, D(t) = log(1 + t)
    rrhf           sum_{r_i < r_j} max(0, s_i - s_j) - log pi(best),   s = mean log pi                 RRHF, 2304.05302
    exo            KL(softmax(beta log pi/pi_ref) || softmax(r / tau))                                  EXO, 2402.00856
    brain          -sum_i (a_i - b_i) log pi(y_i),  a = softmax(log pi_ref/q + r / tau), b = softmax(log pi/q)
                   BRAIn, 2402.02479, in outline: q is the policy that drew the responses; a and b carry no gradient

Of equal rewards the first response ranks higher in pro and plackett_luce; in the others they are no pair. lipo's places
of equal s are those of the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.losses.pairs import log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

ListKind = Literal["pro", "plackett_luce", "lipo", "rrhf", "exo", "brain"]
WITH_REFERENCE = ("plackett_luce", "lipo", "exo", "brain")


def _reads(settings: Any) -> tuple[str, ...]:
    reference = ("ref_log_probs",) if settings["kind"] in WITH_REFERENCE else ()
    return ("rewards", *reference, *(("old_log_probs",) if settings["kind"] == "brain" else ()))


@loss(reads=_reads, average="groups")
def list_loss(
    model: ModelOutput,
    rows: Rows,
    kind: ListKind,
    beta: float = 0.1,
    *,
    nll_coef: float = 0.05,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of the table above, averaged over lists. nll_coef: c of pro. temperature: tau of exo and brain."""
    rewards, log_prob = rows["rewards"], rows.sum_tokens(model.log_probs)
    same = rows.group_of_row[:, None] == rows.group_of_row[None, :]
    better = same & (rewards[:, None] > rewards[None, :])
    mean = rows.mean_tokens(model.log_probs)
    if kind in WITH_REFERENCE:
        ratio = beta * rows.sum_tokens(model.log_probs - rows["ref_log_probs"])
    if kind in ("pro", "plackett_luce"):
        score = mean if kind == "pro" else ratio
        value = rows.sum_groups(log_sum(score, in_order(rewards, same)) - score)
        if kind == "pro":
            value = value - nll_coef * rows.sum_groups(best_of(rewards, same) * log_prob)
    elif kind == "rrhf":
        gaps = (mean[None, :] - mean[:, None]).clamp(min=0).where(better, 0.0)
        value = rows.sum_groups(gaps.sum(1) - best_of(rewards, same) * log_prob)
    elif kind == "lipo":
        place = in_order(ratio.detach(), same).sum(0)
        discount, gain = 1 / (1 + place).to(ratio.dtype).log(), 2.0**rewards
        weight = (gain[:, None] - gain[None, :]).abs() * (discount[:, None] - discount[None, :]).abs()
        value = rows.sum_groups((weight * -log_sigmoid(ratio[:, None] - ratio[None, :])).where(better, 0.0).sum(1))
    elif kind == "exo":
        said, wanted = log_softmax(ratio, same), log_softmax(rewards / temperature, same)
        value = rows.sum_groups(said.exp() * (said - wanted))
    else:
        drawn = rows.sum_tokens(rows["old_log_probs"])
        target = log_softmax(rows.sum_tokens(rows["ref_log_probs"]) - drawn + rewards / temperature, same).exp()
        own = log_softmax(log_prob.detach() - drawn, same).exp()
        value = -rows.sum_groups((target - own) * log_prob)
    agrees = (mean[:, None] > mean[None, :]).where(better, False).sum(1).to(mean.dtype)
    pairs = rows.sum_groups(better.sum(1).to(mean.dtype)).clamp(min=1)
    metrics = {"list_loss": value, "ranking_accuracy": rows.sum_groups(agrees) / pairs}
    return value, {name: metric.detach() for name, metric in metrics.items()}


def in_order(rewards: Tensor, same: Tensor) -> Tensor:
    """[B, B]: whether row j of i's list ranks at i or below."""
    at = rewards.new_ones(len(rewards)).cumsum(0)
    tie = (rewards[:, None] == rewards[None, :]) & (at[None, :] >= at[:, None])
    return same & ((rewards[:, None] > rewards[None, :]) | tie)


def best_of(rewards: Tensor, same: Tensor) -> Tensor:
    """[B]: 1 for the first row of its list with the highest reward, else 0."""
    return (in_order(rewards, same).sum(1) == same.sum(1)).to(rewards.dtype)


def log_sum(scores: Tensor, among: Tensor) -> Tensor:
    """[B]: log of the sum of exp over those that `among` [B, B] has in a row's line."""
    return scores[None, :].where(among, -float("inf")).logsumexp(1)


def log_softmax(scores: Tensor, same: Tensor) -> Tensor:
    """[B]: within lists."""
    return scores - log_sum(scores, same)
