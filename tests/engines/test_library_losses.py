"""The library's losses on the engine: plain single-process training, however the batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.algorithms import bradley_terry, dpo, ipo, nll, policy_gradient, ppo_clip, value_clip
from rlhf_dist.algorithms.contract import Loss, ModelOutput, Rows
from rlhf_dist.batch import Batch, Column
from tests.engines.losses import make_batch
from tests.engines.test_exact import (
    OPTIMIZER,
    TEMPERATURE,
    before_tokens,
    my_rows,
    new_engine,
    padded,
    plain_log_probs,
    train,
)
from tests.engines.world import World
from tests.tiny import VOCABULARY, llama_config, save_classifier

Plain = Callable[[Batch, list[Tensor]], Tensor]

CUTS = {
    "one pass, a rank without rows": ("all on rank 0", {"micro_batch_tokens": 10_000}),
    "a row a pass": ("groups in turn", {"micro_batch_tokens": 1, "logit_chunk_tokens": 3}),
    "a few rows a pass, recomputed": ("groups in turn", {"micro_batch_tokens": 40, "activation_checkpointing": True}),
}


def batch_for_losses(seed: int) -> Batch:
    """make_batch with the log-probs and values that forward passes before the update would have left."""
    batch = make_batch(seed)
    random, tokens = np.random.default_rng(seed), batch["response_ids"]
    added = {
        name: Column(random.normal(mean, 0.5, len(tokens.values)).astype(np.float32), tokens.offsets)
        for name, mean in (("old_log_probs", -4.0), ("ref_log_probs", -4.0), ("values", 0.0))
    }
    return batch.with_columns(added)


BATCHES = [batch_for_losses(seed) for seed in range(3)]


# --- three losses by hand, from log-probs of each row -------------------------------------------------
def column(batch: Batch, name: str) -> list[Tensor]:
    return [torch.tensor(row).float() for row in batch[name].rows()]


def plain_nll(batch: Batch, log_probs: list[Tensor]) -> Tensor:
    masks = column(batch, "response_mask")
    return -(torch.cat(log_probs) * torch.cat(masks)).sum() / torch.cat(masks).sum()


def clipped(batch: Batch, log_probs: list[Tensor]) -> list[Tensor]:
    rows = zip(log_probs, column(batch, "old_log_probs"), column(batch, "advantages"), strict=True)
    ratios = [((new - old).exp(), advantage) for new, old, advantage in rows]
    return [-torch.min(ratio * a, ratio.clamp(0.8, 1.3) * a) for ratio, a in ratios]


def plain_ppo_tokens(batch: Batch, log_probs: list[Tensor]) -> Tensor:
    masks = torch.cat(column(batch, "response_mask"))
    return (torch.cat(clipped(batch, log_probs)) * masks).sum() / masks.sum()


def plain_ppo_rows(batch: Batch, log_probs: list[Tensor]) -> Tensor:
    rows = zip(clipped(batch, log_probs), column(batch, "response_mask"), strict=True)
    return torch.stack([(loss * mask).sum() / mask.sum().clamp(min=1) for loss, mask in rows]).mean()


def plain_dpo(batch: Batch, log_probs: list[Tensor]) -> Tensor:
    rows = zip(log_probs, column(batch, "ref_log_probs"), column(batch, "response_mask"), strict=True)
    ratios = [((new - ref) * mask).sum() for new, ref, mask in rows]
    pairs = []
    for members in batch.group():
        chosen, rejected = (next(k for k in members if batch["label"].values[k] == sign) for sign in (1, -1))
        pairs.append(-F.logsigmoid(0.2 * (ratios[chosen] - ratios[rejected])))
    return torch.stack(pairs).mean()


# --- the others: the loss itself over one unpacked batch ----------------------------------------------
def plain_mean(loss: Loss, batch: Batch, outputs: ModelOutput) -> Tensor:
    groups = np.unique(batch["group_id"].values, return_inverse=True)[1]
    rows = Rows(
        columns={name: torch.from_numpy(batch[name].values.copy()) for name in loss.reads},
        mask=torch.from_numpy(batch["response_mask"].values.copy()).float(),
        row_of_token=torch.from_numpy(np.repeat(np.arange(batch.num_rows), batch["response_ids"].lengths)),
        group_of_row=torch.from_numpy(groups),
        num_groups=len(set(groups.tolist())),
    )
    values, _ = loss(outputs, rows)
    if loss.average == "rows_with_tokens":
        return values.sum() / (rows.sum_tokens(rows.mask) > 0).sum()
    return (values * rows.mask).sum() / rows.mask.sum() if loss.average == "tokens" else values.mean()


def plain_loss(loss: Loss, by_hand: Plain | None, model: Any, batch: Batch) -> Tensor:
    if head_of(loss) == "policy":
        log_probs, entropy = plain_log_probs(model, batch)
        if by_hand:
            return by_hand(batch, log_probs)
        return plain_mean(loss, batch, ModelOutput(log_probs=torch.cat(log_probs), entropy=torch.cat(entropy)))
    ids, mask = padded(batch)
    at = model.score(model.base_model(ids, attention_mask=mask).last_hidden_state)[..., 0]
    ends = torch.from_numpy(batch["prompt_ids"].lengths + batch["response_ids"].lengths - 1)
    values = torch.cat(before_tokens(at, batch))
    return plain_mean(loss, batch, ModelOutput(values=values, scores=at[torch.arange(len(ends)), ends]))


def plain_training(folder: Path, loss: Loss, by_hand: Plain | None, batches: list[Batch]) -> dict[str, Tensor]:
    family = AutoModelForCausalLM if head_of(loss) == "policy" else AutoModelForSequenceClassification
    model = family.from_pretrained(folder, dtype=torch.float32).eval()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr * (0.5, 1.0, 1.0)[step]
        optimizer.zero_grad()
        plain_loss(loss, by_hand, model, batch).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.grad_clip)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def head_of(loss: Loss) -> str:
    return "value" if {"values", "scores"} & set(loss.outputs) else "policy"


LOSSES: dict[str, tuple[Loss, Plain | None]] = {
    "nll": (nll(), plain_nll),
    "nll rows weighted": (nll(weighted=True, average="rows"), None),
    "ppo_clip tokens": (ppo_clip(0.2, clip_high=0.3), plain_ppo_tokens),
    "ppo_clip rows": (ppo_clip(0.2, clip_high=0.3, average="rows"), plain_ppo_rows),
    "ppo_clip sequence kl": (ppo_clip(ratio="sequence", kl_coef=0.1, entropy_coef=0.05, average="rows"), None),
    "dpo": (dpo(0.2), plain_dpo),
    "policy_gradient": (policy_gradient(entropy_coef=0.05), None),
    "policy_gradient rows": (policy_gradient(average="rows", row_divisor=1), None),
    "value_clip": (value_clip(0.2), None),
    "bradley_terry": (bradley_terry(), None),
    "ppo_clip groups capped": (
        ppo_clip(average="groups", kl_coef=0.1, kl_cap=0.2, advantage_clip=1.0, old="recomputed"),
        None,
    ),
    "value_clip rows with tokens": (value_clip(0.2, coef=1.0, average="rows_with_tokens"), None),
    "ipo mean": (ipo(0.5, length_normalised=True), None),
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("library_classifier"))


@pytest.mark.parametrize("name", LOSSES)
def test_three_steps_of_a_library_loss_equal_plain_training_however_cut(
    world2: World, llama: Path, classifier: Path, name: str
) -> None:
    loss, by_hand = LOSSES[name]
    head = head_of(loss)
    folder = llama if head == "policy" else classifier
    expected = plain_training(folder, loss, by_hand, BATCHES)
    initial = plain_training(folder, loss, by_hand, [])
    for cut, (split, engine) in CUTS.items():
        for weights, _ in world2.run(train, folder, loss, head, BATCHES, split, engine):
            assert set(weights) == set(expected)
            for key, value in expected.items():
                scale = float(value.abs().max())
                assert float((value - initial[key]).abs().max()) > 1e-3 * scale, f"{key} must have moved"
                error = float((torch.from_numpy(weights[key]) - value).abs().max())
                assert error <= 1e-5 * scale, f"{cut}: {key} differs by {error / scale:.1e}"


# --- memory ----------------------------------------------------------------------------------------
class LogitRows(TorchDispatchMode):
    """The most tokens of any [tokens, vocabulary] tensor, in either order, that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.ndim >= 2 and len(VOCABULARY) in tensor.shape:
                rows = tensor.numel() // len(VOCABULARY)
                # [vocabulary, hidden] is the head itself, and its gradient.
                self.most = max(self.most, 0 if llama_config().hidden_size in tensor.shape else rows)
        return result


def most_logit_rows(folder: Path, chunk: int) -> tuple[int, int, int]:
    engine = new_engine(folder, micro_batch_tokens=10_000, logit_chunk_tokens=chunk)
    batch = my_rows(BATCHES[0], "all on rank 0")
    with LogitRows() as forward:
        engine.forward(batch, ["log_probs", "entropy"], TEMPERATURE)
    with LogitRows() as step:
        engine.step(batch, policy_gradient(entropy_coef=0.05), TEMPERATURE)
    return forward.most, step.most, len(batch["response_ids"].values)


def test_logits_of_more_than_a_chunk_of_tokens_never_exist(world1: World, tied_llama: Path) -> None:
    forward, step, tokens = world1.run(most_logit_rows, tied_llama, 7)[0]
    assert 0 < forward <= 7 < tokens and 0 < step <= 7
    # The probe sees them where one chunk holds every token.
    assert world1.run(most_logit_rows, tied_llama, 10_000)[0] == (tokens, tokens, tokens)
