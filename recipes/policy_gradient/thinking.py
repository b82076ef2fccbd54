"""RLMT: model-rewarded thinking (Bhaskar et al. 2025, arXiv 2509.20357): thoughts are written, answers are judged.

    y = thought, end of thought, answer          r = reward model(x, answer);  GRPO, or DPO on the best and the worst

A reward model sees the part after the end of thought only; a response without one has an empty answer. The end is said
twice: as text for rules, as token ids for models (`rlhf-dist data` shows a tokenizer's).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.algorithms import dpo, ppo_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import grpo_advantage, keep_best_and_worst, mean_of_children

PAPERS = {
    "thinking": Paper(
        title="RLMT: RL with model-rewarded thinking",
        year=2025,
        arxiv="2509.20357",
        rows=(13,),
        needs=("ROLL", "RM", "REF", "CRIT", "ADV", "PAIR", "PREF"),
        assumed="8 responses, KL 0.001; an empty answer where no thought ends",
    ),
    "dpo": Paper(
        title="RLMT with online DPO",
        year=2025,
        arxiv="2509.20357",
        rows=(13,),
        needs=("ROLL", "RM", "REF", "CRIT", "ADV", "PAIR", "PREF"),
        settings={"algorithm.learner": "dpo"},
        assumed="as thinking",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """Settings of model-rewarded thinking."""

    end: str = "</think>"
    """The text that ends a thought."""
    end_ids: tuple[int, ...] = ()
    """Its token ids, for reward models; none: a rule is the reward, and reads the text."""
    learner: Literal["grpo", "dpo"] = "grpo"
    """GRPO, or DPO on the best and the worst."""
    samples_per_prompt: int = 8
    """Responses to each prompt."""
    kl_coef: float = 0.001
    """GRPO's weight of the KL estimate in the loss."""
    beta: float = 0.1
    """DPO's strength of the pull towards the reference."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


@host_op(reads=("response_ids", "response"), writes=("response_ids", "response_mask", "response"), rows="derive")
def answers_alone(batch: Batch, *, end: str, end_ids: tuple[int, ...]) -> HostResult:
    """A row for each response, with what follows the last end of a thought."""
    texts, ids, ended = [], [], 0
    for row in range(batch.num_rows):
        _, found, after = batch["response"].row(row).rpartition(end)
        said = batch["response_ids"].row(row)
        texts.append(after if found else "")
        ended += bool(found)
        at = [k for k in range(len(said) - len(end_ids) + 1) if tuple(said[k : k + len(end_ids)]) == end_ids]
        ids.append(said[at[-1] + len(end_ids) :] if end_ids and at else said[len(said) :] if end_ids else said)
    tokens = Column.ragged(ids, dtype="int32")
    columns = {
        "response_ids": tokens,
        "response_mask": Column(np.ones(len(tokens.values), np.uint8), tokens.offsets),
        "response": Column.strings(texts),
    }
    metrics = {"thoughts_ended": Mean(float(ended), batch.num_rows)}
    return HostResult(columns=Batch(columns, batch.num_rows), parent=np.arange(batch.num_rows), metrics=metrics)


@recipe
def thinking(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: Thinking) -> None:
    """GRPO or DPO, where the reward does not read thoughts."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    answers = reward.compute_reward(answers_alone(batch, end=cfg.end, end_ids=cfg.end_ids))
    batch = reference.compute_ref_log_prob(mean_of_children(batch, answers))
    if cfg.learner == "dpo":
        actor.update_actor(keep_best_and_worst(batch), loss=dpo(cfg.beta))
    else:
        loss = ppo_clip(cfg.clip, kl_coef=cfg.kl_coef, on_policy=True)
        actor.update_actor(grpo_advantage(batch), loss=loss)
