"""SPARK: policy and judge in one (Liu et al. 2025, arXiv 2509.22624): a policy's own responses teach it to judge.

    GRPO on  y ~ pi(. | x)                        r = verifier(y)
             v ~ pi(. | is y right?)              r = 1[v = verifier(y)]                       pointwise
             v ~ pi(. | which of y, y' is right?) r = 1[v = the right one], where just one is  pairwise
             y' ~ pi(. | improve y)               r = verifier(y'), where y is wrong           reflection

One optimizer step on the sum of the four losses; what was drawn for one is used for all, so no preference data is
needed. The answers to one question about a response are a group. A verdict that cannot be read is wrong.
"""

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
from rlhf_dist.roles import Actor, Prompts, Reward
from rlhf_dist.transforms import group_by_parent, grpo_advantage
from rlhf_dist.transforms.columns import mean_of

POINTWISE = """\
Problem: {prompt}

Solution: {response}

Is the solution right? Think, and end with "Verdict: 1" if it is, else "Verdict: 2"."""
PAIRWISE = """\
Problem: {prompt}

Solution 1: {response_a}

Solution 2: {response_b}

Which solution is right? Think, and end with "Verdict: 1" or "Verdict: 2"."""
REFLECT = """\
Problem: {prompt}

A solution, which is wrong: {response}

Find the error, and solve the problem."""
PAPERS = {
    "spark": Paper(
        title="SPARK: co-evolving policy and reward",
        year=2025,
        arxiv="2509.22624",
        rows=(126,),
        needs=("ROLL", "VER", "ADV", "JUDGE", "AUX", "CO"),
        assumed="the four losses have weight 1; one wrong and one right response of a prompt make its pair, in both "
        "orders; all questions in one step; our own words of them",
    )
}


@dataclass(frozen=True, kw_only=True)
class SPARK:
    """Settings of a policy that learns to judge itself."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    verdicts: int = 4
    """Answers to each question about responses: a group."""
    judging_coef: float = 1.0
    """Weight of each of the three other losses."""
    right: float = 0.5
    """A response with a reward above this is right."""
    pointwise: str = POINTWISE
    """The question about one response."""
    pairwise: str = PAIRWISE
    """The question about two."""
    reflect: str = REFLECT
    """The question after a wrong one."""
    marker: str = "Verdict:"
    """What stands before a verdict."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


@host_op(reads=("rewards",), writes=("wanted",))
def known_verdicts(batch: Batch, *, right: float) -> HostResult:
    """`wanted`: 1 for a right response, else 0."""
    solved = (batch["rewards"].values > right).astype(np.float32)
    columns = Batch({"wanted": Column(solved)}, batch.num_rows)
    return HostResult(columns=columns, metrics={"right": mean_of(solved)})


@host_op(
    reads=("response", "wanted", "group_id"),
    writes=("response_a", "response_b", "wanted"),
    scope="groups",
    rows="derive",
    copies=2,
)
def right_against_wrong(batch: Batch) -> HostResult:
    """The first right and the first wrong response of each group that has both, as two rows, one in each order; wanted:
    1 where the first is right."""
    solved = batch["wanted"].values > 0.5
    firsts = [
        (rows[solved[rows]][0], rows[~solved[rows]][0])
        for rows in batch.group()
        if solved[rows].any() and not solved[rows].all()
    ]
    first = np.array([one for pair in firsts for one in pair], np.int64)
    second = np.array([one for pair in firsts for one in pair[::-1]], np.int64)
    columns = {
        "response_a": batch["response"].take(first),
        "response_b": batch["response"].take(second),
        "wanted": Column(solved[first].astype(np.float32)),
    }
    metrics = {"pairs": Mean(float(len(firsts)), 0)}
    return HostResult(columns=Batch(columns, len(first)), parent=first, metrics=metrics)


@host_op(reads=("choice", "parsed", "wanted"), writes=("rewards",), missing=True)
def verdict_is_right(batch: Batch) -> HostResult:
    """1 where the verdict is the wanted one; one that cannot be read is not."""
    agrees = (batch["parsed"].values > 0) & ((batch["choice"].values > 0.5) == (batch["wanted"].values > 0.5))
    columns = Batch({"rewards": Column(agrees.astype(np.float32))}, batch.num_rows)
    return HostResult(columns=columns, metrics={"verdict_right": mean_of(agrees)})


@recipe
def spark(prompts: Prompts, actor: Actor, reward: Reward, cfg: SPARK) -> None:
    """GRPO on responses, and on what the policy says of them."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = known_verdicts(batch, right=cfg.right)
    _, wrong = batch.where("wanted")
    choice = Choice({"1": 1.0, "2": 0.0}, after=cfg.marker)

    def asked(rows: Batch, question: str) -> Batch:
        said = actor.generate_sequences(rows, template=Template(question), parser=choice, n=cfg.verdicts)
        return verdict_is_right(group_by_parent(said))

    again = actor.generate_sequences(wrong, template=Template(cfg.reflect), n=cfg.verdicts)
    others = [
        asked(batch, cfg.pointwise),
        asked(right_against_wrong(batch), cfg.pairwise),
        group_by_parent(reward.compute_reward(again)),
    ]
    loss = ppo_clip(cfg.clip, on_policy=True)
    terms = [(grpo_advantage(one), loss, cfg.judging_coef) for one in others]
    actor.update_actor([(grpo_advantage(batch), loss), *terms])
