"""Safe RLHF (Dai et al. 2023, arXiv 2310.12773): a reward, a cost, and a multiplier that learns.

    r_t = r 1[t = T] - beta log pi/pi_ref(y_t)          c_t = c 1[t = T] + beta log pi/pi_ref(y_t)
    A = (A_r - lambda A_c) / (1 + lambda)               ln lambda grows by lr lambda (mean c - limit)

Leaving the reference lowers the reward and raises the cost, so that its price in A is beta whatever lambda is.
"""

from dataclasses import dataclass
from math import exp, log

from recipes.policy_gradient._critic import WithCritic
from rlhf_dist.algorithms import ppo_clip, updated_log_multiplier, value_clip
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward, State, state_op
from rlhf_dist.transforms import gae, lagrangian_advantage, whiten

PAPERS = {
    "hc_rlhf": Paper(
        title="HC-RLHF: a pessimistic cost",
        year=2025,
        arxiv="2506.08266",
        rows=(146,),
        status="outline",
        needs=("RM", "MRM", "STATE", "ROLL", "REF", "CRIT", "EVAL", "BRANCH"),
        settings={"algorithm.pessimism": 1.645},
        assumed="the bound of a normal distribution, of a step's costs; no final test on held-out prompts",
    ),
    "safe_rlhf": Paper(
        title="Safe RLHF",
        year=2023,
        arxiv="2310.12773",
        needs=("RM", "MRM", "STATE", "ROLL", "REF", "CRIT"),
        assumed="the mean cost is a step's, not one of several; no likelihood of given responses (ptx) beside PPO",
    ),
}


@dataclass(frozen=True, kw_only=True)
class SafeRLHF(WithCritic):
    """Settings of Safe RLHF."""

    cost_limit: float = 0.0
    """The mean cost to stay under."""
    pessimism: float = 0.0
    """Standard errors that are added to the mean cost before it is held against the limit (HC-RLHF); 0 for the mean."""
    multiplier: float = 1.0
    """The multiplier at the start."""
    multiplier_lr: float = 0.1
    """Step size of its logarithm."""
    kl_coef: float = 0.02
    """Penalty on log pi - log pi_ref, taken off the reward and added to the cost."""


class Lagrange(State):
    """The multiplier of the cost constraint."""

    def initial(self, cfg: SafeRLHF) -> dict[str, float]:
        return {"multiplier": cfg.multiplier}

    @state_op(reads=("costs",))
    def update(
        self, numbers: dict[str, float], batch: Batch, *, limit: float, lr: float, pessimism: float = 0.0
    ) -> tuple[dict[str, float], Metrics]:
        """Raise the multiplier while the mean cost is over the limit, lower it while it is under."""
        costs = batch["costs"].values.astype("float64")
        error = costs.std(ddof=1) / len(costs) ** 0.5 if len(costs) > 1 else 0.0
        cost = float(costs.mean() + pessimism * error)
        multiplier = exp(updated_log_multiplier(log(numbers["multiplier"]), cost, limit=limit, lr=lr))
        return {"multiplier": multiplier}, {"cost": Mean(cost), "multiplier": Mean(multiplier)}


@recipe
def safe_rlhf(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    cost_critic: Critic,
    reference: Reference,
    reward: Reward,
    cost: Reward,
    lagrange: Lagrange,
    cfg: SafeRLHF,
) -> None:
    """PPO on a reward under a constraint on a cost."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = actor.compute_log_prob(batch)
    batch = reference.compute_ref_log_prob(batch)
    batch = reward.compute_reward(batch)
    batch = cost.compute_reward(batch, out="costs")
    batch = critic.compute_values(batch)
    batch = cost_critic.compute_values(batch, out="cost_values")

    estimate = {"gamma": cfg.gamma, "lam": cfg.lam}
    batch = gae(batch, kl_coef=cfg.kl_coef, **estimate)
    costs = gae(batch.rename(rewards="costs", values="cost_values"), kl_coef=-cfg.kl_coef, **estimate)
    lagrange.update(batch, limit=cfg.cost_limit, lr=cfg.multiplier_lr, pessimism=cfg.pessimism)
    batch = batch.with_columns_of(costs, cost_advantages="advantages")
    batch = whiten(lagrangian_advantage(batch, lam=lagrange.value("multiplier")))

    critic.update_critic(batch, loss=value_clip(cfg.value_clip), mini_batches=cfg.mini_batches)
    cost_critic.update_critic(costs, loss=value_clip(cfg.value_clip), mini_batches=cfg.mini_batches)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip), mini_batches=cfg.mini_batches)
