"""Clipped policy gradient: PPO and the members of its family that differ in ratio, clip and average.

    rho_t = pi(y_t) / pi_old(y_t)
    L_t   = -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)       Schulman et al. 2017, 1707.06347, eq. 7

    clip_high > clip_low   "clip higher"                                        DAPO, 2503.14476, eq. 10
    dual_clip = c          where A_t < 0:  L_t = min(L_t, -c A_t)               Ye et al. 2020, 1912.09729, eq. 5
    ratio = "sequence"     rho_t = exp(mean over the row of log rho), all t     GSPO, 2507.18071, eq. 7
    "sequence_token"       the same number, but token t's gradient is its own   GSPO-token, eqs. 13, 14
    kl_coef = beta         L_t + beta * KL estimate of (pi, pi_ref)             GRPO, 2402.03300, eqs. 3, 4 (k3)
    kl_cap = c             the estimate is cut to [-c, c] for each token, which then gives no gradient of the KL
    entropy_coef = c       L_t - c * H_t                                        PPO, eq. 9
    correction             w_t L_t for rows of an older policy                  see correction.py

The gradient of k1 in a loss is 0 in expectation: take k2 or k3 there, and k1 in rewards.
Names of the KL metrics: kl.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.kl import LOG_RATIO_LIMIT, KlEstimator, check_kl, kl, named_kl
from rlhf_dist.algorithms.loss import Settings, loss
from rlhf_dist.algorithms.losses.advantage_clip import check_advantage_clip, clipped_advantages
from rlhf_dist.algorithms.losses.average import TokenAverage, averaged, check_average
from rlhf_dist.algorithms.losses.correction import Correction, check_correction, corrected
from rlhf_dist.algorithms.outputs import Output

if TYPE_CHECKING:
    from torch import Tensor

Ratio = Literal["token", "sequence", "sequence_token"]
RATIOS: tuple[str, ...] = ("token", "sequence", "sequence_token")


def _reads(settings: Settings) -> tuple[str, ...]:
    sampled, on_policy = settings["old"] == "sampled", settings["on_policy"]
    old = () if on_policy or sampled else ("old_log_probs",)
    rollout = ("rollout_log_probs",) if on_policy or sampled or settings["correction"] != "none" else ()
    return (*old, *rollout, "advantages", *(("ref_log_probs",) if settings["kl_coef"] else ()))


def _outputs(settings: Settings) -> tuple[Output, ...]:
    return ("log_probs", "entropy") if settings["entropy_coef"] else ("log_probs",)


def _check(clip: float, clip_high: float | None, dual_clip: float, ratio: str, **others: Any) -> None:
    high = clip if clip_high is None else clip_high
    if not 0 < clip <= 1 or high <= 0:
        raise ValueError(f"clip must be in (0, 1] and clip_high > 0, got {clip} and {high}")
    if dual_clip and dual_clip <= 1:
        raise ValueError(f"dual_clip must be > 1, or 0 for none, got {dual_clip}")
    if ratio not in RATIOS:
        raise ValueError(f"ratio must be one of {', '.join(RATIOS)}, got {ratio!r}")
    check_average(others["average"], others["row_divisor"])
    check_correction(others["correction"], others["correction_cap"])
    check_kl(others["kl_estimator"], others["kl_cap"])
    check_advantage_clip(others["advantage_clip"])
    old, on_policy, correction = others["old"], others["on_policy"], others["correction"]
    if old not in ("recomputed", "sampled"):
        raise ValueError(f"old must be 'recomputed' or 'sampled', got {old!r}")
    if old == "sampled" and (on_policy or correction != "none"):
        raise ValueError(
            "old='sampled' puts the sampler below the ratio, so on_policy must be False and correction 'none' (it "
            f"would count twice), got on_policy={on_policy} and {correction!r}"
        )


@loss(reads=_reads, outputs=_outputs, average=lambda settings: settings["average"], check=_check)
def ppo_clip(
    model: ModelOutput,
    rows: Rows,
    clip: float = 0.2,
    *,
    clip_high: float | None = None,
    dual_clip: float = 0.0,
    ratio: Ratio = "token",
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    kl_cap: float = 0.0,
    entropy_coef: float = 0.0,
    advantage_clip: float = 0.0,
    average: TokenAverage = "tokens",
    row_divisor: float = 0.0,
    old: Literal["recomputed", "sampled"] = "recomputed",
    on_policy: bool = False,
    correction: Correction = "none",
    correction_cap: float = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_clip(0.2)` is PPO. Reads old_log_probs and advantages [T], ref_log_probs [T] with kl_coef > 0, and
    rollout_log_probs [T] with a correction or `old="sampled"`.

    clip, clip_high    the ratio is cut at 1 - clip and 1 + clip_high; None: alike on both sides
    dual_clip          largest ratio that counts where the advantage is negative, > 1; 0 for no such bound
    ratio              one ratio per token, or the geometric mean of a row's ratios for all its tokens: with the
                       gradient of that mean, or of each token by itself (the same sum where a row's advantages are one
                       number)
    kl_coef            weight of the KL to the reference in the loss; 0 for none
    kl_estimator       k1, k2, k3 or abs (see kl.py)
    kl_cap             largest KL estimate of a token, nats, in the loss and in the k3 metrics; 0 for none
    entropy_coef       weight of the entropy bonus; 0 for none
    advantage_clip     advantages are cut to +-this; 0 for no bound
    average            tokens, rows, rows_with_tokens or groups (see average.py)
    row_divisor        with an average over rows: a constant to divide each row's sum by; 0 for the row's token count
    old                the policy below the ratio: old_log_probs, which the trainer recomputed, or rollout_log_probs
    on_policy          the batch is used for one update only, so the old policy is the current one: the ratio is 1 with
                       the same gradient and old_log_probs are not read; rollout_log_probs are, to report how far the
                       sampler's are off
    correction         weight of a token by how likely the current policy would have sampled it (see correction.py)
    correction_cap     largest such weight, >= 1
    """
    log_probs, advantages = model.log_probs, clipped_advantages(rows["advantages"], advantage_clip)
    assert log_probs is not None
    old_log_probs = log_probs.detach()
    if not on_policy:
        column = "rollout_log_probs" if old == "sampled" else "old_log_probs"
        old_log_probs = _counted(rows[column], log_probs, rows)
    rho = _ratio(log_probs, old_log_probs, rows, ratio)
    clipped = rho.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    policy_loss = -(rho * advantages).minimum(clipped * advantages)
    if dual_clip:
        policy_loss = policy_loss.minimum((-dual_clip * advantages).where(advantages < 0, policy_loss))

    value: Tensor = policy_loss
    off_policy: dict[str, Tensor] = {}
    if on_policy or correction != "none":
        value, off_policy = corrected(policy_loss, old_log_probs, rows, correction, correction_cap)
    metrics = {
        "policy_loss": value,
        "ratio": rho,
        "clip_fraction": (-clipped * advantages > -rho * advantages).to(rho.dtype),
        **named_kl("old_kl", old_log_probs, log_probs, kl_cap),
        **off_policy,
    }
    if kl_coef:
        ref_log_probs = _counted(rows["ref_log_probs"], log_probs, rows)
        estimate = kl(log_probs, ref_log_probs, kl_estimator, kl_cap)
        value = value + kl_coef * estimate
        metrics |= named_kl("ref_kl", log_probs, ref_log_probs, kl_cap)
        if kl_estimator in ("k2", "abs"):
            metrics[f"ref_kl_{kl_estimator}"] = estimate
    if entropy_coef:
        assert model.entropy is not None
        value = value - entropy_coef * model.entropy
        metrics["entropy"] = model.entropy
    means = {name: averaged(metric.detach(), rows, average, 0.0) for name, metric in metrics.items()}
    return averaged(value, rows, average, row_divisor), means


def _ratio(log_probs: Tensor, old_log_probs: Tensor, rows: Rows, ratio: Ratio) -> Tensor:
    log_ratio = log_probs - old_log_probs
    if ratio != "token":
        mean = rows.mean_tokens(log_ratio)[rows.row_of_token]
        log_ratio = mean if ratio == "sequence" else mean.detach() + log_probs - log_probs.detach()
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _counted(other_log_probs: Tensor, log_probs: Tensor, rows: Rows) -> Tensor:
    """[T] with the policy's own log-probs where tokens do not count: they may hold anything, and must not overflow."""
    return other_log_probs.where(rows.mask > 0, log_probs.detach())
