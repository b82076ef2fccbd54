"""Two policies that are trained on what they draw against each other in a game of two players with zero sum.

    max_pi1 min_pi2  E[u(a1, a2)] - beta KL(pi1 || ref) + beta KL(pi2 || ref)     each by policy gradient on its rows

The KL to a magnet, their own policy at the start or some steps ago (magnetic mirror descent, Sokota et al. 2022, arXiv
2206.05825), makes the last policies converge, where without it they run in circles around the equilibrium.
`exploitability` is what the best answers to both would win.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import EpisodeLimits
from rlhf_dist.environments.matrix_game import MatrixGame, exploitability
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.roles import Actor, Prompts, Reference
from rlhf_dist.transforms import grpo_advantage, spoken_by

PAPERS = {
    "self_play": Paper(
        title="Self-play of two policies",
        year=2022,
        arxiv="2206.05825",
        status="outline",
        needs=("TURN", "XLM", "ROLL", "ADV", "REF", "SNAP"),
        assumed="REINFORCE with group baselines for its update; constants of a game of three moves",
    )
}


@dataclass(frozen=True, kw_only=True)
class SelfPlay:
    """Settings of self-play."""

    episodes: int = 64
    """Games of each prompt: the group."""
    payoffs: tuple[tuple[float, ...], ...] = ((0.0, -1.0, 2.0), (1.0, 0.0, -1.0), (-2.0, 1.0, 0.0))
    """What the first side wins, [its move][the other's]. As it stands each side should play (1/4, 1/2, 1/4)."""
    moves: tuple[str, ...] = ("0", "1", "2")
    """How a side says its moves."""
    nonsense_reward: float = -3.0
    """For what is no move."""
    kl_coef: float = 0.7
    """Weight of the KL to the magnet."""
    magnet_every: int = 0
    """Steps after which a magnet becomes the policy that it holds back; 0: it stays where it began."""


def _one_sided_moves(batch: Batch, moves: tuple[str, ...]) -> np.ndarray:
    said = [text.strip() for text in batch["response"].rows()]
    return np.array([said.count(move) for move in moves], dtype=np.float64)


@host_op(reads=(("response",), ("response",)), scope="batch", writes=())
def measured(
    mine: Batch, theirs: Batch, *, payoffs: tuple[tuple[float, ...], ...], moves: tuple[str, ...]
) -> HostResult:
    """Counts what both sides play, as metrics."""
    counts = [_one_sided_moves(batch, moves) for batch in (mine, theirs)]
    metrics: Metrics = {}
    for side, played, batch in zip(("first", "second"), counts, (mine, theirs), strict=True):
        for move, count in zip(moves, played, strict=True):
            metrics[f"{side}_plays_{move}"] = Mean(float(count), float(batch.num_rows))
    if all(played.sum() for played in counts):
        first, second = (played / played.sum() for played in counts)
        metrics["exploitability"] = Mean(exploitability(payoffs, first, second), 1)
    return HostResult(columns=Batch({}, mine.num_rows), metrics=metrics)


@recipe
def self_play(
    prompts: Prompts, actor: Actor, opponent: Actor, reference: Reference, other_reference: Reference, cfg: SelfPlay
) -> None:
    """Policy gradients of both sides, on one set of games."""
    game = MatrixGame(payoffs=cfg.payoffs, moves=cfg.moves, nonsense_reward=cfg.nonsense_reward)
    batch = actor.run_episodes(
        prompts,
        environment=game,
        n=cfg.episodes,
        limits=EpisodeLimits(turns=1),
        speakers={"opponent": opponent},
        rows_of=("opponent",),
    )
    sides = spoken_by(batch, name="actor"), spoken_by(batch, name="opponent")
    measured(*sides, payoffs=cfg.payoffs, moves=cfg.moves)
    for policy, magnet, rows in zip((actor, opponent), (reference, other_reference), sides, strict=True):
        rows = magnet.compute_ref_log_prob(policy.compute_log_prob(rows))
        rows = grpo_advantage(rows, scale=False, kl_coef=cfg.kl_coef)
        policy.update_actor(rows, loss=ppo_clip(0.2))
        if cfg.magnet_every:
            magnet.copy_from(policy, every=cfg.magnet_every)
