"""Losses on pairs: what the recipes of this family choose from. h(y) = log pi(y) - log pi_ref(y), D = h(w) - h(l).

With a reference (`with_reference`)

    hinge       max(0, 1 - beta D)                                        SLiC-HF's on log-ratios; RSO, 2309.06657
    exo         s(u) [log s(u) - log(1 - e)] + s(-u) [log s(-u) - log e],   u = beta D         EXO, 2402.00856
    sppo        (h(w) - 1/(2 beta))^2 + (h(l) + 1/(2 beta))^2             SPPO, 2405.00675 (hard labels)
    nca         -log s(r_w) - (log s(-r_w) + log s(-r_l)) / 2,   r = beta h                     NCA, 2402.05369
    apo_zero    1 - s(r_w) + s(r_l)                                       APO, 2408.06266: raises w, lowers l
    apo_down    s(r_w) + 1 - s(r_w - r_l)                                 lowers both, l more
    dpop        -log s(beta (D - lambda max(0, -h(w))))                   DPO-Positive, 2402.13228
    cal_dpo     -log s(D) + (h(w) - 1/(2 beta))^2 + (h(l) + 1/(2 beta))^2                       Cal-DPO, 2412.14516
    discopop    (1 - m) (-log s(u)) + m exp(-u),   m = s(u / tau)         DiscoPOP, 2406.08414

Without one (`without_reference`); p(y) = exp(mean log pi(y_t))

    cpo         -log s(beta (log pi(w) - log pi(l))) - lambda log pi(w)   CPO, 2401.08417
    orpo        -mean log pi(w) - lambda log s(log odds(w) - log odds(l)),  odds = p / (1 - p)  ORPO, 2403.07691
    slic        max(0, d - log pi(w) + log pi(l)) - lambda log pi(w)      SLiC-HF, 2305.10425
    cpl         -log s(a sum_t g^t log pi(w_t) - lambda a sum_t g^t log pi(l_t))                CPL, 2310.13639
    alphapo     -log s(beta (1 - p(w)^-a) / a - beta (1 - p(l)^-a) / a - gamma)                 AlphaPO, 2501.03884

With a chance p = `win` that the row labelled +1 is the better one (`soft_pairs`)

    reference   -p log s(beta D) - (1 - p) log s(-beta D)                 OSP, 2405.14103; p = 1 is DPO
    mean        the same with D = mean log pi(w) - mean log pi(l)         DPPO, 2301.12842, in outline
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, log_sigmoid, pair_metrics

if TYPE_CHECKING:
    from torch import Tensor

WithReference = Literal["hinge", "exo", "sppo", "nca", "apo_zero", "apo_down", "dpop", "cal_dpo", "discopop"]
WithoutReference = Literal["cpo", "orpo", "slic", "cpl", "alphapo"]
NEARLY_ONE = 1e-6
"""log odds are taken of a probability at most this far below 1."""


@loss(reads=("label", "ref_log_probs"), average="groups")
def with_reference(
    model: ModelOutput,
    rows: Rows,
    kind: WithReference,
    beta: float = 0.1,
    *,
    smoothing: float = 1e-3,
    penalty: float = 50.0,
    temperature: float = 0.05,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of the table above, averaged over pairs. smoothing: e of exo. penalty: lambda of dpop. temperature: tau of
    discopop."""
    won, lost = chosen_and_rejected(rows.sum_tokens(model.log_probs - rows["ref_log_probs"]), rows)
    margin, far = beta * (won - lost), 1 / (2 * beta)
    if kind == "hinge":
        value = (1 - margin).clamp(min=0)
    elif kind == "exo":
        value = margin.sigmoid() * (log_sigmoid(margin) - math.log(1 - smoothing))
        value = value + (-margin).sigmoid() * (log_sigmoid(-margin) - math.log(smoothing))
    elif kind == "sppo":
        value = (won - far) ** 2 + (lost + far) ** 2
    elif kind == "nca":
        value = -log_sigmoid(beta * won) - (log_sigmoid(-beta * won) + log_sigmoid(-beta * lost)) / 2
    elif kind == "apo_zero":
        value = 1 - (beta * won).sigmoid() + (beta * lost).sigmoid()
    elif kind == "apo_down":
        value = (beta * won).sigmoid() + 1 - margin.sigmoid()
    elif kind == "dpop":
        value = -log_sigmoid(margin - beta * penalty * (-won).clamp(min=0))
    elif kind == "cal_dpo":
        value = -log_sigmoid(won - lost) + (won - far) ** 2 + (lost + far) ** 2
    else:
        share = (margin / temperature).sigmoid()
        value = -(1 - share) * log_sigmoid(margin) + share * (-margin).exp()
    return value, pair_metrics(value, beta * won, beta * lost)


