"""Agent-R (Yuan et al. 2025, arXiv 2501.11425): a policy learns to recover from its own errors, from trees.

    tree     several first attempts; each wrong one is followed by a revision text and new attempts
    row      bad beginning | "that was wrong, ..." | good end          for each new attempt that is right
    L        -log pi over the good end alone

The bad beginning and the revision are read, not imitated, so that the policy learns to turn round, not to err. Each
step's trees are grown by the policy as it is.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import nll
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts

PAPERS = {
    "agent_r": Paper(
        title="Agent-R",
        year=2025,
        arxiv="2501.11425",
        rows=(168,),
        status="outline",
        needs=("TREE", "TURN", "SFT", "FILT", "ROLL"),
        assumed=(
            "the good end is drawn behind the revision, not spliced from another branch; the error is the end of an "
            "attempt of a fixed number of tokens, not found by the policy; a tree of two levels, no MCTS"
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class AgentR:
    """Settings of Agent-R."""

    attempts: int = 4
    """First attempts at each prompt."""
    revisions: int = 4
    """New attempts behind a wrong one."""
    attempt_tokens: int = 128
    """Tokens of an attempt."""
    revision: str = "\nThat was wrong. Let me look at it again: "
    """What is said behind a wrong attempt."""
    seconds: float = 300.0
    """Longest that a tree may take."""


@dataclass(frozen=True, kw_only=True)
class Revised(Environment):
    """Attempts, and what follows on wrong ones; 1 for a text that has the answer."""

    leaves: int = 16
    attempts: int = 4
    revisions: int = 4
    attempt_tokens: int = 128
    revision: str = ""

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        await chat.branch(self.attempt, n=self.attempts)

    async def attempt(self, branch: Chat) -> None:
        """A first attempt; a wrong one is revised."""
        reply = await branch.generate(max_tokens=self.attempt_tokens)
        if branch.row.answer in reply.text:
            branch.reward(1.0)
            return
        branch.say(self.revision)
        await branch.branch(self.revise, n=self.revisions)

    async def revise(self, branch: Chat) -> None:
        """A new attempt behind the wrong one."""
        reply = await branch.generate(max_tokens=self.attempt_tokens)
        branch.reward(float(branch.row.answer in reply.text))


@host_op(reads=("rewards", "turn", "turns", "response_mask"), writes=("response_mask",), rows="drop")
def recoveries(batch: Batch) -> HostResult:
    """Rows that were right at the second attempt, with that attempt alone in the mask."""
    keep = np.flatnonzero((batch["rewards"].values > 0) & (batch["turns"].values > 1))
    masks = []
    for row in keep.tolist():
        last = batch["turn"].row(row) == batch["turns"].values[row] - 1
        masks.append((last & (batch["response_mask"].row(row) > 0)).astype(np.uint8))
    tried = float((batch["turns"].values > 1).sum())
    return HostResult(
        columns=Batch({"response_mask": Column.ragged(masks, np.uint8)}, len(keep)),
        keep=keep,
        metrics={"recovered": Mean(float(len(keep)), tried)},
    )


@recipe
def agent_r(prompts: Prompts, actor: Actor, cfg: AgentR) -> None:
    """Imitation of one's own recoveries."""
    environment = Revised(
        leaves=cfg.attempts * cfg.revisions,
        attempts=cfg.attempts,
        revisions=cfg.revisions,
        attempt_tokens=cfg.attempt_tokens,
        revision=cfg.revision,
    )
    limits = EpisodeLimits(turns=2, seconds=cfg.seconds)
    batch = recoveries(actor.run_episodes(prompts, environment=environment, limits=limits))
    actor.update_actor(batch, loss=nll())
