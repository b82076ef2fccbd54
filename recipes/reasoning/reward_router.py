"""Data scaling in RLHF (Shen et al. 2025, arXiv 2503.22230): where a prompt's reward comes from, and which are kept.

    route "verify"     a rule that checks the response                   mathematics, code
    route "truth"      a judge that has the ground truth, 0 or 1         what has an answer that no rule can check
    route "compare"    a judge that compares with a given answer, the best of N of the SFT model's       the rest

Pre-PPO: of a step's prompts the `share` with the lowest mean reward is kept, since those that are scored high teach to
be scored high. In the first `first_steps` steps only prompts of route "verify" are: what can be checked comes first.
Rows of the data have `route`, and in `answer` the truth or the answer to compare with.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from recipes.policy_gradient.anchored_judge import against
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.parsers import Choice
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Critic, Judge, Prompts, Reference, Reward, State, state_op
from rlhf_dist.transforms import verdict_means

ROUTES = ("verify", "truth", "compare")
TRUTH = """\
Prompt: {prompt}

The right answer: {answer}

A response: {response}

Does the response say the right answer? Write on a line of its own "Verdict: yes" or "Verdict: no"."""
COMPARE = """\
Which of two responses to a prompt is better?

Prompt: {prompt}

Response 1: {response_a}

Response 2: {response_b}

Compare them in a sentence. Then write on a line of its own "Verdict: 1", "Verdict: 2" or "Verdict: tie"."""
PAPERS = {
    "reward_router": Paper(
        title="Data scaling in RLHF: RTV, GenRM and Pre-PPO",
        year=2025,
        arxiv="2503.22230",
        rows=(12,),
        status="outline",
        needs=("ROLL", "VER", "JUDGE", "SAMP", "BRANCH", "MRM"),
        assumed="half of the prompts are kept, in each step and not before PPO, rewards of all "
        "routes ranked together; 100 first steps; the wording; PPO's constants",
    )
}


@dataclass(frozen=True, kw_only=True)
class RewardRouter(WithCritic):
    """Settings of routed rewards."""

    samples_per_prompt: int = 4
    """Responses to each prompt."""
    share: float = 0.5
    """Of the prompts, those with the lowest mean reward that are learned from."""
    first_steps: int = 100
    """Steps in which only prompts of route verify are."""
    truth: str = TRUTH
    """What the judge is asked about {prompt}, {response} and {answer}."""
    compare: str = COMPARE
    """What it is asked about {prompt}, {response_a} and {response_b}."""
    marker: str = "Verdict:"
    """What stands before the verdict in its answers."""


class Routed(Prompts):
    """Prompts that say where their reward comes from."""

    fields = {"route": "text"}


class Phase(State):
    """Which prompts are learned from yet."""

    def initial(self, cfg: RewardRouter) -> dict[str, Any]:
        return {"step": 0}

    @state_op(reads=("route",), rows="drop")
    def checkable_first(
        self, values: dict[str, Any], batch: Batch, *, first_steps: int
    ) -> tuple[dict[str, Any], HostResult]:
        """Prompts of route verify in the first steps, then all."""
        early = values["step"] < first_steps
        keep = np.array(
            [k for k, route in enumerate(batch["route"].rows()) if route == "verify" or not early], np.int64
        )
        waiting = Mean(float(batch.num_rows - len(keep)), 0)
        made = HostResult(columns=Batch({}, len(keep)), keep=keep, metrics={"waiting": waiting})
        return {"step": values["step"] + 1}, made


@host_op(reads=("route",), writes=("verify", "truth"))
def routes(batch: Batch) -> HostResult:
    """1 where a row goes that way. Raises ValueError for a route that there is not."""
    asked = batch["route"].rows()
    for row, route in enumerate(asked):
        if route not in ROUTES:
            raise ValueError(f"route is one of {', '.join(ROUTES)}, got {route!r} in row {row}")
    columns = {name: Column(np.array([one == name for one in asked], np.uint8)) for name in ("verify", "truth")}
    rows = float(batch.num_rows)
    metrics = {f"route_{name}": Mean(float(sum(one == name for one in asked)), rows) for name in ROUTES if rows}
    return HostResult(columns=Batch(columns, batch.num_rows), metrics=metrics)


@host_op(reads=("rewards", "group_id"), rows="drop", scope="batch")
def lowest_groups(batch: Batch, *, share: float) -> HostResult:
    """The `share` of groups with the lowest mean reward, one at least; the first of equal ones."""
    groups, rewards = batch.group(), batch["rewards"].values
    many = min(len(groups), max(1, round(share * len(groups))))
    order = np.argsort([rewards[rows].mean() for rows in groups], kind="stable")[:many]
    keep = np.sort(np.concatenate([groups[at] for at in order])) if many else np.empty(0, np.int64)
    means = {"reward_of_all": rewards, "reward_of_kept": rewards[keep]}
    metrics = {name: Mean(float(one.sum()), float(len(one))) for name, one in means.items() if len(one)}
    return HostResult(columns=Batch({}, len(keep)), keep=keep, metrics=metrics)


@recipe
def reward_router(
    prompts: Routed,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    reward: Reward,
    judge: Judge,
    phase: Phase,
    cfg: RewardRouter,
) -> None:
    """PPO on the hardest prompts, each scored by what fits it."""
    batch = actor.generate_sequences(
        phase.checkable_first(prompts, first_steps=cfg.first_steps), n=cfg.samples_per_prompt
    )
    checked, others = routes(batch).where("verify")
    known, compared = others.where("truth")
    parser = Choice({"yes": 1.0, "no": 0.0}, after=cfg.marker)
    verdicts = judge.generate_sequences(known, template=Template(cfg.truth), parser=parser)
    known, _ = verdict_means(known, verdicts, column="choice").where("judged")
    compared = against(compared, judge, "answer", cfg.compare, cfg.marker)
    batch = lowest_groups(reward.compute_reward(checked).merge(known, compared), share=cfg.share)
    learn_with_critic(batch, actor, critic, reference, cfg)
