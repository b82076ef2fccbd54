"""Pre-training text as data for reinforcement learning: RLPT (2025, arXiv 2509.19249).

    text -> context, next segment, what follows it
    asr    predict the next segment from the context
    msr    predict a segment in the middle from what stands on both sides of it
    r = 1 where a judge finds the prediction to be a prefix of the truth in meaning; GRPO

No answers are labelled: any text has them. A judge is asked since there are many ways to say the same; it is shown the
segment and what follows, so that a prediction that says more than the segment is no error.
"""

import re
from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.parsers import Choice
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Judge, Prompts
from rlhf_dist.transforms import grpo_advantage, verdict_means

PAPERS = {
    "rlpt": Paper(
        title="RLPT: reinforcement learning on pre-training data",
        year=2025,
        arxiv="2509.19249",
        rows=(152,),
        status="outline",
        needs=("ROLL", "JUDGE", "ADV", "SAMP"),
        assumed="sentences as segments; half of the rows of each task; words of the prompts; groups of 8",
    )
}
NEXT = "{before} [the sentence that follows]"
MIDDLE = "{before} [a missing sentence] {behind}"
QUESTION = """\
A text goes on so: {truth}

Somebody predicted: {response}

Is the prediction, in its meaning, a beginning of how the text goes on? End with "yes" or "no"."""


def segments(text: str) -> list[str]:
    """Sentences, or lines; in a text of one sentence its words."""
    found = [one.strip() for one in re.split(r"(?<=[.!?])\s+|\n+", text) if one.strip()]
    return found if len(found) > 1 else text.split()


@host_op(reads=("answer",), writes=("asked", "truth"), scope="batch", rows="drop")
def predicted_segments(
    batch: Batch, *, middle: float, next_segment: str, middle_segment: str, rng: np.random.Generator
) -> HostResult:
    """Asks for one segment of each text, drawn; a `middle` share of them for one that has text on both sides. Texts of
    one segment are dropped and counted. truth: the segment and what follows it."""
    asked, truths, keep, of_middle = list[str](), list[str](), list[int](), 0
    for row, text in enumerate(batch["answer"].rows()):
        parts = segments(text)
        if len(parts) < 2:
            continue
        inside = len(parts) > 2 and rng.random() < middle
        at = int(rng.integers(1, len(parts) - 1 if inside else len(parts)))
        before, behind = " ".join(parts[:at]), " ".join(parts[at + 1 :])
        asked.append((middle_segment if inside else next_segment).format(before=before, behind=behind))
        truths.append(parts[at] if inside else " ".join(parts[at:]))
        keep.append(row)
        of_middle += inside
    return HostResult(
        columns=Batch({"asked": Column.strings(asked), "truth": Column.strings(truths)}, len(keep)),
        keep=np.array(keep, np.int64),
        metrics={
            "middle_share": Mean(float(of_middle), float(len(keep))),
            "too_short": Mean(batch.num_rows - len(keep), 0),
        },
    )


@dataclass(frozen=True, kw_only=True)
class RLPT:
    """Settings of RLPT."""

    samples_per_prompt: int = 8
    """Predictions of each segment: the group."""
    middle: float = 0.5
    """Share of the rows that ask for a segment in the middle (MSR); the others for the next (ASR)."""
    next_segment: str = NEXT
    """How the next segment is asked for, with `before`."""
    middle_segment: str = MIDDLE
    """How one in the middle is, with `before` and `behind`."""
    question: str = QUESTION
    """What the judge is asked, with `truth` and `response`."""
    yes: str = "yes"
    """The judge's word for a prediction that is right."""
    no: str = "no"
    """Its word for one that is not."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


@recipe
def rlpt(prompts: Prompts, actor: Actor, judge: Judge, cfg: RLPT) -> None:
    """Predict a segment of a text; a judge compares. The text is the row's answer."""
    cut = predicted_segments(
        prompts, middle=cfg.middle, next_segment=cfg.next_segment, middle_segment=cfg.middle_segment
    )
    batch = actor.generate_sequences(cut, n=cfg.samples_per_prompt, template=Template("{asked}"))
    verdicts = judge.generate_sequences(
        batch, template=Template(cfg.question), parser=Choice({cfg.yes: 1.0, cfg.no: 0.0}, column="score")
    )
    batch, _ = verdict_means(batch, verdicts).where("judged")
    actor.update_actor(grpo_advantage(batch), loss=ppo_clip(cfg.clip, on_policy=True))
