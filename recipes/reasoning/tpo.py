"""TPO: test-time preference optimisation (Li et al. 2025, arXiv 2501.12895). Nothing learns.

y_1 ... y_n ~ pi(. | x)
each of T rounds:  best and worst of all so far by the reward model
                   textual loss      what makes the one better than the other
                   textual gradient  what to change
                   n new responses   pi(. | x, best, gradient)
the answer is the best of all
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.parsers import Pattern
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Opponent, Prompts, Reward
from rlhf_dist.transforms import best_of_group

PAPERS = {
    "tpo": Paper(
        title="TPO: test-time preference optimisation",
        year=2025,
        arxiv="2501.12895",
        rows=(196,),
        status="outline",
        needs=("ROLL", "RM", "JUDGE", "BRANCH"),
        assumed="the words of the three questions; 5 responses a round and 2 rounds",
    )
}
LOSS = """\
Question: {question}

Chosen response: {best}

Rejected response: {worst}

What are the strengths of the chosen response, and the weaknesses of the rejected one?"""
GRADIENT = """\
Question: {question}

Response: {best}

Critique: {criticism}

What should be changed about the response to make it better?"""
UPDATE = """\
Question: {question}

Response: {best}

Advice: {advice}

Write a better response. Write nothing else."""


@dataclass(frozen=True, kw_only=True)
class TPO:
    """Settings of TPO."""

    samples_per_prompt: int = 5
    """Responses in each round."""
    rounds: int = 2
    """Rounds of refinement."""
    loss: str = LOSS
    """The question for the textual loss."""
    gradient: str = GRADIENT
    """The question for the textual gradient."""
    update: str = UPDATE
    """The question for new responses."""


@host_op(reads=("rewards", "response", "group_id"), writes=("best", "worst"), rows="drop", scope="groups")
def contrast(batch: Batch) -> HostResult:
    """The best row of each group, with its text and that of the worst; the first of equal ones."""
    keep, worst = list[int](), list[int]()
    for rows in batch.group():
        values = batch["rewards"].values[rows]
        keep.append(int(rows[np.argmax(values)]))
        worst.append(int(rows[np.argmin(values)]))
    order = np.argsort(keep)
    kept, other = np.array(keep, np.int64)[order], np.array(worst, np.int64)[order]
    texts = {"best": batch["response"].take(kept), "worst": batch["response"].take(other)}
    return HostResult(columns=Batch(texts, len(kept)), keep=kept)


@recipe
def tpo(prompts: Prompts, policy: Opponent, reward: Reward, cfg: TPO) -> None:
    """Refinement by textual gradients."""
    prompts = prompts.with_columns_of(prompts, question="prompt")
    batch = reward.compute_reward(policy.generate_sequences(prompts, n=cfg.samples_per_prompt))
    for _ in range(cfg.rounds):
        asked: Batch = contrast(batch)
        for question, name in ((cfg.loss, "criticism"), (cfg.gradient, "advice")):
            said = Pattern(rf"(?P<{name}>.*)")
            asked = policy.generate_sequences(asked, template=Template(question), parser=said)
        new = policy.generate_sequences(asked, template=Template(cfg.update), n=cfg.samples_per_prompt)
        new = new.join(prompts, prompt_ids="prompt_ids", prompt="prompt")
        batch = batch.concat(reward.compute_reward(new))
    best_of_group(batch)
