"""Process reward models from two labellers (Zhang et al. 2025, arXiv 2501.07301): what both agree on is kept.

    Monte Carlo   a step is right if any of n completions from there reaches the right answer; what is judged is the
                  beginning with its completion, and of a solution that has ended the solution itself
    judge         a language model says whether a step is right
    kept          solutions whose first wrong step is the same for both;  cross-entropy at the ends of their steps, to
                  the first wrong one

    ProcessBench  shares of wrong solutions whose first wrong step is found, of right ones in which none is; F1: their
                  harmonic mean, as is reported of the model before it learns from the batch

A step is `step_tokens` tokens, its end the last of them. Each prefix of a solution is a row of its own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.reward_models.binary_reward_model import binary_cross_entropy
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.missing import is_missing
from rlhf_dist.parsers import Choice
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Judge, Opponent, Prompts, Reward, RewardModel, Speller
from rlhf_dist.transforms import mean_of_children, verdict_means

QUESTION = """\
Problem: {prompt}

The beginning of a solution: {response_ids}

Is its last step right? Think, and end with "Verdict: right" or "Verdict: wrong"."""
MOST_STEPS = 64
PAPERS = {
    "step_consensus": Paper(
        title="Lessons of PRMs: consensus filtering",
        year=2025,
        arxiv="2501.07301",
        rows=(128,),
        needs=("ROLL", "PFX", "VER", "JUDGE", "FILT", "RMT", "EVAL"),
        assumed="steps of so many tokens; the judge is asked about one step at a time; hard labels",
    )
}


@dataclass(frozen=True, kw_only=True)
class StepConsensus:
    """Settings of a process reward model."""

    samples_per_prompt: int = 6
    """Solutions of each problem."""
    completions: int = 8
    """Completions from each step."""
    step_tokens: int = 64
    """Tokens of a step."""
    right: float = 0.5
    """A completion with a reward above this is right; a step is, from this share of judges on."""
    question: str = QUESTION
    """What the judge is asked about {prompt} and the beginning, {response_ids}."""
    marker: str = "Verdict:"
    """What stands before the verdict."""
    words: tuple[str, str] = ("right", "wrong")
    """The two verdicts."""


@host_op(
    reads=("response_ids", "response_mask", "response", "text_ends", "finished", "row_id"),
    writes=("response_ids", "response_mask", "so_far", "ended", "solution", "step"),
    rows="derive",
    copies=MOST_STEPS,
)
def beginnings(batch: Batch, *, step_tokens: int) -> HostResult:
    """A row for each step, whose response ends there; `so_far`: its text, `ended`: whether nothing follows on it,
    `solution`: row_id of the whole one, `step`: from 0. A solution without tokens has no step; one of more than 64
    steps is an error."""
    parents, steps, ids, masks = list[int](), list[int](), [], []
    texts, ended = list[str](), list[float]()
    for row in range(batch.num_rows):
        said, mask = batch["response_ids"].row(row), batch["response_mask"].row(row)
        ends = [*range(step_tokens, len(said), step_tokens), len(said)] if len(said) else []
        if len(ends) > MOST_STEPS:
            raise ValueError(
                f"a solution has at most {MOST_STEPS} steps, got {len(ends)} of {step_tokens} tokens; set "
                f"algorithm.step_tokens to {-(-len(said) // MOST_STEPS)} or more"
            )
        parents += [row] * len(ends)
        steps += range(len(ends))
        ids += [said[:end] for end in ends]
        masks += [mask[:end] for end in ends]
        text, places = batch["response"].row(row), batch["text_ends"].row(row)
        texts += [text[: places[end - 1]] for end in ends]
        ended += [float(end == len(said) and batch["finished"].values[row] > 0) for end in ends]
    columns = {
        "response_ids": Column.ragged(ids, dtype="int32"),
        "response_mask": Column.ragged(masks, dtype="uint8"),
        "so_far": Column.strings(texts),
        "ended": Column(np.array(ended, np.float32)),
        "solution": Column(batch["row_id"].values[np.array(parents, np.int64)]),
        "step": Column(np.array(steps, np.int64)),
    }
    return HostResult(columns=Batch(columns, len(parents)), parent=np.array(parents, np.int64))


@host_op(reads=("so_far", "ended", "response"), writes=("response",))
def completed_text(batch: Batch) -> Batch:
    """The beginning and its completion, as text; a solution that has ended has none."""
    rows = zip(batch["so_far"].rows(), batch["response"].rows(), batch["ended"].values, strict=True)
    return Batch({"response": Column.strings([a if ended else a + b for a, b, ended in rows])}, batch.num_rows)


@host_op(reads=("rewards",), writes=("rewards",), missing=True)
def is_right(batch: Batch, *, right: float) -> Batch:
    """1 for a reward above `right`, else 0; missing where it is."""
    rewards = batch["rewards"].values
    solved = np.where(is_missing(rewards), rewards, (rewards > right).astype(np.float32))
    return Batch({"rewards": Column(solved.astype(np.float32))}, batch.num_rows)


@host_op(
    reads=("completed", "judged_right", "solution", "step", "group_id"),
    writes=("desirable",),
    scope="groups",
    rows="drop",
    missing=True,
)
def agreed(batch: Batch, *, right: float) -> HostResult:
    """Steps up to the first wrong one, of solutions in which both labellers find the same; desirable: 1 but for that.

    Solutions with a step that one of them said nothing of are dropped, and counted.
    """
    keep, labels = list[int](), list[float]()
    solutions, unsure, same = _solutions(batch), 0, 0
    for rows in solutions:
        monte_carlo, judge = batch["completed"].values[rows], batch["judged_right"].values[rows]
        if is_missing(monte_carlo).any() or is_missing(judge).any():
            unsure += 1
            continue
        wrong = first_wrong(monte_carlo > 0)
        if wrong == first_wrong(judge >= right):
            same += 1
            kept = rows[: wrong + 1]
            keep += kept.tolist()
            labels += [float(at != wrong) for at in range(len(kept))]
    order = np.argsort(np.array(keep, np.int64))
    metrics = {
        "agreement": Mean(float(same), float(len(solutions))),
        "solutions_without_labels": Mean(float(unsure), 0),
    }
    columns = Batch({"desirable": Column(np.array(labels, np.float32)[order])}, len(keep))
    return HostResult(columns=columns, keep=np.array(keep, np.int64)[order], metrics=metrics)


@host_op(reads=("scored", "desirable", "solution", "step", "group_id"), scope="batch")
def process_bench(batch: Batch) -> HostResult:
    """How well the model (a score above 0: right) finds the first wrong step, and that there is none."""
    found = {True: [0, 0], False: [0, 0]}
    for rows in _solutions(batch):
        wanted, said = (first_wrong(batch[name].values[rows] > 0) for name in ("desirable", "scored"))
        of_kind = found[wanted < len(rows)]
        of_kind[0] += int(said == wanted)
        of_kind[1] += 1
    (hits, wrong), (clean, right) = found[True], found[False]
    metrics = {"wrong_accuracy": Mean(float(hits), float(wrong)), "right_accuracy": Mean(float(clean), float(right))}
    if wrong and right:
        a, b = hits / wrong, clean / right
        metrics["f1"] = Mean(2 * a * b / (a + b) if a + b else 0.0)
    return HostResult(columns=Batch({}, batch.num_rows), metrics={k: v for k, v in metrics.items() if v.count})


def first_wrong(right: np.ndarray[Any, Any]) -> int:
    """Index of the first step that is not right; the number of steps where all are."""
    return int(np.argmin(right)) if not right.all() else len(right)


def _solutions(batch: Batch) -> list[np.ndarray[Any, Any]]:
    """Rows of each solution, in the order of its steps."""
    order = np.lexsort((batch["step"].values, batch["solution"].values))
    cuts = np.flatnonzero(np.diff(batch["solution"].values[order])) + 1
    return np.split(order, cuts) if len(order) else []


@recipe
def step_consensus(
    prompts: Prompts,
    policy: Opponent,
    judge: Judge,
    verifier: Reward,
    learner: RewardModel,
    speller: Speller,
    cfg: StepConsensus,
) -> None:
    """Labels of steps by completions and by a judge, and a model of those they share."""
    solutions = speller.spell(policy.generate_sequences(prompts, n=cfg.samples_per_prompt), of="policy")
    # Without the prompt's tokens, what the op writes is of the policy's tokenizer alone, and the judge can be shown it.
    steps = beginnings(solutions.drop("prompt_ids"), step_tokens=cfg.step_tokens)
    steps = steps.join(solutions, on="parent", prompt_ids="prompt_ids")
    ends = completed_text(policy.generate_sequences(steps, prefix="response_ids", n=cfg.completions))
    ends = verifier.compute_reward(ends)
    steps = mean_of_children(steps, is_right(ends, right=cfg.right), into="completed")
    verdict = Choice({cfg.words[0]: 1.0, cfg.words[1]: 0.0}, after=cfg.marker)
    verdicts = judge.generate_sequences(steps, template=Template(cfg.question), parser=verdict)
    steps = verdict_means(steps, verdicts, column="choice", into="judged_right")
    kept = agreed(steps, right=cfg.right)
    process_bench(learner.compute_reward(kept, out="scored"))
    learner.update_reward_model(kept, loss=binary_cross_entropy())
