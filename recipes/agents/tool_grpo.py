"""GRPO over episodes with a calculator as a tool.

The group of a prompt are episodes, each a row of all its turns, and only what the model drew has a loss (as in
Search-R1, Jin et al. 2025, arXiv 2503.09516, and ReTool, Feng et al. 2025, arXiv 2504.11536).
"""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import EpisodeLimits, JsonCalls, TextCalls
from rlhf_dist.environments.calculator import Calculator
from rlhf_dist.roles import Actor, Prompts
from rlhf_dist.transforms import grpo_advantage

PAPERS = {
    "tool_grpo": Paper(
        title="GRPO with a calculator",
        year=2025,
        status="outline",
        needs=("TURN", "ROLL", "VER", "ADV"),
        assumed="a calculator in place of Search-R1's search engine and ReTool's interpreter",
    )
}


@dataclass(frozen=True, kw_only=True)
class ToolGRPO:
    """Settings of GRPO with a calculator."""

    samples_per_prompt: int = 8
    """Episodes of each prompt: the group."""
    turns: int = 3
    """Most turns of an episode."""
    seconds: float = 60.0
    """Longest that an episode may take."""
    step_seconds: float | None = None
    """Longest that all episodes of a step may take; what is not over then is lost. None: as long as the last one."""
    groups: int | None = None
    """Groups of a step that train, the first to be complete; those of its other prompts are surplus. None: all."""
    first: Literal["turns", "time"] = "turns"
    """Which are first: those with the fewest turns, however long tools take, or by the clock."""
    turn_tokens: int | None = None
    """Most tokens of a turn; None: as many as the row has left."""
    begin: str = "<tool_call>"
    """What stands before a call."""
    end: str = "</tool_call>"
    """What stands behind it."""
    plain: bool = False
    """A call is the expression itself; False: JSON with name and arguments."""
    call_reward: float = 0.0
    """For each call that has a value, besides 1 for the right answer."""
    forgiving: bool = True
    """Tell the model what is wrong with a call; False ends the episode there."""
    unfinished_reward: float = 0.0
    """Added where an episode ends without an answer: its tokens or turns used up, or a call that cannot be read."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    scale: bool = True
    """Divide by the standard deviation of the group's rewards."""


@recipe
def tool_grpo(prompts: Prompts, actor: Actor, cfg: ToolGRPO) -> None:
    """GRPO with a calculator."""
    marks = {"begin": cfg.begin, "end": cfg.end}
    parser = TextCalls(**marks) if cfg.plain else JsonCalls(**marks, names=("calculator",))
    environment = Calculator(
        parser=parser,
        argument="text" if cfg.plain else "expression",
        turn_tokens=cfg.turn_tokens,
        call_reward=cfg.call_reward,
        forgiving=cfg.forgiving,
        unfinished_reward=cfg.unfinished_reward,
    )
    limits = EpisodeLimits(turns=cfg.turns, seconds=cfg.seconds, step_seconds=cfg.step_seconds)
    batch = actor.run_episodes(
        prompts,
        environment=environment,
        n=cfg.samples_per_prompt,
        limits=limits,
        groups=cfg.groups,
        first=cfg.first,
    )
    batch = grpo_advantage(batch, scale=cfg.scale)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip, on_policy=True))
