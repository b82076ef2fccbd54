"""Self rewarding self improving (Simonds et al. 2025, arXiv 2505.08827): problems, solutions and verdicts of one model.

    q ~ pi(. | write a problem like x),   y ~ pi(. | q),   r = share of verdicts v ~ judge(. | q, y) that say "right"

GRPO on y, a group for each problem; no reference answer. The judge is the model as it began, which learns
no leniency; `judge=actor` lets the policy judge itself as it is.
"""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.parsers import Choice
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Judge, Prompts
from rlhf_dist.transforms import group_by_parent, grpo_advantage, verdict_means

WRITE = """\
Here is a problem: {prompt}

Write another one of this kind, about as hard. Say the problem alone."""
JUDGED = """\
Problem: {asked}

Solution: {response}

Check the solution. End with "Verdict: right" or "Verdict: wrong"."""
PAPERS = {
    "self_improving": Paper(
        title="Self rewarding self improving",
        year=2025,
        arxiv="2505.08827",
        rows=(82,),
        needs=("ROLL", "JUDGE", "SAMP", "ADV"),
        assumed="our own words of both questions; problems are drawn anew at every step; nothing filters them",
    ),
    "own_judge": Paper(
        title="Self rewarding self improving, with the policy as it is for a judge",
        year=2025,
        arxiv="2505.08827",
        rows=(82,),
        needs=("ROLL", "JUDGE", "SAMP", "ADV"),
        settings={"algorithm.judge": "actor"},
        assumed="our own words of both questions; problems are drawn anew at every step; nothing filters them",
    ),
}


@dataclass(frozen=True, kw_only=True)
class SelfImproving:
    """Settings of learning without a reference."""

    samples_per_problem: int = 8
    """Solutions of each problem: the group."""
    votes: int = 1
    """Verdicts on each solution."""
    judge: Literal["judge", "actor"] = "judge"
    """Who judges: a role of its own, or the policy."""
    write: str = WRITE
    """What the policy is asked about {prompt} to make a problem."""
    question: str = JUDGED
    """What the judge is asked about {asked} and {response}."""
    marker: str = "Verdict:"
    """What stands before the verdict."""
    words: tuple[str, str] = ("right", "wrong")
    """The two verdicts."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


@recipe
def self_improving(prompts: Prompts, actor: Actor, judge: Judge, cfg: SelfImproving) -> None:
    """GRPO on problems of one's own, judged without an answer."""
    problems = actor.generate_sequences(prompts, template=Template(cfg.write))
    batch = actor.generate_sequences(problems, template=Template("{response}"), n=cfg.samples_per_problem)
    batch = group_by_parent(batch.join(problems, on="parent", asked="response"))
    verdict = Choice({cfg.words[0]: 1.0, cfg.words[1]: 0.0}, after=cfg.marker)
    asked = actor if cfg.judge == "actor" else judge
    verdicts = asked.generate_sequences(batch, template=Template(cfg.question), parser=verdict, n=cfg.votes)
    batch, _ = verdict_means(batch, verdicts, column="choice").where("judged")
    actor.update_actor(grpo_advantage(batch), loss=ppo_clip(cfg.clip, on_policy=True))
