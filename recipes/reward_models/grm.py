"""A reward model that stays a language model (GRM, Yang et al. 2024, arXiv 2406.10216): two losses on one trunk.

L = -log sigma(r(chosen) - r(rejected)) - a log pi(chosen) / |chosen|          r: a head at the last token
"""

from dataclasses import dataclass
from typing import Protocol

from rlhf_dist.algorithms import Head, loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences


@dataclass(frozen=True, kw_only=True)
class GRM:
    """Settings of a generative reward model."""

    lm_coef: float = 0.01
    """Weight of the chosen response's likelihood."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


class GenerativeRewardModel(Actor, Protocol):
    """A language model that scores what it has read."""

    heads = (Head(name="reward", at="last_token"),)


@loss(reads=("label",), outputs=("log_probs", "heads.reward"), average="groups")
def generative_reward(model, rows, lm_coef: float = 0.01):
    """Bradley-Terry on the head, and the likelihood of the chosen response."""
    chosen, rejected = chosen_and_rejected(model.heads["reward"], rows)
    likelihood, _ = chosen_and_rejected(rows.mean_tokens(model.log_probs), rows)
    metrics = {"accuracy": (chosen > rejected).float(), "margin": (chosen - rejected).detach()}
    value = (rejected - chosen).logaddexp(0.0 * chosen) - lm_coef * likelihood
    return value, metrics | {"lm": likelihood.detach()}


@recipe
def grm(pairs: Preferences, judge: GenerativeRewardModel, cfg: GRM) -> None:
    """A generative reward model on labelled pairs."""
    judge.update_actor(pairs, loss=generative_reward(cfg.lm_coef), mini_batches=cfg.mini_batches)
