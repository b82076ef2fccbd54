"""A reward model from preferences (Bradley and Terry 1952; Stiennon et al. 2020, arXiv 2009.01325).

L = -log sigma(r_w - r_l)                               bt
    -log sigma(r_w - r_l - m)                           use_margin: m the pair's margin (Llama 2, 2307.09288)
    -m log sigma(r_w - r_l)                             scaled: m the strength of the preference (HelpSteer2-Preference)
    ... + c (r_w + r_l)^2                               centre_coef: rewards stay around 0 (2312.09244)
"""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import bradley_terry, loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, log_sigmoid
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Preferences, RewardModel

NEEDS = ("RMT",)
PAPERS = {
    "reward_model": Paper(title="Bradley-Terry reward model", year=2020, arxiv="2009.01325", needs=NEEDS),
    "margin": Paper(
        title="Reward model with a margin (Llama 2)",
        year=2023,
        arxiv="2307.09288",
        needs=NEEDS,
        settings={"algorithm.use_margin": True},
    ),
    "scaled": Paper(
        title="HelpSteer2-Preference: scaled Bradley-Terry",
        year=2024,
        arxiv="2410.01257",
        rows=(106,),
        needs=("RMT", "EVAL", "SNAP"),
        settings={"algorithm.kind": "scaled"},
        assumed="a start from a regression model is reward.model.path; no extrapolation of weights",
    ),
    "centred": Paper(
        title="Helping or Herding: rewards around 0",
        year=2023,
        arxiv="2312.09244",
        rows=(102,),
        needs=("MRM", "RMT", "SHAPE", "ROLL", "EVAL"),
        settings={"algorithm.centre_coef": 0.01},
        assumed="eta 0.01, as TRL has it",
    ),
    "context_aware": Paper(
        title="Context-aware preference modelling",
        year=2024,
        arxiv="2407.14916",
        rows=(115,),
        needs=("RMT", "ALT", "EVAL"),
        assumed="only the pairs differ: the criterion stands in each prompt",
    ),
}


@dataclass(frozen=True, kw_only=True)
class RewardModeling:
    """Settings of reward modelling."""

    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""
    kind: Literal["bt", "scaled"] = "bt"
    """The likelihood of a pair, or that times the pair's margin."""
    centre_coef: float = 0.0
    """Weight of (r_w + r_l)^2; 0 for none."""
    use_margin: bool = False
    """Ask for a gap of at least the pair's margin (Llama 2)."""


@loss(reads=("label", "margin"), outputs=("scores",), average="groups")
def scaled_bradley_terry(model, rows):
    """-m log sigma(r_w - r_l)."""
    chosen, rejected = chosen_and_rejected(model.scores, rows)
    strength, _ = chosen_and_rejected(rows["margin"], rows)
    value = -strength * log_sigmoid(chosen - rejected)
    return value, {"accuracy": (chosen > rejected).float(), "margin": (chosen - rejected).detach()}


@recipe
def reward_model(pairs: Preferences, reward: RewardModel, cfg: RewardModeling) -> None:
    """Reward model on labelled pairs."""
    plain = bradley_terry(use_margin=cfg.use_margin, centre_coef=cfg.centre_coef)
    loss_of = plain if cfg.kind == "bt" else scaled_bradley_terry()
    reward.update_reward_model(pairs, loss=loss_of, mini_batches=cfg.mini_batches)
