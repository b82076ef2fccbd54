"""From r to Q* (Rafailov et al. 2024, arXiv 2404.12358): a DPO policy is a token-level soft Q function.

    credit of a token    beta (log pi(y_t) - log pi_ref(y_t))            soft advantage of y_t in its state
    beam search          by the sum of credits, which for the whole response is its implicit reward

Chunks of `chunk` tokens are drawn `branch` times from each beam, and the `beams` with the largest sums are kept; a beam
that has ended stays as it is. The best one of each prompt is compared with a plain response. Nothing is trained.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean, Metrics, Spread
from rlhf_dist.roles import LanguageModel, Prompts, Reference, Reward

PAPERS = {
    "credit_beam": Paper(
        title="From r to Q*: token credits and beam search of a DPO policy",
        year=2024,
        arxiv="2404.12358",
        rows=(66,),
        status="study",
        needs=("PREF", "HID", "EVAL"),
        assumed="beams grow by drawn chunks, not by the likeliest tokens; the policy and its reference are given",
    )
}


@dataclass(frozen=True, kw_only=True)
class CreditBeam:
    """Settings of the measurement."""

    beta: float = 0.1
    """Of the policy's DPO."""
    beams: int = 2
    """Beams of a prompt that are kept."""
    branch: int = 4
    """Chunks that are drawn to go on from each."""
    chunk: int = 16
    """Tokens of a chunk."""
    depth: int = 4
    """Chunks of a response."""


@host_op(reads=("prompt_ids",), writes=("base_ids", "said", "credit", "open"))
def begun(batch: Batch) -> Batch:
    """A beam with nothing in it for each prompt."""
    rows = batch.num_rows
    columns = {
        "base_ids": batch["prompt_ids"],
        "said": Column.strings([""] * rows),
        "credit": Column(np.zeros(rows, np.float32)),
        "open": Column(np.ones(rows, np.uint8)),
    }
    return Batch(columns, rows)


@host_op(
    reads=(
        *("log_probs", "ref_log_probs", "response_mask", "prompt_ids", "response_ids"),
        *("response", "said", "credit", "finished"),
    ),
    writes=("prompt_ids", "said", "credit", "open"),
)
def grown(batch: Batch, *, beta: float) -> HostResult:
    """Beams with their chunk behind what they have, and its credits added."""
    mask = batch["response_mask"]
    credit = beta * (batch["log_probs"].values.astype(np.float64) - batch["ref_log_probs"].values) * (mask.values > 0)
    ids = [np.concatenate([batch["prompt_ids"].row(k), batch["response_ids"].row(k)]) for k in range(batch.num_rows)]
    texts = [before + text for before, text in zip(batch["said"].rows(), batch["response"].rows(), strict=True)]
    columns = {
        "prompt_ids": Column.ragged(ids, dtype="int32"),
        "said": Column.strings(texts),
        "credit": Column((batch["credit"].values + sum_rows(credit, mask.offsets)).astype(np.float32)),
        "open": Column((batch["finished"].values == 0).astype(np.uint8)),
    }
    counted = credit[mask.values > 0]
    metrics: Metrics = {}
    if len(counted):
        metrics = {
            "token_credit": Mean(float(counted.sum()), float(len(counted))),
            "token_credit_std": Spread.of(counted),
        }
    return HostResult(columns=Batch(columns, batch.num_rows), metrics=metrics)


@host_op(reads=("credit", "group_id"), rows="drop", scope="groups")
def best_beams(batch: Batch, *, beams: int) -> HostResult:
    """The `beams` rows of each group with the largest sums, the first of equal ones."""
    credit = batch["credit"].values
    kept = [rows[np.argsort(-credit[rows], kind="stable")[:beams]] for rows in batch.group()]
    keep = np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int64)
    return HostResult(columns=Batch({}, len(keep)), keep=keep)


@host_op(reads=("prompt_ids", "base_ids", "said"), writes=("prompt_ids", "response_ids", "response_mask", "response"))
def whole(batch: Batch) -> Batch:
    """Beams as prompts and responses again."""
    base = batch["base_ids"]
    said = [batch["prompt_ids"].row(row)[len(base.row(row)) :] for row in range(batch.num_rows)]
    ids = Column.ragged(said, dtype="int32")
    columns = {"prompt_ids": base, "response_ids": ids, "response": batch["said"]}
    mask = Column(np.ones(len(ids.values), np.uint8), ids.offsets)
    return Batch({**columns, "response_mask": mask}, batch.num_rows)


@host_op(reads=("rewards", "plain_rewards", "credit"))
def compared(batch: Batch) -> HostResult:
    """Rewards of the best beams and of plain responses; a tie is half a win."""
    lead, rows = batch["rewards"].values - batch["plain_rewards"].values, float(batch.num_rows)
    metrics = {
        "beam_reward": Mean(float(batch["rewards"].values.sum()), rows),
        "plain_reward": Mean(float(batch["plain_rewards"].values.sum()), rows),
        "beam_wins": Mean(float((lead > 0).sum() + 0.5 * (lead == 0).sum()), rows),
        "implicit_reward": Mean(float(batch["credit"].values.sum()), rows),
    }
    return HostResult(columns=Batch({}, batch.num_rows), metrics=metrics if batch.num_rows else {})


@recipe
def credit_beam(prompts: Prompts, policy: LanguageModel, reference: Reference, reward: Reward, cfg: CreditBeam) -> None:
    """Credits, and responses by beams of them."""
    plain = reward.compute_reward(policy.generate_sequences(prompts, max_tokens=cfg.chunk * cfg.depth))
    left, done = begun(prompts), None
    for _ in range(cfg.depth):
        drawn = policy.generate_sequences(left, n=cfg.branch, max_tokens=cfg.chunk)
        drawn = grown(reference.compute_ref_log_prob(policy.compute_log_prob(drawn)), beta=cfg.beta)
        every = best_beams(drawn if done is None else drawn.concat(done), beams=cfg.beams)
        left, done = every.where("open")
    best = reward.compute_reward(whole(best_beams(every, beams=1)))
    compared(best.join(plain, on="group", plain_rewards="rewards"))
