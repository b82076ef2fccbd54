"""Regularised relevance (R3; Kim and Seo 2024, arXiv 2402.03469): a reward without preferences.

    open question     r = relevance(x, y) * min(length(y) / longest, 1) * (1 - repeated(y))
    closed question   r = relevance(reference answer, y) * (1 - repeated(y))             no reward for length

PPO. relevance is the score of the role `retriever` (`words_in_common` of this file is the smallest). repeated is the
share of a response's three-word sequences that it has said before. Rows have `open`: 1 for an open question.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import follows, recipe
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward
from rlhf_dist.transforms.columns import mean_of

PAPERS = {
    "relevance": Paper(
        title="R3: regularised relevance reward",
        year=2024,
        arxiv="2402.03469",
        rows=(132,),
        status="outline",
        needs=("MRM", "SHAPE", "ROLL", "CRIT"),
        assumed="the three terms are multiplied; the length counts up to the token limit; sequences of three words; "
        "words in common stand for a retriever",
    )
}


@dataclass(frozen=True, kw_only=True)
class Relevance(WithCritic):
    """Settings of PPO on regularised relevance."""

    longest: int = follows("actor.rollout.max_response_tokens")
    """Tokens from which on an open question's answer is worth no more."""


class Asked(Prompts):
    """Prompts that say whether they are open questions."""

    fields = {"open": "float32"}


def words_in_common(prompt: str, response: str, answer: str) -> float:
    """Cosine of two bags of words: the response's, and those of the answer, or of the prompt where there is none."""
    wanted, said = (Counter(re.findall(r"\w+", text.lower())) for text in (answer or prompt, response))
    both = sum(wanted[word] * said[word] for word in wanted)
    size = sum(n * n for n in wanted.values()) * sum(n * n for n in said.values())
    return both / size**0.5 if size else 0.0


def repeated(text: str) -> float:
    """Share of a text's three-word sequences that came before; 0 for a text of less."""
    words = text.split()
    found = [tuple(words[at : at + 3]) for at in range(len(words) - 2)]
    return 1 - len(set(found)) / len(found) if found else 0.0


@host_op(reads=("rewards", "open", "response", "response_mask"), writes=("rewards",), missing=True)
def regularised(batch: Batch, *, longest: int) -> HostResult:
    """Relevance with the terms of the question's type; missing where the relevance is."""
    long = np.minimum(batch["response_mask"].lengths / longest, 1.0)
    said_before = np.array([repeated(text) for text in batch["response"].rows()])
    factor = np.where(batch["open"].values > 0, long, 1.0) * (1 - said_before)
    rewards = batch["rewards"].values * factor.astype(np.float32)
    metrics = {"repeated": mean_of(said_before), "length_term": mean_of(long)}
    return HostResult(columns=Batch({"rewards": Column(rewards)}, batch.num_rows), metrics=metrics)


@recipe
def relevance(
    prompts: Asked, actor: Actor, critic: Critic, reference: Reference, retriever: Reward, cfg: Relevance
) -> None:
    """PPO on relevance, length and repetition."""
    batch = retriever.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    learn_with_critic(regularised(batch, longest=cfg.longest), actor, critic, reference, cfg)
