"""RefCritic (Tang et al. 2025, arXiv 2507.15024): a critic learns to judge a solution so that its solver gets it right.

    s ~ solver(. | x),   c ~ critic(. | x, s) with a verdict,   s' ~ solver(. | x, s, c)
    r = 1[verdict = (s is right)] + lambda * mean over s' of 1[s' is right]          GRPO on the critic

The solver is frozen. A critique without a verdict that can be read has got it wrong.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.missing import MISSING, is_missing
from rlhf_dist.parsers import Choice
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Opponent, Prompts, Reward
from rlhf_dist.transforms import grpo_advantage, mean_of_children
from rlhf_dist.transforms.columns import mean_of

CRITIQUE = """\
Problem: {prompt}

Solution: {response}

Check the solution step by step, and say how it can be improved. End with "Verdict: right" or "Verdict: wrong"."""
REFINE = """\
Problem: {problem}

A solution: {solution}

What a critic says of it: {response}

Solve the problem."""
PAPERS = {
    "refcritic": Paper(
        title="RefCritic",
        year=2025,
        arxiv="2507.15024",
        rows=(127,),
        needs=("ROLL", "XLM", "VER", "ADV", "CO"),
        assumed="lambda 1; refinements of right solutions count, too; our own words of both questions; no SFT before",
    )
}


@dataclass(frozen=True, kw_only=True)
class RefCritic:
    """Settings of a critic's training."""

    samples_per_prompt: int = 8
    """Critiques of each solution: the group."""
    refinements: int = 4
    """New solutions with each critique."""
    refined_coef: float = 1.0
    """lambda: weight of the refined solutions' accuracy; 0 for the verdict alone, and then none are drawn."""
    right: float = 0.5
    """A solution with a reward above this is right."""
    critique: str = CRITIQUE
    """What the critic is asked about {prompt} and {response}."""
    refine: str = REFINE
    """What the solver is asked about {problem}, {solution} and the critique, {response}."""
    marker: str = "Verdict:"
    """What stands before the verdict in a critique."""
    words: tuple[str, str] = ("right", "wrong")
    """The two verdicts."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


@host_op(
    reads=lambda settings: ("choice", "parsed", "solved", *(("refined",) if settings["coef"] else ())),
    writes=("rewards",),
    missing=True,
)
def verdict_and_use(batch: Batch, *, coef: float, right: float) -> HostResult:
    """1 for the right verdict, and coef times the accuracy of what was made of the critique; missing where that is, or
    whether the solution was right."""
    solved, unknown = batch["solved"].values > right, is_missing(batch["solved"].values)
    agrees = (batch["parsed"].values > 0) & ((batch["choice"].values > 0.5) == solved)
    rewards = agrees.astype(np.float32)
    if coef:
        rewards = rewards + np.float32(coef) * batch["refined"].values
    rewards[unknown] = MISSING
    metrics = {"verdict_right": mean_of(agrees[~unknown]), "solved": mean_of(solved[~unknown])}
    metrics = {name: one for name, one in metrics.items() if one.count}  # a mean of nothing is not 0
    return HostResult(columns=Batch({"rewards": Column(rewards)}, batch.num_rows), metrics=metrics)


@recipe
def refcritic(prompts: Prompts, solver: Opponent, critic: Actor, verifier: Reward, cfg: RefCritic) -> None:
    """GRPO on critiques."""
    solutions = verifier.compute_reward(solver.generate_sequences(prompts), out="solved")
    verdict = Choice({cfg.words[0]: 1.0, cfg.words[1]: 0.0}, after=cfg.marker)
    critiques = critic.generate_sequences(
        solutions, template=Template(cfg.critique), parser=verdict, n=cfg.samples_per_prompt
    )
    if cfg.refined_coef:
        asked = critiques.join(solutions, on="parent", problem="prompt", solution="response")
        refined = solver.generate_sequences(asked, template=Template(cfg.refine), n=cfg.refinements)
        refined = verifier.compute_reward(refined)
        critiques = mean_of_children(critiques, refined, into="refined")
    critiques = verdict_and_use(critiques, coef=cfg.refined_coef, right=cfg.right)
    critic.update_actor(grpo_advantage(critiques), loss=ppo_clip(cfg.clip, on_policy=True))
