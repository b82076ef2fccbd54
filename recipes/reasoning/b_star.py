"""B-STaR (Zeng et al. 2024, arXiv 2412.17256): self-taught reasoning whose temperature and threshold are chosen anew.

    bs = min(n' / n*, 1) (n' / n)      of a prompt: n selected responses, n' of them unique and right, n* wanted
    at each step   the temperature and the threshold with the largest mean bs;   L = -log pi(y) on what they select

Too cold, and responses are alike (n' is small); too hot, and few are right (n' / n is small).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms import nll
from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts, Reward, RewardModel

PAPERS = {
    "b_star": Paper(
        title="B-STaR: balanced self-taught reasoner",
        year=2024,
        arxiv="2412.17256",
        rows=(165,),
        needs=("ROLL", "VER", "RM", "FILT", "SFT", "STATE"),
        assumed=(
            "n* 6 and the grids; every temperature is drawn at each step, not on a share of the prompts; responses "
            "are unique by their text; right is the rule's verdict, the threshold is on the reward model's score"
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class BStar:
    """Settings of B-STaR."""

    samples_per_prompt: int = 8
    """Responses to each prompt at each temperature."""
    temperatures: tuple[float, ...] = (0.5, 0.7, 0.9, 1.1)
    """What temperature is chosen from."""
    thresholds: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    """What the least score of a selected response is chosen from."""
    wanted: float = 6.0
    """n*: unique right responses to a prompt that are enough."""
    right: float = 1.0
    """A rule's reward from which on a response is right."""


@host_op(reads=("response_ids",), writes=("temperature",))
def drawn_at(batch: Batch, *, temperature: float) -> Batch:
    """The temperature as a column."""
    return Batch({"temperature": Column(np.full(batch.num_rows, temperature, np.float32))}, batch.num_rows)


def balance(texts: list[str], right: list[bool], wanted: float) -> float:
    """bs of the selected responses to one prompt; 0 where there are none."""
    if not texts:
        return 0.0
    good = len({text for text, is_right in zip(texts, right, strict=True) if is_right})
    return min(good / wanted, 1.0) * good / len(texts)


@host_op(reads=("rewards", "scored", "temperature", "response", "group_id"), rows="drop", scope="batch")
def balanced(batch: Batch, *, thresholds: tuple[float, ...], wanted: float, right: float) -> HostResult:
    """The right responses, each once, that the best temperature and threshold select; the first of equal choices."""
    texts, good = batch["response"].rows(), batch["rewards"].values >= right
    groups = batch.group()
    best, found = -1.0, (0.0, 0.0)
    for temperature in np.unique(batch["temperature"].values).tolist():
        for threshold in thresholds:
            selected = _selected(batch, temperature, threshold)
            scores = []
            for rows in groups:
                taken = rows[selected[rows]].tolist()
                scores.append(balance([texts[row] for row in taken], [bool(good[row]) for row in taken], wanted))
            if float(np.mean(scores)) > best:
                best, found = float(np.mean(scores)), (temperature, threshold)
    first: dict[tuple[int, str], int] = {}
    for row in np.flatnonzero(_selected(batch, *found) & good).tolist():
        first.setdefault((int(batch["group_id"].values[row]), texts[row]), row)
    keep: IntArray = np.array(sorted(first.values()), dtype=np.int64)
    metrics = {"balance": Mean(best), "temperature": Mean(found[0]), "threshold": Mean(found[1])}
    return HostResult(columns=Batch({}, len(keep)), keep=keep, metrics=metrics)


def _selected(batch: Batch, temperature: float, threshold: float) -> npt.NDArray[np.bool_]:
    """[B] what this choice takes."""
    found: npt.NDArray[np.bool_] = np.isclose(batch["temperature"].values, temperature)
    return found & (batch["scored"].values >= threshold)


@recipe
def b_star(prompts: Prompts, actor: Actor, reward: Reward, scorer: RewardModel, cfg: BStar) -> None:
    """Rejection fine-tuning with a balanced sampler."""
    parts = [
        drawn_at(actor.generate_sequences(prompts, n=cfg.samples_per_prompt, temperature=heat), temperature=heat)
        for heat in cfg.temperatures
    ]
    batch = reward.compute_reward(parts[0].concat(*parts[1:]))
    batch = scorer.compute_reward(batch, out={"rewards": "scored"})
    batch = balanced(batch, thresholds=cfg.thresholds, wanted=cfg.wanted, right=cfg.right)
    actor.update_actor(batch, loss=nll())
