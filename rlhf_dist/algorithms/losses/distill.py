"""Distillation: the student's distribution p before each response token drawn to a teacher's q.

    forward    KL(q || p) = sum_v q_v (log q_v - log p_v)              covers what the teacher says (Hinton et al. 2015)
    reverse    KL(p || q)                                              keeps to what it likes (MiniLLM, 2306.08543)
    jsd        b KL(q || m) + (1 - b) KL(p || m),  m = b q + (1 - b) p        between them (GKD, 2306.13649, eq. 1)

over the whole vocabulary (`distill`), or over the teacher's k likeliest tokens and all others as one (`distill_top_k`):
merging outcomes only ever makes a divergence smaller, and nothing is renormalised. On-policy where the responses are
the student's own; two teachers are two terms.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.loss import Settings, loss
from rlhf_dist.algorithms.losses.average import TokenAverage, averaged, check_average
from rlhf_dist.algorithms.outputs import Output, OverVocabulary

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["forward", "reverse", "jsd"]
DIVERGENCES: tuple[str, ...] = ("forward", "reverse", "jsd")


def divergence(log_p: Tensor, log_q: Tensor, *, kl: Divergence, beta: float) -> Tensor:
    """[..., V] log-probs of student and teacher over the same outcomes -> [...], nats."""
    if kl == "forward":
        return _kl(log_q, log_p)
    if kl == "reverse":
        return _kl(log_p, log_q)
    log_m = (log_q + math.log(beta)).logaddexp(log_p + math.log(1 - beta))
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _check(kl: str, beta: float, average: str, **others: Any) -> None:
    if kl not in DIVERGENCES:
        raise ValueError(f"kl must be one of {', '.join(DIVERGENCES)}, got {kl!r}")
    if not 0 < beta < 1:
        raise ValueError(f"beta, the teacher's share of the mixture, must be between 0 and 1, got {beta}")
    check_average(average)


@loss(
    reads=lambda settings: (f"{settings['prefix']}_log_probs", f"{settings['prefix']}_log_rest"),
    outputs=lambda settings: (f"log_probs_at.{settings['prefix']}_ids",),
    average=lambda settings: settings["average"],
    check=_check,
)
def distill_top_k(
    model: ModelOutput,
    rows: Rows,
    kl: Divergence = "reverse",
    *,
    beta: float = 0.5,
    prefix: str = "top",
    average: TokenAverage = "tokens",
) -> tuple[Tensor, dict[str, Tensor]]:
    """`distill_top_k()` after `teacher.compute_top_k(batch)`: reads top_ids, top_log_probs [T, k], top_log_rest [T].

    kl         forward, reverse or jsd
    beta       of jsd: the teacher's share of the mixture
    prefix     of the three columns, as `compute_top_k` was given it
    average    tokens, rows, rows_with_tokens or groups (see average.py)
    """
    import torch

    at, rest = model.log_probs_at[f"{prefix}_ids"], model.log_rest[f"{prefix}_ids"]
    log_q, rest_q = rows[f"{prefix}_log_probs"], rows[f"{prefix}_log_rest"]
    log_p = torch.cat([at, rest[:, None]], dim=-1)
    value = divergence(log_p, torch.cat([log_q, rest_q[:, None]], dim=-1), kl=kl, beta=beta)
    metrics = {"distill_kl": value, "rest": rest.exp(), "teacher_rest": rest_q.exp()}
    means = {name: averaged(metric.detach(), rows, average, 0.0) for name, metric in metrics.items()}
    return averaged(value, rows, average, 0.0), means


def _whole(settings: Settings) -> tuple[Output, ...]:
    function = partial(divergence, kl=settings["kl"], beta=settings["beta"])
    asked = OverVocabulary(name="distill", function=function, teacher=settings["teacher"], hidden=settings["hidden"])
    return (asked,)


@loss(reads=(), outputs=_whole, average=lambda settings: settings["average"], check=_check)
def distill(
    model: ModelOutput,
    rows: Rows,
    teacher: str = "teacher",
    kl: Divergence = "reverse",
    *,
    beta: float = 0.5,
    hidden: str = "hidden",
    average: TokenAverage = "tokens",
) -> tuple[Tensor, dict[str, Tensor]]:
    """`distill("teacher")` after `teacher.compute_hidden(batch)`: over the whole vocabulary, exact. Reads its hidden.

    teacher    the role, a frozen language model of the same vocabulary
    kl         forward, reverse or jsd
    beta       of jsd: the teacher's share of the mixture
    hidden     the column that `compute_hidden` wrote
    average    tokens, rows, rows_with_tokens or groups (see average.py)
    """
    value = model.over_vocabulary["distill"]
    return averaged(value, rows, average, 0.0), {"distill_kl": averaged(value.detach(), rows, average, 0.0)}
