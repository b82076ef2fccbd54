"""PPO with a KL coefficient that follows the KL (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

e = clip(KL(pi, pi_ref) / target - 1, -0.2, 0.2)          KL in nats a response, of the step's own samples
coef <- coef (1 + 0.1 e)
"""

from dataclasses import dataclass

from recipes.policy_gradient._critic import WithCritic, learn_from_log_probs
from rlhf_dist.algorithms.kl import adapted_kl_coef
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward, State, state_op

PAPERS = {
    "adaptive_kl": Paper(
        title="PPO with an adaptive KL coefficient",
        year=2019,
        arxiv="1909.08593",
        needs=("ROLL", "RM", "REF", "CRIT", "STATE"),
    )
}


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(WithCritic):
    """Settings of PPO with an adaptive KL coefficient."""

    kl_coef: float = 0.2
    """The coefficient at the start."""
    target: float = 6.0
    """The KL to come to, nats a response."""
    gain: float = 0.1
    """How fast the coefficient follows."""


class KlCoefficient(State):
    """The coefficient, in proportional control of the logarithm."""

    def initial(self, cfg: AdaptiveKL) -> dict[str, float]:
        return {"coef": cfg.kl_coef}

    @state_op(reads=("old_log_probs", "ref_log_probs", "response_mask"))
    def follow(
        self, numbers: dict[str, float], batch: Batch, *, target: float, gain: float
    ) -> tuple[dict[str, float], Metrics]:
        """Raise it while the KL is over the target, lower it while it is under."""
        gap = batch["old_log_probs"].values - batch["ref_log_probs"].values
        kl = float(gap[batch["response_mask"].values > 0].sum(dtype="float64")) / max(batch.num_rows, 1)
        coef = adapted_kl_coef(numbers["coef"], kl, target=target, gain=gain)
        return {"coef": coef}, {"kl": Mean(kl), "coef": Mean(coef)}


@recipe
def adaptive_kl(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    reward: Reward,
    coefficient: KlCoefficient,
    cfg: AdaptiveKL,
) -> None:
    """PPO under a price on the KL that keeps it near a target."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = reference.compute_ref_log_prob(actor.compute_log_prob(batch))
    learn_from_log_probs(batch, actor, critic, cfg, kl_coef=coefficient.value("coef"))
    coefficient.follow(batch, target=cfg.target, gain=cfg.gain)