@loss(reads=("label",), average="groups")
def without_reference(
    model: ModelOutput,
    rows: Rows,
    kind: WithoutReference,
    beta: float = 0.1,
    *,
    nll_coef: float = 1.0,
    gap: float = 1.0,
    alpha: float = 0.25,
    bias: float = 0.5,
    discount: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of the table above, averaged over pairs. nll_coef: lambda of cpo, orpo and slic (of orpo the odds'
    weight). gap: d of slic, gamma of alphapo. alpha: a of alphapo. bias, discount: lambda, g of cpl, whose a is
    beta."""
    won, lost = chosen_and_rejected(rows.sum_tokens(model.log_probs), rows)
    mean_won, mean_lost = chosen_and_rejected(rows.mean_tokens(model.log_probs), rows)
    if kind == "cpo":
        value = -log_sigmoid(beta * (won - lost)) - nll_coef * won
    elif kind == "orpo":
        value = -mean_won - nll_coef * log_sigmoid(log_odds(mean_won) - log_odds(mean_lost))
    elif kind == "slic":
        value = (gap - won + lost).clamp(min=0) - nll_coef * won
    elif kind == "cpl":
        good, bad = chosen_and_rejected(rows.sum_tokens(discount ** place_of_token(rows) * model.log_probs), rows)
        value = -log_sigmoid(beta * (good - bias * bad))
    else:
        good, bad = (-(-alpha * mean).expm1() / alpha for mean in (mean_won, mean_lost))
        value = -log_sigmoid(beta * (good - bad) - gap)
    return value, pair_metrics(value, mean_won, mean_lost)


@loss(
    reads=lambda settings: ("label", "win", *(("ref_log_probs",) if settings["kind"] == "reference" else ())),
    average="groups",
)
def soft_pairs(
    model: ModelOutput, rows: Rows, beta: float = 0.1, *, kind: Literal["reference", "mean"] = "reference"
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of the table above, averaged over pairs."""
    if kind == "reference":
        score = beta * rows.sum_tokens(model.log_probs - rows["ref_log_probs"])
    else:
        score = beta * rows.mean_tokens(model.log_probs)
    won, lost = chosen_and_rejected(score, rows)
    chance, _ = chosen_and_rejected(rows["win"], rows)
    value = -chance * log_sigmoid(won - lost) - (1 - chance) * log_sigmoid(lost - won)
    return value, pair_metrics(value, won, lost)


def log_odds(mean_log_prob: Tensor) -> Tensor:
    """log p / (1 - p) of log p."""
    log_p = mean_log_prob.clamp(max=math.log1p(-NEARLY_ONE))
    return log_p - (-log_p.expm1()).log()


def place_of_token(rows: Rows) -> Tensor:
    """[T]: 0, 1, ... within each row."""
    one = rows.row_of_token.new_ones(len(rows.row_of_token))
    lengths = one.new_zeros(rows.num_rows).index_add(0, rows.row_of_token, one)
    starts = lengths.cumsum(0) - lengths
    return one.cumsum(0) - 1 - starts[rows.row_of_token]
