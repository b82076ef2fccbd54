"""Surrogates of the policy gradient: what stands where PPO has its clipped ratio.

rho_t = pi(y_t) / pi_old(y_t), A the advantage, sg without gradient. Per token:

    cispo    -sg(clip(rho, 1 - low, 1 + high)) A log pi                                    CISPO, 2506.13585
    sapo     -(4 / tau) s(tau (rho - 1)) A,   tau = tau_+ where A > 0, else tau_-          SAPO, 2511.20347
    mdpo     -rho A + c (rho log rho - rho + 1)                c KL(pi || pi_old)          MDPO, 2005.09814
    nft      w(q) times  -log rho  of a right response,
             -log max((1 - p rho) / (1 - p), e)  of a wrong one, p the group's share of right ones       NFT, 2505.18116
    one_side, two_side, ring      -M rho A, or -M A log pi without importance weights      REC, 2509.24203
             M = 0 where  A > 0, rho > 1 + high  or  A < 0, rho < 1 - low                  one_side
                          rho outside [1 - low, 1 + high]                                  two_side
                          the same, but tokens stay that are far out on the side where the step leads back:
                          A > 0, rho <= 1 - far_low  or  A < 0, rho >= 1 + far_high        ring
    clip_cov, kl_cov              see covariance_of

Per response, rho and log pi of the whole of it:

    gmpo     -A exp(mean_t log c(rho_t)),  c cuts at e^high where A > 0, at e^-low where A < 0          GMPO, 2507.20673
    opmd     -A log pi(y) + tau / 2 (log rho)^2                                            REP-OPMD, 2509.24203
    topr     -A log pi(y) where A >= 0, else -sg(min(rho, 1)) A log pi(y)                  TOPR, 2503.14286
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.kl import LOG_RATIO_LIMIT
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.metrics import Mean
from rlhf_dist.transforms.columns import mask_and_offsets, tokens

if TYPE_CHECKING:
    from torch import Tensor

PerToken = Literal["cispo", "sapo", "mdpo", "nft", "one_side", "two_side", "ring"]
PerRow = Literal["gmpo", "opmd", "topr"]


@loss(
    reads=lambda settings: (
        *("old_log_probs", "advantages"),
        *(("pass_rate", "right") if settings["kind"] == "nft" else ()),
    ),
    average=lambda settings: settings["average"],
)
def token_surrogate(
    model: ModelOutput,
    rows: Rows,
    kind: PerToken,
    *,
    low: float = 0.2,
    high: float = 0.2,
    far_low: float = 0.6,
    far_high: float = 2.0,
    importance: bool = True,
    temperature: float = 1.0,
    negative_temperature: float = 1.05,
    coef: float = 1.0,
    floor: float = 1e-3,
    weighted: bool = True,
    average: Literal["tokens", "rows"] = "tokens",
) -> tuple[Tensor, dict[str, Tensor]]:
    """A per-token surrogate of the table above. low, high, far_low, far_high: of cispo and the masks. importance: rho
    in place of log pi under a mask. temperature, negative_temperature: of sapo. coef: of mdpo. floor, weighted: e of
    nft, and whether w(q) = sqrt((1 - p) / p) (else 1)."""
    log_probs, advantages = model.log_probs, rows["advantages"]
    rho = ratio_of(log_probs, rows)
    detached = rho.detach()
    outside = (detached < 1 - low) | (detached > 1 + high)
    if kind == "cispo":
        value = -detached.clamp(1 - low, 1 + high) * advantages * log_probs
    elif kind == "sapo":
        tau = (0 * rho + temperature).where(advantages > 0, 0 * rho + negative_temperature).detach()
        value = -(4 / tau) * (tau * (rho - 1)).sigmoid() * advantages
        outside = outside & False
    elif kind == "mdpo":
        value = -rho * advantages + coef * (rho * rho.log() - rho + 1)
        outside = outside & False
    elif kind == "nft":
        rate, right = rows["pass_rate"][rows.row_of_token], rows["right"][rows.row_of_token] > 0
        unclear = (rate > 0) & (rate < 1)
        rate = rate.where(unclear, 0.5)
        wrong = ((1 - rate * rho) / (1 - rate)).clamp(min=floor).log()
        weight = ((1 - rate) / rate).sqrt() if weighted else 0 * rate + 1
        value = -(weight * rho.log().where(right, wrong)).where(unclear, 0.0)
        outside = ~right & (1 - rate * detached < floor * (1 - rate))
    else:
        up = advantages > 0
        if kind == "one_side":
            outside = (detached > 1 + high).where(up, detached < 1 - low)
        elif kind == "ring":
            outside = outside & ~(detached <= 1 - far_low).where(up, detached >= 1 + far_high)
        value = -advantages * ((rho if importance else log_probs) * ~outside)
    metrics = {"policy_loss": value, "ratio": rho, "cut": outside.to(rho.dtype)}
    return over(value, rows, average), {name: over(metric.detach(), rows, average) for name, metric in metrics.items()}


@loss(reads=("old_log_probs", "advantages"), average="rows")
def row_surrogate(
    model: ModelOutput, rows: Rows, kind: PerRow, *, low: float = 0.4, high: float = 0.4, tau: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """A surrogate of whole responses of the table above. low, high: of gmpo, in nats. tau: of opmd."""
    log_ratio = log_ratio_of(model.log_probs, rows)
    advantage = rows.mean_tokens(rows["advantages"])
    log_prob, whole = rows.sum_tokens(model.log_probs), rows.sum_tokens(log_ratio)
    if kind == "gmpo":
        up = (advantage > 0)[rows.row_of_token]
        mean = rows.mean_tokens(log_ratio.clamp(max=high).where(up, log_ratio.clamp(min=-low)))
        value = -advantage * mean.exp()
    elif kind == "opmd":
        value = -advantage * log_prob + tau / 2 * whole**2
    else:
        down = whole.detach().clamp(-LOG_RATIO_LIMIT, 0).exp()
        value = -advantage * log_prob * (0 * down + 1).where(advantage >= 0, down)
    return value, {"policy_loss": value.detach(), "log_ratio": whole.detach()}


@host_op(reads=("advantages", "old_log_probs", "response_mask"), writes=("picked",), scope="batch")
def covariance_of(
    batch: Batch,
    *,
    kind: Literal["clip_cov", "kl_cov"],
    share: float,
    low: float,
    high: float,
    rng: np.random.Generator,
) -> HostResult:
    """Tokens that move the entropy most: cov_t = (log pi_t - its mean) (A_t - its mean), means over the batch.

    clip_cov: `share` of all tokens, drawn among those with cov in (low, high); kl_cov: the `share` of largest cov. At
    least one where there is one. Cui et al. 2025, 2505.22617, eqs. 9 to 13.
    """
    mask, offsets = mask_and_offsets(batch)
    counted = np.flatnonzero(mask > 0)
    log_probs, advantages = tokens(batch, "old_log_probs")[counted], tokens(batch, "advantages")[counted]
    cov = (log_probs - log_probs.mean()) * (advantages - advantages.mean()) if len(counted) else log_probs
    many = max(1, int(share * len(counted)))
    if kind == "kl_cov":
        chosen = counted[np.argsort(-cov, kind="stable")[:many]]
    else:
        chosen = rng.permutation(counted[(cov > low) & (cov < high)])[:many]
    picked = np.zeros(len(mask), np.float32)
    picked[chosen] = 1
    return HostResult(
        columns=Batch({"picked": Column(picked, offsets)}, batch.num_rows),
        metrics={"picked": Mean(float(len(chosen)), float(max(len(counted), 1)))},
    )


@loss(reads=("old_log_probs", "advantages", "picked"), average="tokens")
def covariance_surrogate(
    model: ModelOutput,
    rows: Rows,
    kind: Literal["clip_cov", "kl_cov"],
    *,
    clip: float = 0.2,
    kl_coef: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """clip_cov: PPO's clipped ratio, no gradient at the picked tokens. kl_cov: -rho A, and kl_coef |log rho| at
    them."""
    log_ratio = log_ratio_of(model.log_probs, rows)
    rho, advantages, picked = ratio_of(model.log_probs, rows), rows["advantages"], rows["picked"]
    if kind == "clip_cov":
        clipped = -(rho * advantages).minimum(rho.clamp(1 - clip, 1 + clip) * advantages)
        value = clipped * (1 - picked)
    else:
        value = -rho * advantages + kl_coef * picked * log_ratio.abs()
    return value, {"policy_loss": value.detach(), "ratio": rho.detach()}


def log_ratio_of(log_probs: Any, rows: Rows) -> Tensor:
    """[T] log rho; 0 where a token does not count, whose log-probs may be anything."""
    ratio: Tensor = (log_probs - rows["old_log_probs"]).where(rows.mask > 0, 0.0)
    return ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def ratio_of(log_probs: Any, rows: Rows) -> Tensor:
    """[T] rho."""
    return log_ratio_of(log_probs, rows).exp()


def over(per_token: Tensor, rows: Rows, average: Literal["tokens", "rows"]) -> Tensor:
    """In the shape of what it is averaged over."""
    return per_token if average == "tokens" else rows.mean_tokens(per_token)
