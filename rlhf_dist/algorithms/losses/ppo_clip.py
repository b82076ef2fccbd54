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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_dist.algorithms.contract import ModelOutput, Output, Rows
from rlhf_dist.algorithms.kl import LOG_RATIO_LIMIT, KlEstimator, check_kl, kl, named_kl
from rlhf_dist.algorithms.losses.advantage_clip import check_advantage_clip, clipped_advantages
from rlhf_dist.algorithms.losses.average import TokenAverage, averaged, check_average
from rlhf_dist.algorithms.losses.correction import Correction, check_correction, corrected

if TYPE_CHECKING:
    from torch import Tensor

Ratio = Literal["token", "sequence", "sequence_token"]
RATIOS: tuple[str, ...] = ("token", "sequence", "sequence_token")


@dataclass(frozen=True, kw_only=True)
class PpoClip:
    """Reads old_log_probs and advantages [T], ref_log_probs [T] with kl_coef > 0, and rollout_log_probs [T] with a
    correction or `old="sampled"`."""

    clip_low: float = 0.2
    """The ratio is cut at 1 - clip_low from below."""
    clip_high: float = 0.2
    """The ratio is cut at 1 + clip_high from above."""
    dual_clip: float = 0.0
    """Largest ratio that counts where the advantage is negative, > 1; 0 for no such bound."""
    ratio: Ratio = "token"
    """One ratio per token, or the geometric mean of a row's ratios for all its tokens: with the gradient of that mean,
    or of each token by itself (the same sum where a row's advantages are one number)."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference in the loss; 0 for none."""
    kl_estimator: KlEstimator = "k3"
    """k1, k2, k3 or abs (see kl.py)."""
    kl_cap: float = 0.0
    """Largest KL estimate of a token, nats, in the loss and in the k3 metrics; 0 for none (no token loses gradient)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 for none."""
    advantage_clip: float = 0.0
    """Advantages are cut to +-this; 0 for no bound."""
    average: TokenAverage = "tokens"
    """tokens, rows, rows_with_tokens or groups (see average.py)."""
    row_divisor: float = 0.0
    """With an average over rows: a constant to divide each row's sum by; 0 for the row's own token count."""
    old: Literal["recomputed", "sampled"] = "recomputed"
    """The policy below the ratio: old_log_probs, which the trainer recomputed, or rollout_log_probs as sampled."""
    on_policy: bool = False
    """The batch is used for one update only, so the old policy is the current one: the ratio is 1 with the same
    gradient and old_log_probs are not read. rollout_log_probs are, to report how far the sampler's are off."""
    correction: Correction = "none"
    """Weight of a token by how likely the current policy would have sampled it (see correction.py)."""
    correction_cap: float = 2.0
    """Largest such weight, >= 1."""

    def __post_init__(self) -> None:
        if not 0 < self.clip_low <= 1 or self.clip_high <= 0:
            raise ValueError(f"clip_low must be in (0, 1] and clip_high > 0, got {self.clip_low} and {self.clip_high}")
        if self.dual_clip and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be > 1, or 0 for none, got {self.dual_clip}")
        if self.ratio not in RATIOS:
            raise ValueError(f"ratio must be one of {', '.join(RATIOS)}, got {self.ratio!r}")
        check_average(self.average, self.row_divisor)
        check_correction(self.correction, self.correction_cap)
        check_kl(self.kl_estimator, self.kl_cap)
        check_advantage_clip(self.advantage_clip)
        if self.old not in ("recomputed", "sampled"):
            raise ValueError(f"old must be 'recomputed' or 'sampled', got {self.old!r}")
        if self.old == "sampled" and (self.on_policy or self.correction != "none"):
            raise ValueError(
                "old='sampled' puts the sampler below the ratio, so on_policy must be False and correction 'none' (it "
                f"would count twice), got on_policy={self.on_policy} and {self.correction!r}"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        sampled = self.old == "sampled"
        old = () if self.on_policy or sampled else ("old_log_probs",)
        rollout = ("rollout_log_probs",) if self.on_policy or sampled or self.correction != "none" else ()
        return (*old, *rollout, "advantages", *(("ref_log_probs",) if self.kl_coef else ()))

    @property
    def outputs(self) -> tuple[Output, ...]:
        return ("log_probs", "entropy") if self.entropy_coef else ("log_probs",)

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        assert model.log_probs is not None, "ppo_clip asked for log_probs"
        log_probs, advantages = model.log_probs, clipped_advantages(rows["advantages"], self.advantage_clip)
        old_log_probs = self._old_log_probs(log_probs, rows)
        ratio = self._ratio(log_probs, old_log_probs, rows)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        policy_loss = -(ratio * advantages).minimum(clipped * advantages)
        if self.dual_clip:
            policy_loss = policy_loss.minimum((-self.dual_clip * advantages).where(advantages < 0, policy_loss))

        loss: Tensor = policy_loss
        off_policy: dict[str, Tensor] = {}
        if self.on_policy or self.correction != "none":
            loss, off_policy = corrected(policy_loss, old_log_probs, rows, self.correction, self.correction_cap)
        metrics = {
            "policy_loss": loss,
            "ratio": ratio,
            "clip_fraction": (-clipped * advantages > -ratio * advantages).to(ratio.dtype),
            **named_kl("old_kl", old_log_probs, log_probs, self.kl_cap),
            **off_policy,
        }
        if self.kl_coef:
            ref_log_probs = _counted(rows["ref_log_probs"], log_probs, rows)
            estimate = kl(log_probs, ref_log_probs, self.kl_estimator, self.kl_cap)
            loss = loss + self.kl_coef * estimate
            metrics |= named_kl("ref_kl", log_probs, ref_log_probs, self.kl_cap)
            if self.kl_estimator in ("k2", "abs"):
                metrics[f"ref_kl_{self.kl_estimator}"] = estimate
        if self.entropy_coef:
            assert model.entropy is not None, "ppo_clip asked for entropy"
            loss = loss - self.entropy_coef * model.entropy
            metrics["entropy"] = model.entropy
        means = {name: averaged(value.detach(), rows, self.average, 0.0) for name, value in metrics.items()}
        return averaged(loss, rows, self.average, self.row_divisor), means

    def _old_log_probs(self, log_probs: Tensor, rows: Rows) -> Tensor:
        if self.on_policy:
            return log_probs.detach()
        return _counted(rows["rollout_log_probs" if self.old == "sampled" else "old_log_probs"], log_probs, rows)

    def _ratio(self, log_probs: Tensor, old_log_probs: Tensor, rows: Rows) -> Tensor:
        log_ratio = log_probs - old_log_probs
        if self.ratio != "token":
            mean = rows.mean_tokens(log_ratio)[rows.row_of_token]
            log_ratio = mean if self.ratio == "sequence" else mean.detach() + log_probs - log_probs.detach()
        return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _counted(other_log_probs: Tensor, log_probs: Tensor, rows: Rows) -> Tensor:
    """[T] with the policy's own log-probs where tokens do not count: they may hold anything, and must not overflow."""
    return other_log_probs.where(rows.mask > 0, log_probs.detach())


def ppo_clip(
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
) -> PpoClip:
    """`ppo_clip(0.2)` is PPO; `clip_high=None` clips alike on both sides."""
    return PpoClip(
        clip_low=clip,
        clip_high=clip if clip_high is None else clip_high,
        dual_clip=dual_clip,
        ratio=ratio,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_cap=kl_cap,
        entropy_coef=entropy_coef,
        advantage_clip=advantage_clip,
        average=average,
        row_divisor=row_divisor,
        old=old,
        on_policy=on_policy,
        correction=correction,
        correction_cap=correction_cap,
    )
