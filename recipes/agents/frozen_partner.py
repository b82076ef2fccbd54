"""PPO for a policy whose episodes have a frozen language model in them, which does what the reward is for.

    strategist   the policy says strategies, the frozen actor acts           r_t = progress of the action (EPO)
    reflection   the frozen agent tries, reads the reflection, tries again   r = R_2 - R_1             (Retroformer)
    guide        a frozen player acts on what the guide says                 r = its action is what was meant (G4C)

EPO: Liu et al. 2025, arXiv 2502.12486. Retroformer: Yao et al. 2023, arXiv 2308.02151. G4C: Zhou et al. 2022, arXiv
2212.10060. The partner's tokens are text to the policy, in its own tokenizer and settings; it needs no vocabulary in
common.
"""

from dataclasses import dataclass
from typing import Literal

from recipes.agents._advantages import turn_returns
from recipes.agents._episodes import Guide, Reflection, Strategist
from rlhf_dist.algorithms import policy_gradient, ppo_clip, value_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import EpisodeLimits
from rlhf_dist.roles import Actor, Critic, Opponent, Prompts, Reference
from rlhf_dist.transforms import gae, whiten

PAPERS = {
    "frozen_partner": Paper(
        title="Retroformer",
        year=2023,
        arxiv="2308.02151",
        rows=(174,),
        status="outline",
        needs=("TURN", "XLM", "ROLL", "CRIT", "REF"),
        assumed="one retry; likeness to the answer in place of an environment's return; kl_coef and clip of usual PPO",
    ),
    "epo_strategy": Paper(
        title="EPO: explicit policy optimisation",
        year=2025,
        arxiv="2502.12486",
        rows=(172,),
        status="outline",
        needs=("TURN", "XLM", "TOK", "ROLL", "ADV", "SNAP"),
        settings={"algorithm.partner": "strategist", "algorithm.estimator": "reinforce", "algorithm.kl_coef": 0.0},
        assumed="progress towards the answer in place of a process reward model; gamma 1; no self-play",
    ),
    "g4c": Paper(
        title="G4C: guidance with a theory-of-mind reward",
        year=2022,
        arxiv="2212.10060",
        rows=(177,),
        status="outline",
        needs=("XLM", "ROLL", "CRIT", "TURN"),
        settings={"algorithm.partner": "guide"},
        assumed="likeness of the player's action to the intent, 1 where they are equal; clip and kl_coef of usual PPO",
    ),
}


@dataclass(frozen=True, kw_only=True)
class FrozenPartner:
    """Settings of PPO with a frozen model in the episode."""

    partner: Literal["reflection", "strategist", "guide"] = "reflection"
    """What the frozen model does; see the file's beginning."""
    estimator: Literal["ppo", "reinforce"] = "ppo"
    """PPO with a critic; or returns from each turn on, less their mean over the batch, and no critic."""
    samples_per_prompt: int = 4
    """Episodes of each prompt."""
    turn_tokens: int = 64
    """Most tokens of a turn of the policy."""
    frozen_tokens: int | None = 64
    """Most tokens of a turn of the frozen model."""
    seconds: float = 120.0
    """Longest that an episode may take."""
    gamma: float = 1.0
    """Discount: of a token in PPO, of a turn in REINFORCE."""
    lam: float = 0.95
    """GAE's weight of longer returns."""
    kl_coef: float = 0.01
    """Penalty on log pi - log pi_ref."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    mini_batches: int = 1
    """Optimizer steps in one pass over the batch."""


@recipe
def frozen_partner(
    prompts: Prompts, actor: Actor, critic: Critic, reference: Reference, frozen: Opponent, cfg: FrozenPartner
) -> None:
    """PPO, or REINFORCE, on what a frozen model makes of the policy's words."""
    tokens = {"turn_tokens": cfg.turn_tokens, "frozen_tokens": cfg.frozen_tokens}
    environment = {"reflection": Reflection, "strategist": Strategist, "guide": Guide}[cfg.partner](**tokens)
    speakers = {"frozen": frozen, "again": frozen} if cfg.partner == "reflection" else {"frozen": frozen}
    limits = EpisodeLimits(seconds=cfg.seconds)
    batch = actor.run_episodes(
        prompts, environment=environment, n=cfg.samples_per_prompt, limits=limits, speakers=speakers
    )
    if cfg.estimator == "reinforce":
        batch = turn_returns(batch, gamma=cfg.gamma)
        actor.update_actor(batch, loss=policy_gradient(), mini_batches=cfg.mini_batches)
        return
    batch = actor.compute_log_prob(batch)
    if cfg.kl_coef:
        batch = reference.compute_ref_log_prob(batch)
    batch = critic.compute_values(batch)
    batch = whiten(gae(batch, gamma=cfg.gamma, lam=cfg.lam, kl_coef=cfg.kl_coef, dense="alone"))
    critic.update_critic(batch, loss=value_clip(0.2), mini_batches=cfg.mini_batches)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip), mini_batches=cfg.mini_batches)
