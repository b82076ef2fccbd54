"""REINFORCE with baselines that need no critic: RLOO (Ahmadian et al. 2024, arXiv 2402.14740) and its relatives.

    L = -A_i log pi(y_i),   A_i = r_i - mean_{j != i} r_j,   r = R - beta log pi(y)/pi_ref(y)

The whole response is one action, without a ratio or a clip; several optimizer steps on a batch, and `clip > 0`, take
PPO's clipped ratio instead. Other advantages: `_advantages.py` has the table. `average` says what the loss is averaged
over: rows with row_divisor 1 is the log-prob of whole responses.
"""

from dataclasses import dataclass
from typing import Literal

from recipes.policy_gradient._advantages import Baseline, response_advantage, with_entropy
from rlhf_dist.algorithms import policy_gradient, ppo_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import drop_equal_groups

NEEDS = ("ROLL", "RM", "REF", "ADV")
TOKENS = {"algorithm.average": "tokens", "algorithm.row_divisor": 0.0}
PAPERS = {
    "reinforce": Paper(title="RLOO", year=2024, arxiv="2402.14740", rows=(17,), needs=NEEDS),
    "reinforce_plus_plus": Paper(
        title="REINFORCE++",
        year=2025,
        arxiv="2501.03262",
        rows=(18,),
        needs=NEEDS,
        settings={
            **TOKENS,
            "algorithm.baseline": "batch",
            "algorithm.clip": 0.2,
            "algorithm.samples_per_prompt": 1,
            "algorithm.kl_coef": 0.01,
        },
        assumed="beta 0.01",
    ),
    "reinforce_plus_plus_baseline": Paper(
        title="REINFORCE++-baseline",
        year=2025,
        arxiv="2501.03262",
        rows=(18,),
        needs=NEEDS,
        settings={**TOKENS, "algorithm.baseline": "group_batch", "algorithm.clip": 0.2, "algorithm.kl_coef": 0.0},
        assumed="its KL term, which is in the loss, is left out",
    ),
    "logic_rl": Paper(
        title="Logic-RL",
        year=2025,
        arxiv="2502.14768",
        rows=(155,),
        needs=("ROLL", "VER", "REF", "ADV"),
        settings={
            **TOKENS,
            "algorithm.baseline": "batch",
            "algorithm.clip": 0.2,
            "algorithm.samples_per_prompt": 8,
            "algorithm.kl_coef": 0.001,
            "reward.function": "recipes.reasoning._rewards:logic_rl",
        },
        assumed="the KL is in the reward instead of the loss, its weight 0.001; the puzzles are given as data",
    ),
    "opo": Paper(
        title="OPO: the optimal baseline, exactly on-policy",
        year=2025,
        arxiv="2505.23585",
        needs=("ROLL", "RM", "ADV"),
        settings={"algorithm.baseline": "length", "algorithm.kl_coef": 0.0},
    ),
    "gpg": Paper(
        title="GPG: group policy gradient",
        year=2025,
        arxiv="2504.02546",
        needs=("ROLL", "VER", "ADV", "FILT"),
        settings={
            **TOKENS,
            "algorithm.baseline": "group_mean",
            "algorithm.kl_coef": 0.0,
            "algorithm.drop_equal": True,
        },
    ),
    "reinforce_rej": Paper(
        title="Reinforce-Rej",
        year=2025,
        arxiv="2504.11343",
        rows=(19,),
        needs=("ROLL", "VER", "FILT", "ADV"),
        settings={
            **TOKENS,
            "algorithm.baseline": "signed",
            "algorithm.kl_coef": 0.0,
            "algorithm.drop_equal": True,
            "algorithm.clip": 0.2,
        },
    ),
    "spo": Paper(
        title="SPO: self-play for a minimax winner",
        year=2024,
        arxiv="2401.04056",
        rows=(98,),
        needs=("ROLL", "PAIRJ", "ADV", "CRIT"),
        settings={"algorithm.baseline": "wins"},
        assumed="one response beats another where its reward is higher; no critic",
    ),
    "pass_at_k": Paper(
        title="Pass@k training",
        year=2025,
        arxiv="2508.10751",
        needs=("ROLL", "VER", "ADV"),
        settings={
            **TOKENS,
            "algorithm.baseline": "pass_at_k",
            "algorithm.k": 2,
            "algorithm.kl_coef": 0.0,
            "algorithm.clip": 0.2,
        },
    ),
    "entropy_shaped": Paper(
        title="Advantages shaped by entropy",
        year=2025,
        arxiv="2506.14758",
        needs=("ROLL", "VER", "ADV"),
        settings={
            **TOKENS,
            "algorithm.baseline": "group",
            "algorithm.kl_coef": 0.0,
            "algorithm.entropy_alpha": 0.4,
            "algorithm.clip": 0.2,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Settings of REINFORCE without a critic."""

    samples_per_prompt: int = 4
    """Responses to each prompt: the group."""
    baseline: Baseline = "loo"
    """The advantage of a response."""
    kl_coef: float = 0.05
    """Penalty on log pi - log pi_ref in the reward; 0 for none, and then no reference is held."""
    k: int = 4
    """Of pass_at_k."""
    entropy_alpha: float = 0.0
    """Share of a token's entropy that is added to its advantage; 0 for none."""
    entropy_kappa: float = 2.0
    """It adds at most this part of the advantage."""
    drop_equal: bool = False
    """Leave out groups whose rewards are all equal."""
    clip: float = 0.0
    """PPO's clipped ratio in place of log pi; 0 for the plain gradient."""
    average: Literal["tokens", "rows", "rows_with_tokens", "groups"] = "rows"
    """What the loss is averaged over."""
    row_divisor: float = 1.0
    """With an average over rows: divide each response's sum by this; 0 for its own length."""
    mini_batches: int = 1
    """Optimizer steps in one pass over the batch; more than 1 need a clip."""


@recipe
def reinforce(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: Reinforce) -> None:
    """RLOO, or REINFORCE with another baseline."""
    if cfg.baseline == "pass_at_k" and not 1 <= cfg.k <= cfg.samples_per_prompt:
        raise ValueError(
            f"algorithm.k must be from 1 to algorithm.samples_per_prompt = {cfg.samples_per_prompt}, got {cfg.k}"
        )
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    if cfg.drop_equal:
        batch = drop_equal_groups(batch)
    if cfg.kl_coef or cfg.clip or cfg.entropy_alpha:
        batch = actor.compute_log_prob(batch)
    if cfg.kl_coef:
        batch = reference.compute_ref_log_prob(batch)
    batch = response_advantage(batch, baseline=cfg.baseline, kl_coef=cfg.kl_coef, k=cfg.k)
    if cfg.entropy_alpha:
        batch = with_entropy(batch, alpha=cfg.entropy_alpha, kappa=cfg.entropy_kappa)
    over = {"average": cfg.average, "row_divisor": cfg.row_divisor}
    loss = ppo_clip(cfg.clip, **over) if cfg.clip else policy_gradient(**over)
    actor.update_actor(batch, loss=loss, mini_batches=cfg.mini_batches)
