"""GRM: a reward model that stays a language model (Yang et al. 2024, arXiv 2406.10216).

    L = (1 - alpha) L_reward + alpha L_SFT          one trunk, a reward head at the last token and the LM head

L_reward is Bradley and Terry's on the pair, L_SFT the likelihood of the chosen response (the paper's GRM-SFT).
"""

from dataclasses import dataclass
from typing import Protocol

from rlhf_dist.algorithms import Head, loss
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences


@dataclass(frozen=True, kw_only=True)
class GRM:
    """Settings of GRM."""

    alpha: float = 0.01
    """Share of the language model's loss."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


class Generative(Actor, Protocol):
    """A language model with a reward head."""

    heads = (Head(name="reward", at="last_token"),)


@loss(reads=("label",), outputs=("log_probs", "heads.reward"), average="groups")
def generative_reward(model, rows, alpha: float = 0.01):
    """Both losses of a pair."""
    from torch.nn.functional import logsigmoid

    gap = rows.sum_groups(rows["label"] * model.heads["reward"])
    likelihood = rows.sum_groups((rows["label"] > 0) * rows.mean_tokens(model.log_probs))
    metrics = {"accuracy": (gap > 0).float(), "margin": gap.detach(), "chosen_nll": -likelihood.detach()}
    return -(1 - alpha) * logsigmoid(gap) - alpha * likelihood, metrics


@recipe
def grm(pairs: Preferences, judge: Generative, cfg: GRM) -> None:
    """Preferences for the head, the chosen responses for the trunk."""
    judge.update_actor(pairs, loss=generative_reward(cfg.alpha), mini_batches=cfg.mini_batches)
