"""Active exploration as a contextual dueling bandit (Mehta et al. 2023, arXiv 2312.00267): it chooses prompts, too.

    1. upper and lower bounds of each response's value:  m +- width s / sqrt(K),  m, s of K scores of a judge
    2. prompts by how little is known of their best response:  max_y upper(y) - max_y lower(y), the largest first
    3. on these the response with the largest upper bound duels another one at random; the oracle labels, then DPO

Prompts whose best response is known teach nothing more, and are not labelled. The oracle is the reward.
"""

from dataclasses import dataclass

import numpy as np

from recipes.online_preference.active import largest
from recipes.policy_gradient.judge_grpo import POINTWISE
from rlhf_dist.algorithms import dpo
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.parsers import Number
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Judge, Prompts, Reference, Reward
from rlhf_dist.transforms import keep_best_and_worst, verdict_means

PAPERS = {
    "dueling": Paper(
        title="Active exploration: a contextual dueling bandit",
        year=2023,
        arxiv="2312.00267",
        rows=(77,),
        status="outline",
        needs=("SAMP", "PREF", "ROLL", "JUDGE"),
        assumed="bounds from the spread of a judge's scores, not of dropout or a kernel; width 2, K 4, a quarter asked",
    )
}


@dataclass(frozen=True, kw_only=True)
class Dueling:
    """Settings of active exploration."""

    samples_per_prompt: int = 4
    """Responses to each prompt: the arms."""
    votes: int = 4
    """K, scores of each response."""
    width: float = 2.0
    """Standard errors between the mean and a bound."""
    share: float = 0.25
    """Of the prompts, those that are asked about."""
    question: str = POINTWISE
    """What the judge is asked about {prompt} and {response}."""
    marker: str = "Score:"
    """What stands before the score in its answer."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""


@host_op(
    reads=(("row_id", "rewards", "group_id"), ("parent_id", "score", "parsed", "group_id")),
    writes=("upper", "lower"),
    scope="groups",
    missing=True,
)
def bounds(batch: Batch, verdicts: Batch, *, width: float) -> Batch:
    """`rewards`, the mean of a row's scores, plus and minus `width` standard errors of its parsed ones."""
    said = verdicts["parsed"].values > 0
    parents, scores = verdicts["parent_id"].values[said], verdicts["score"].values[said].astype(np.float64)
    error = np.zeros(batch.num_rows)
    for row, row_id in enumerate(batch["row_id"].values.tolist()):
        own = scores[parents == row_id]
        error[row] = own.std() / np.sqrt(max(len(own), 1)) if len(own) else 0.0
    mean = batch["rewards"].values
    columns = {"upper": mean + width * error, "lower": mean - width * error}
    return Batch({name: Column(one.astype(np.float32)) for name, one in columns.items()}, batch.num_rows)


@host_op(reads=("upper", "lower", "group_id"), rows="drop", scope="batch")
def least_known(batch: Batch, *, share: float) -> HostResult:
    """The groups whose best row is least known."""
    upper, lower = batch["upper"].values, batch["lower"].values
    unknown = [float(upper[rows].max() - lower[rows].max()) for rows in batch.group()]
    chosen = largest(batch, unknown, share)
    metrics = {"unknown": Mean(float(sum(unknown)), float(len(unknown)))} if unknown else {}
    return HostResult(columns=chosen.columns, keep=chosen.keep, metrics=metrics)


@host_op(reads=("upper", "group_id"), rows="drop", scope="batch")
def duellists(batch: Batch, *, rng: np.random.Generator) -> HostResult:
    """Of each group the row with the largest upper bound, and another one at random; a row alone has no duel."""
    keep = list[int]()
    for rows in batch.group():
        if len(rows) > 1:
            best = int(batch["upper"].values[rows].argmax())
            keep += [int(rows[best]), int(rng.choice(np.delete(rows, best)))]
    kept = np.sort(np.array(keep, np.int64))
    return HostResult(columns=Batch({}, len(kept)), keep=kept)


@recipe
def dueling(prompts: Prompts, actor: Actor, reference: Reference, judge: Judge, reward: Reward, cfg: Dueling) -> None:
    """DPO on duels where least is known."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    parser = Number(cfg.marker, low=0, high=10)
    verdicts = judge.generate_sequences(batch, template=Template(cfg.question), parser=parser, n=cfg.votes)
    judged, _ = verdict_means(batch, verdicts).where("judged")
    chosen = least_known(bounds(judged, verdicts, width=cfg.width), share=cfg.share)
    pairs = keep_best_and_worst(reward.compute_reward(duellists(chosen)))
    actor.update_actor(reference.compute_ref_log_prob(pairs), loss=dpo(cfg.beta))
