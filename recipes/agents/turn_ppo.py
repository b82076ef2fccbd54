"""PPO over episodes whose turns have rewards.

The critic sees the whole conversation, and each turn's reward counts from where it falls (as in RAGEN, Wang et al.
2025, arXiv 2504.20073, with advantages of tokens rather than turns).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.agents._episodes import Constraints
from rlhf_dist.algorithms import ppo_clip, value_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import EpisodeLimits
from rlhf_dist.environments.higher_lower import HigherLower
from rlhf_dist.roles import Actor, Critic, Prompts
from rlhf_dist.transforms import gae, whiten

PAPERS = {
    "turn_ppo": Paper(
        title="PPO on rewards of turns",
        year=2025,
        arxiv="2504.20073",
        status="outline",
        needs=("TURN", "ROLL", "CRIT", "ADV"),
        assumed="RAGEN's setting with advantages of tokens, and a game of guesses",
    ),
    "corgi": Paper(
        title="CORGI: improvement over attempts with a critique",
        year=2024,
        arxiv="2411.01483",
        rows=(173,),
        status="outline",
        needs=("TURN", "ROLL", "VER", "CRIT"),
        settings={"algorithm.game": "constraints", "algorithm.guesses": 3},
        assumed="four constraints on a text in place of its tasks; every attempt is rewarded; 3 attempts",
    ),
    "lmrl_gym": Paper(
        title="LMRL-Gym: online PPO",
        year=2023,
        arxiv="2311.18232",
        rows=(176,),
        status="study",
        needs=("TURN", "ROLL", "CRIT", "MIX", "EVAL"),
        settings={"algorithm.most": 31, "algorithm.guesses": 6, "algorithm.gamma": 0.99},
        assumed="a guessing game in place of its eight tasks; what it compares besides are sft (BC), rejection "
        "(filtered BC) and imagined_dialogues (value-based, and returns)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TurnPPO:
    """Settings of PPO on a game of guesses."""

    game: Literal["guesses", "constraints"] = "guesses"
    """Find a number; or write a text that meets constraints, told which it does not."""
    samples_per_prompt: int = 4
    """Episodes of each prompt."""
    most: int = 15
    """Largest number to be guessed."""
    guesses: int = 4
    """Turns of an episode, guesses or attempts."""
    seconds: float = 60.0
    """Longest that an episode may take."""
    gamma: float = 1.0
    """Discount of a token."""
    lam: float = 0.95
    """GAE's weight of longer returns."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    value_clip: float = 0.2
    """A value may move this far from what it was."""
    mini_batches: int = 1
    """Optimizer steps in one pass over the batch."""
    epochs: int = 1
    """Passes over the batch."""


@recipe
def turn_ppo(prompts: Prompts, actor: Actor, critic: Critic, cfg: TurnPPO) -> None:
    """PPO with a reward each turn."""
    guesses = HigherLower(most=cfg.most, guesses=cfg.guesses)
    game = guesses if cfg.game == "guesses" else Constraints(attempts=cfg.guesses)
    limits = EpisodeLimits(turns=cfg.guesses, seconds=cfg.seconds)
    batch = actor.run_episodes(prompts, environment=game, n=cfg.samples_per_prompt, limits=limits)
    batch = actor.compute_log_prob(batch)
    batch = critic.compute_values(batch)
    batch = whiten(gae(batch, gamma=cfg.gamma, lam=cfg.lam, dense="alone"))
    cuts = {"mini_batches": cfg.mini_batches, "epochs": cfg.epochs}
    critic.update_critic(batch, loss=value_clip(cfg.value_clip), **cuts)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip), **cuts)
