"""Several reward models against overoptimisation (Coste et al. 2023, arXiv 2310.02743).

mean   r = mean_i r_i          wco   r = min_i r_i          uwo   r = mean_i r_i - lambda var_i r_i
median, mean_std (mean - lambda std): Helping or Herding (Eisenstein et al. 2023, arXiv 2312.09244)
nominal_worst   r = lambda r_1 + (1 - lambda) min_i r_i: reward-robust RLHF (Yan et al. 2024, arXiv 2409.15360)
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.algorithms.shaping import Combine
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import combine_rewards, grpo_advantage

SCORES = ("score_1", "score_2", "score_3")
PAPERS = {
    "reward_ensemble": Paper(
        title="Reward model ensembles mitigate overoptimisation: UWO",
        year=2023,
        arxiv="2310.02743",
        rows=(101,),
        needs=("MRM", "SHAPE", "ROLL", "CRIT"),
        assumed="three models; GRPO in place of PPO",
    ),
    "wco": Paper(
        title="Worst-case optimisation (WCO)",
        year=2023,
        arxiv="2310.02743",
        rows=(101,),
        needs=("MRM", "SHAPE", "ROLL", "CRIT"),
        settings={"algorithm.combine": "wco"},
        assumed="three models; GRPO in place of PPO",
    ),
    "median": Paper(
        title="Helping or Herding: the median of models of other pretraining seeds",
        year=2023,
        arxiv="2312.09244",
        rows=(102,),
        needs=("MRM", "RMT", "SHAPE", "ROLL", "EVAL"),
        settings={"algorithm.combine": "median"},
        assumed="three models, each trained by reward_model/centred; GRPO in place of PPO",
    ),
    "mean_std": Paper(
        title="Helping or Herding: mean less standard deviation",
        year=2023,
        arxiv="2312.09244",
        rows=(102,),
        needs=("MRM", "RMT", "SHAPE", "ROLL", "EVAL"),
        settings={"algorithm.combine": "mean_std", "algorithm.variance_coef": 1.0},
        assumed="three models; GRPO in place of PPO",
    ),
    "nominal_worst": Paper(
        title="Reward-robust RLHF: nominal and worst case",
        year=2024,
        arxiv="2409.15360",
        rows=(103,),
        status="outline",
        needs=("MRM", "RMT", "SHAPE", "ROLL", "CRIT", "HID"),
        settings={"algorithm.combine": "nominal_worst", "algorithm.variance_coef": 0.6},
        assumed=(
            "models of their own in place of heads with mean and deviation; the first is the nominal one; lambda 0.6"
        ),
    ),
    "rluf": Paper(
        title="RLUF: weighted sum of several rewards",
        year=2025,
        arxiv="2505.14946",
        rows=(120,),
        needs=("RMT", "MRM", "ROLL", "ADV"),
        settings={"algorithm.combine": "weighted"},
        assumed="the weights; P[Love] is trained by reward_models/binary_reward_model",
    ),
    "multi_objective_grpo": Paper(
        title="Multi-objective GRPO",
        year=2025,
        arxiv="2503.21819",
        rows=(148,),
        needs=("RMT", "MRM", "ROLL", "ADV"),
        settings={"algorithm.combine": "weighted", "algorithm.kl_coef": 0.0},
        assumed="the weights; a model for each objective in place of one with several labels",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Settings of a policy under three reward models."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    combine: Combine = "uwo"
    """What becomes of a response's scores."""
    variance_coef: float = 0.1
    """lambda of uwo, mean_std and nominal_worst."""
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of weighted: a factor for each model."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    kl_coef: float = 0.02
    """Penalty on log pi - log pi_ref in the reward."""


@recipe
def reward_ensemble(
    prompts: Prompts, actor: Actor, reference: Reference, first: Reward, second: Reward, third: Reward, cfg: Ensemble
) -> None:
    """GRPO on what three reward models agree on."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = reference.compute_ref_log_prob(actor.compute_log_prob(batch))
    for model, name in zip((first, second, third), SCORES, strict=True):
        batch = model.compute_reward(batch, out=name)
    batch = combine_rewards(batch, scores=SCORES, how=cfg.combine, coef=cfg.variance_coef, weights=cfg.weights)
    batch = grpo_advantage(batch, kl_coef=cfg.kl_coef)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip, on_policy=True))
