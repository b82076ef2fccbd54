"""AlpacaFarm's simulated annotators (Dubois et al. 2023, arXiv 2305.14387): a pool of judges with noise labels pairs.

    y, y' ~ the SFT model;  one annotator of the pool, drawn for each pair, compares them in both orders
    with probability `noise` the label is turned                                  -log s(r(w) - r(l)) on what comes out

Annotators are questions in different words to one judge: their disagreement, and the noise, are what people's labels
have and one judge's lack. The stages from here on are in `alpaca_farm`.
"""

from dataclasses import dataclass

import numpy as np

from recipes.online_preference._compared import compared
from rlhf_dist.algorithms import bradley_terry
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Judge, Opponent, Prompts, RewardModel
from rlhf_dist.transforms import keep_best_and_worst

PAPERS = {
    "annotators": Paper(
        title="AlpacaFarm: simulated annotators",
        year=2023,
        arxiv="2305.14387",
        rows=(5,),
        needs=("ROLL", "RMT", "JUDGE", "PAIRJ", "FILT"),
        assumed="three annotators and their words, where the paper has 13 of several models; the label noise 0.25",
    )
}


@dataclass(frozen=True, kw_only=True)
class Annotators:
    """Settings of a reward model of simulated annotators."""

    pool: tuple[str, ...] = (
        "Which response is more helpful?",
        "Which response follows the instruction more closely?",
        "Which response would a person rather read?",
    )
    """What each annotator is asked."""
    noise: float = 0.25
    """Share of the pairs whose label is turned."""
    question: str = (
        "{annotator}\n\nInstruction: {prompt}\n\nResponse 1: {response_a}\n\nResponse 2: {response_b}\n\n"
        'Write on a line of its own "Better: 1", "Better: 2" or "Better: tie".'
    )
    """How: about {annotator}, {prompt}, {response_a} and {response_b}."""
    marker: str = "Better:"
    """What stands before 1, 2 or tie in the answer."""


@host_op(reads=("group_id",), writes=("annotator",), scope="batch")
def drawn_from(batch: Batch, *, pool: tuple[str, ...], rng: np.random.Generator) -> Batch:
    """An annotator for each group."""
    said = [""] * batch.num_rows
    for rows in batch.group():
        chosen = pool[int(rng.integers(len(pool)))]
        for row in rows:
            said[int(row)] = chosen
    return Batch({"annotator": Column.strings(said)}, batch.num_rows)


@host_op(reads=("label", "group_id"), writes=("label",), scope="batch")
def with_noise(batch: Batch, *, noise: float, rng: np.random.Generator) -> HostResult:
    """Labels, those of a pair turned with probability `noise`."""
    label, turned, groups = batch["label"].values.copy(), 0, batch.group()
    for rows in groups:
        if rng.random() < noise:
            label[rows], turned = -label[rows], turned + 1
    metrics = {"turned": Mean(float(turned), float(len(groups)))} if groups else {}
    return HostResult(columns=Batch({"label": Column(label)}, batch.num_rows), metrics=metrics)


@recipe
def annotators(prompts: Prompts, policy: Opponent, judge: Judge, reward: RewardModel, cfg: Annotators) -> None:
    """A reward model of pairs that judges have labelled."""
    batch = drawn_from(policy.generate_sequences(prompts, n=2), pool=cfg.pool)
    judged, _ = compared(batch, judge, cfg.question, cfg.marker).where("judged")
    pairs = with_noise(keep_best_and_worst(judged), noise=cfg.noise)
    reward.update_reward_model(pairs, loss=bradley_terry())
