"""GRESO: prompts that taught nothing lately are skipped before they are answered (Zheng et al. 2025, arXiv 2506.02177).

A prompt whose last z draws in a row had rewards all equal is skipped with probability 1 - p^z. p is one number for
prompts that were easy (all rewards at their highest) and one for hard ones, and moves so that the share of such groups
among those that are drawn comes to a target. The constants are to be checked against the paper: they are assumed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.roles import Actor, Prompts, Reward, State, state_op
from rlhf_dist.transforms import drop_equal_groups, grpo_advantage

PAPERS = {
    "greso": Paper(
        title="GRESO",
        year=2025,
        arxiv="2506.02177",
        rows=(150,),
        status="outline",
        needs=("SAMP", "ROLL", "VER", "ADV", "FILT", "STATE"),
        assumed="the targets, the start of p and its step; the batch does not adapt",
    )
}


@dataclass(frozen=True, kw_only=True)
class GRESO:
    """Settings of GRESO."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    explore: float = 0.5
    """p at the start."""
    explore_step: float = 0.01
    """What p moves by in a step."""
    easy_target: float = 1 / 12
    """Share of drawn groups that may be all right."""
    hard_target: float = 1 / 6
    """Share of drawn groups that may be all wrong."""
    solved: float = 1.0
    """A reward from which on a response is right."""


class History(State):
    """For each prompt, how often in a row it taught nothing, and whether it was easy; and p of both kinds."""

    def initial(self, cfg: GRESO) -> dict[str, Any]:
        return {"easy": cfg.explore, "hard": cfg.explore, "streaks": {}}

    @state_op(reads=("prompt",), rows="drop")
    def promising(
        self, values: dict[str, Any], batch: Batch, *, rng: np.random.Generator
    ) -> tuple[dict[str, Any], HostResult]:
        """Prompts that are worth an answer."""
        streaks = [values["streaks"].get(prompt, [0, "easy"]) for prompt in batch["prompt"].rows()]
        chance = np.array([values[kind] ** count for count, kind in streaks])
        keep = np.flatnonzero(rng.random(batch.num_rows) < chance)
        skipped = Mean(float(batch.num_rows - len(keep)), 0)
        return values, HostResult(columns=Batch({}, len(keep)), keep=keep, metrics={"skipped": skipped})

    @state_op(reads=("prompt", "group_id", "rewards"))
    def report(
        self, values: dict[str, Any], batch: Batch, *, solved: float, step: float, easy: float, hard: float
    ) -> tuple[dict[str, Any], Metrics]:
        """Lengthen or end the streaks of the prompts that were answered, and move p towards its targets."""
        streaks, found = dict(values["streaks"]), {"easy": 0, "hard": 0}
        groups = batch.group()
        for rows in groups:
            rewards, prompt = batch["rewards"].values[rows], batch["prompt"].row(int(rows[0]))
            if np.ptp(rewards) > 0:
                streaks.pop(prompt, None)
                continue
            kind = "easy" if rewards[0] >= solved else "hard"
            found[kind] += 1
            streaks[prompt] = [streaks.get(prompt, [0, kind])[0] + 1, kind]
        new = {**values, "streaks": streaks}
        for kind, target in (("easy", easy), ("hard", hard)):
            over = found[kind] > target * len(groups)
            new[kind] = min(1.0, max(step, values[kind] + (-step if over else step)))
        return new, {name: Mean(float(new[name])) for name in ("easy", "hard")}


@recipe
def greso(prompts: Prompts, actor: Actor, reward: Reward, history: History, cfg: GRESO) -> None:
    """GRPO on prompts that may teach something."""
    batch = actor.generate_sequences(history.promising(prompts), n=cfg.samples_per_prompt)
    batch = reward.compute_reward(batch)
    targets = {"easy": cfg.easy_target, "hard": cfg.hard_target}
    history.report(batch, solved=cfg.solved, step=cfg.explore_step, **targets)
    batch = grpo_advantage(drop_equal_groups(batch))
    actor.update_actor(batch, loss=ppo_clip(cfg.clip, on_policy=True))
