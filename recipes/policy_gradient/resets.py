"""DR-PO: dataset reset (Chang et al. 2024, arXiv 2404.08495): rollouts that begin in the middle of a good response.

    with probability b:   y_<t of a preferred response, t at random, then y_>=t ~ pi          PPO on what is generated
    else:                 y ~ pi from the prompt

What was given is part of the prompt, so it has no loss and no penalty. `prefixes=guide` takes the beginnings of a
guide's responses instead (RLGF's PPO++, Chang et al. 2023, arXiv 2306.11816). The reward should be a model, which
reads prompt and response as one; a rule sees only the text that was generated.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Critic, Examples, Opponent, Reference, Reward

PAPERS = {
    "resets": Paper(
        title="DR-PO: dataset reset policy optimisation",
        year=2024,
        arxiv="2404.08495",
        rows=(24,),
        needs=("ROLL", "RM", "CRIT", "PFX", "MIX"),
        assumed="b 0.5; cuts evenly over the response's tokens",
    ),
    "guide": Paper(
        title="RLGF: PPO++ with roll-ins of a guide",
        year=2023,
        arxiv="2306.11816",
        rows=(38,),
        status="outline",
        needs=("ROLL", "XLM", "PFX", "CRIT", "SFT"),
        settings={"algorithm.prefixes": "guide"},
        assumed="b 0.5; PPO++ alone: the guide does not complete responses (AggreVaTeD, LOLS, D2LOLS)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Resets(WithCritic):
    """Settings of PPO with resets."""

    prefixes: Literal["data", "guide"] = "data"
    """Whose responses' beginnings a rollout may start from."""
    share: float = 0.5
    """b: of the prompts that get one."""


@host_op(reads=("prompt_ids", "response_ids"), writes=("prompt_ids",), scope="batch")
def with_beginnings(batch: Batch, *, share: float, rng: np.random.Generator) -> HostResult:
    """Prompts, a `share` of them with the first t tokens of the response, 0 < t < its length."""
    prompts, tokens, cut = [], 0, 0
    for row in range(batch.num_rows):
        prompt, said = batch["prompt_ids"].row(row), batch["response_ids"].row(row)
        if len(said) > 1 and rng.random() < share:
            at = int(rng.integers(1, len(said)))
            prompt, tokens, cut = np.concatenate([prompt, said[:at]]), tokens + at, cut + 1
        prompts.append(prompt)
    metrics = {"reset_share": Mean(float(cut), batch.num_rows), "prefix_tokens": Mean(float(tokens), float(cut or 1))}
    return HostResult(columns=Batch({"prompt_ids": Column.ragged(prompts, dtype="int32")}), metrics=metrics)


@recipe
def resets(
    examples: Examples,
    actor: Actor,
    critic: Critic,
    guide: Opponent,
    reference: Reference,
    reward: Reward,
    cfg: Resets,
) -> None:
    """PPO from where somebody else began."""
    begun = guide.generate_sequences(examples) if cfg.prefixes == "guide" else examples
    batch = actor.generate_sequences(with_beginnings(begun, share=cfg.share), n=cfg.samples_per_prompt)
    learn_with_critic(reward.compute_reward(batch), actor, critic, reference, cfg)
