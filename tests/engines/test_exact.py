"""Every engine against plain single-process PyTorch: the same numbers, however batch and model are cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.algorithms.contract import Loss
from rlhf_dist.batch import Batch
from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf_dist.metrics import Metrics
from rlhf_dist.wire import WorkerContext
from tests.engines.losses import (
    ENTROPY_BONUS,
    GroupLoss,
    RowLoss,
    ScoreLoss,
    TokenLoss,
    ValueLoss,
    make_batch,
)
from tests.engines.world import World
from tests.tiny import save_classifier, save_llama, save_qwen3

STEPS = 3
TEMPERATURE = 0.7
# A large eps keeps Adam from turning the sign of a rounding error into a full step.
OPTIMIZER = OptimizerConfig(
    lr=1e-2, schedule="cosine", warmup_steps=2, total_steps=4, weight_decay=0.1, grad_clip=0.5, eps=1e-3
)


# --- the plain reference ---------------------------------------------------------------------------
def padded(batch: Batch) -> tuple[Tensor, Tensor]:
    """Right-padded ids and attention mask."""
    sequences = [
        torch.tensor(np.concatenate([p, r]), dtype=torch.int64)
        for p, r in zip(batch["prompt_ids"].rows(), batch["response_ids"].rows(), strict=True)
    ]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    return ids, mask


def before_tokens(hidden: Tensor, batch: Batch) -> list[Tensor]:
    """Rows of `hidden` [B, S, ...] at the positions before each response token."""
    prompts, responses = batch["prompt_ids"].lengths, batch["response_ids"].lengths
    return [hidden[k, p - 1 : p - 1 + t] for k, (p, t) in enumerate(zip(prompts, responses, strict=True))]


def plain_log_probs(model: Any, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    ids, mask = padded(batch)
    logits = [row / TEMPERATURE for row in before_tokens(model(ids, attention_mask=mask).logits, batch)]
    log_p = [row.log_softmax(-1) for row in logits]
    targets = [torch.tensor(row, dtype=torch.int64) for row in batch["response_ids"].rows()]
    chosen = [row.gather(1, target[:, None])[:, 0] for row, target in zip(log_p, targets, strict=True)]
    return chosen, [-(row.exp() * row).sum(-1) for row in log_p]


def plain_loss(loss: Loss, model: Any, batch: Batch) -> Tensor:
    masks = [torch.tensor(row).float() for row in batch["response_mask"].rows()]
    count = sum(mask.sum() for mask in masks)
    if isinstance(loss, ValueLoss | ScoreLoss):
        ids, attention = padded(batch)
        hidden = model.base_model(ids, attention_mask=attention).last_hidden_state
        values = model.score(hidden)[..., 0]
    if isinstance(loss, ValueLoss):
        returns = [torch.tensor(row) for row in batch["returns"].rows()]
        errors = zip(before_tokens(values, batch), returns, masks, strict=True)
        return sum(((value - target) ** 2 * mask).sum() for value, target, mask in errors) / count
    if isinstance(loss, ScoreLoss):
        last = batch["prompt_ids"].lengths + batch["response_ids"].lengths - 1
        signed = values[torch.arange(batch.num_rows), torch.tensor(last)] * torch.tensor(batch["label"].values)
        return torch.stack([-F.logsigmoid(signed[torch.tensor(rows)].sum()) for rows in batch.group()]).mean()
    log_probs, entropy = plain_log_probs(model, batch)
    if isinstance(loss, TokenLoss):
        parts = zip(batch["advantages"].rows(), log_probs, entropy, masks, strict=True)
        return sum(((-torch.tensor(a) * lp - ENTROPY_BONUS * e) * m).sum() for a, lp, e, m in parts) / count
    sums = torch.stack([(lp * m).sum() for lp, m in zip(log_probs, masks, strict=True)])
    if isinstance(loss, RowLoss):
        means = sums / torch.stack([m.sum().clamp(min=1) for m in masks])
        return -(torch.tensor(batch["weight"].values) * means).mean()
    signed = torch.tensor(batch["label"].values) * sums
    return torch.stack([-F.logsigmoid(0.3 * signed[torch.tensor(rows)].sum()) for rows in batch.group()]).mean()


def plain_training(
    folder: Path, loss: Loss, batches: Sequence[Batch]
) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """Parameters, and (loss, gradient norm) of each step, of ordinary full-batch training."""
    family = AutoModelForSequenceClassification if isinstance(loss, ValueLoss | ScoreLoss) else AutoModelForCausalLM
    model = family.from_pretrained(folder, dtype=torch.float32).eval()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    history = []
    for step, batch in enumerate(batches):
        # Warm-up of two steps, then a cosine over two more: 1/2, 1, 1, 1/2 of the peak.
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr * (0.5, 1.0, 1.0)[step]
        optimizer.zero_grad()
        value = plain_loss(loss, model, batch)
        value.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.grad_clip)
        optimizer.step()
        history.append((float(value.detach()), float(norm)))
    return {name: p.detach() for name, p in model.named_parameters()}, history


# --- on the ranks ----------------------------------------------------------------------------------
def new_engine(
    folder: Path,
    head: str = "policy",
    trained: bool = True,
    init: str = "pretrained",
    device: str = "cpu",
    **engine: Any,
) -> Any:
    from workers.build_engines import new_training_engine

    context = WorkerContext(role="actor", rank=dist.get_rank(), world=dist.get_world_size(), device=device, seed=0)
    optimizer = OPTIMIZER if trained else None
    model = ModelConfig(path=str(folder), init=init)
    return new_training_engine(model, EngineConfig(**engine), optimizer, head, context)  # type: ignore[arg-type]


def my_rows(batch: Batch, split: str, sharing: int = 1) -> Batch:
    """This rank's share: whole groups in turn, or everything on rank 0. `sharing` neighbours have the same rows."""
    share, shares = dist.get_rank() // sharing, dist.get_world_size() // sharing
    if split == "all on rank 0":
        return batch if share == 0 else batch.slice(0, 0)
    groups = batch.group()[share::shares]
    return batch.take(np.concatenate([*groups, np.empty(0, np.int64)]))


def train(
    folder: Path, loss: Loss, head: str, batches: list[Batch], split: str, engine: dict[str, Any]
) -> tuple[dict[str, np.ndarray], list[Metrics]]:
    trained = new_engine(folder, head, **engine)
    sharing = engine.get("sequence_parallel", 1) * engine.get("tensor_parallel", 1)
    metrics = [trained.step(my_rows(batch, split, sharing), loss, TEMPERATURE) for batch in batches]
    assert trained.version == len(batches)
    return {n: t.numpy() for bucket in trained.full_weights(torch.float32, 20_000) for n, t in bucket}, metrics


# --- tests -----------------------------------------------------------------------------------------
BATCHES = [make_batch(seed) for seed in range(STEPS)]
LOSSES = [TokenLoss(), RowLoss(), GroupLoss(), ValueLoss(), ScoreLoss()]
CUTS = {
    "one pass, all on rank 0": ("all on rank 0", {"micro_batch_tokens": 10_000}),
    "a row a pass, uneven ranks": ("groups in turn", {"micro_batch_tokens": 1, "logit_chunk_tokens": 3}),
    "a few rows a pass, recomputed": ("groups in turn", {"micro_batch_tokens": 40, "activation_checkpointing": True}),
    "a few rows a pass, all on rank 0": ("all on rank 0", {"micro_batch_tokens": 40}),
}


ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp": (2, {}),
    "deepspeed 1": (2, {"name": "deepspeed", "zero_stage": 1}),
    "deepspeed 2": (2, {"name": "deepspeed", "zero_stage": 2}),
    "deepspeed 3": (2, {"name": "deepspeed", "zero_stage": 3}),
    "deepspeed 3 alone": (1, {"name": "deepspeed"}),
    "deepspeed 1 on four": (4, {"name": "deepspeed", "zero_stage": 1}),
    "deepspeed 3 on four": (4, {"name": "deepspeed"}),
    "kept gathered": (2, {"zero_stage": 2}),
    "padded": (2, {"packing": False}),
    "two sequence pieces": (2, {"sequence_parallel": 2}),
    "two tensor pieces": (2, {"tensor_parallel": 2}),
    "two replicas": (2, {"replicas": 2}),
    "replicas of sequences": (4, {"replicas": 2, "sequence_parallel": 2}),
    "replicas of tensor pieces": (4, {"replicas": 2, "tensor_parallel": 2}),
    "shards of tensor pieces": (4, {"tensor_parallel": 2}),
}
"""Name -> ranks and settings."""


def check_exact(world: World, folder: Path, loss: Loss, cut: str, engine: dict[str, Any] | None = None) -> None:
    head = "value" if isinstance(loss, ValueLoss | ScoreLoss) else "policy"
    split, settings = CUTS[cut]
    engine = settings | (engine or {})
    expected, history = plain_training(folder, loss, BATCHES)
    initial, _ = plain_training(folder, loss, [])
    results = world.run(train, folder, loss, head, BATCHES, split, engine)
    for weights, metrics in results:
        assert set(weights) == set(expected)
        for name, value in expected.items():
            scale = float(value.abs().max())
            moved = float((value - initial[name]).abs().max())
            error = float((torch.from_numpy(weights[name]) - value).abs().max())
            assert moved > 1e-3 * scale, f"{name} must have moved for this test to mean anything"
            assert error <= 1e-5 * scale, f"{name} differs by {error / scale:.1e}"
        # The norm is checked before clipping and Adam, which both forgive a gradient that is off by a factor.
        found = [(m["loss"].value, m["grad_norm"].value) for m in metrics]
        np.testing.assert_allclose(found, history, rtol=1e-5)
        assert metrics == results[0][1], "every rank reports the same metrics"


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_training_on_two_ranks_equals_plain_training(
    world2: World, llama: Path, classifier: Path, loss: Loss, cut: str
) -> None:
    check_exact(world2, classifier if isinstance(loss, ValueLoss | ScoreLoss) else llama, loss, cut)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "fsdp"])
def test_training_on_every_engine_equals_plain_training(
    request: pytest.FixtureRequest, llama: Path, tied_llama: Path, classifier: Path, engine: str
) -> None:
    ranks, settings = ENGINES[engine]
    world = request.getfixturevalue(f"world{ranks}")
    check_exact(world, llama, TokenLoss(), "a few rows a pass, recomputed", settings)
    check_exact(world, tied_llama, GroupLoss(), "a few rows a pass, all on rank 0", settings)
    check_exact(world, classifier, ValueLoss(), "a row a pass, uneven ranks", settings)
    check_exact(world, classifier, ScoreLoss(), "one pass, all on rank 0", settings)


def test_tokens_cut_over_sequence_and_tensor_ranks_at_once_equal_plain_training(world4: World, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "four_key_heads", kv_heads=4)
    both = {"sequence_parallel": 2, "tensor_parallel": 2}
    check_exact(world4, folder, TokenLoss(), "a row a pass, uneven ranks", both)


def test_a_qwen3_cut_over_tensor_ranks_equals_plain_training(world2: World, tmp_path: Path) -> None:
    """Its norms over a head's size see only the rank's own heads."""
    folder = save_qwen3(tmp_path / "qwen3")
    check_exact(world2, folder, TokenLoss(), "a few rows a pass, recomputed", {"tensor_parallel": 2})
    check_exact(world2, folder, TokenLoss(), "a few rows a pass, recomputed", {"sequence_parallel": 2})


@pytest.mark.parametrize("loss", LOSSES[:3], ids=lambda loss: type(loss).__name__)
def test_training_a_tied_model_on_one_rank_equals_plain_training(world1: World, tied_llama: Path, loss: Loss) -> None:
    check_exact(world1, tied_llama, loss, "a few rows a pass, recomputed")


def test_training_a_tied_qwen3_on_four_ranks_equals_plain_training(world4: World, tmp_path: Path) -> None:
    check_exact(world4, save_qwen3(tmp_path / "qwen3"), TokenLoss(), "a few rows a pass, recomputed")


def forward(folder: Path, batch: Batch, split: str) -> dict[str, list[np.ndarray]]:
    engine = new_engine(folder, trained=False, micro_batch_tokens=30, logit_chunk_tokens=7)
    columns = engine.forward(my_rows(batch, split), ["log_probs", "entropy"], TEMPERATURE)
    return {name: column.rows() for name, column in columns.items()}


@pytest.mark.parametrize("split", ["all on rank 0", "groups in turn"])
def test_log_probs_and_entropy_equal_those_of_the_logits(world2: World, llama: Path, split: str) -> None:
    batch = BATCHES[0]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.no_grad():
        log_probs, entropy = plain_log_probs(model, batch)
    results = world2.run(forward, llama, batch, split)
    groups = batch.group()
    order = np.concatenate([*groups[0::2], *groups[1::2]]) if split == "groups in turn" else np.arange(batch.num_rows)
    for name, plain in (("log_probs", log_probs), ("entropy", entropy)):
        rows = results[0][name] + results[1][name]
        assert len(rows) == batch.num_rows and any(len(row) == 0 for row in rows)
        for row, k in zip(rows, order, strict=True):
            np.testing.assert_allclose(row, plain[k].numpy(), rtol=2e-5, atol=2e-5)
            assert row.dtype == np.float32


def values_and_scores(folder: Path, batch: Batch) -> tuple[list[np.ndarray], np.ndarray]:
    engine = new_engine(folder, "value", trained=False, micro_batch_tokens=30)
    mine = my_rows(batch, "all on rank 0")
    return engine.forward(mine, ["values"])["values"].rows(), engine.scores(mine)


def test_values_are_read_before_each_token_and_scores_at_the_last(world2: World, classifier: Path) -> None:
    batch = BATCHES[1]
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32).eval()
    ids, mask = padded(batch)
    with torch.no_grad():
        at = model.score(model.base_model(ids, attention_mask=mask).last_hidden_state)[..., 0]
        pooled = model(ids, attention_mask=mask).logits[:, 0].numpy()
    (values, scores), (nothing, no_scores) = world2.run(values_and_scores, classifier, batch)
    for row, plain in zip(values, before_tokens(at, batch), strict=True):
        np.testing.assert_allclose(row, plain.numpy(), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(scores, pooled, rtol=2e-5, atol=2e-5)
    assert nothing == [] and len(no_scores) == 0


def mixed(folder: Path, batches: list[Batch], budget: int) -> tuple[dict[str, np.ndarray], Metrics]:
    engine = new_engine(folder, micro_batch_tokens=budget)
    terms = [(1.0, TokenLoss(), my_rows(batches[0], "groups in turn"))]
    terms += [(0.5, RowLoss(), my_rows(batches[1], "all on rank 0"))]
    metrics = engine.step_many(terms, TEMPERATURE)
    return {n: t.numpy() for bucket in engine.full_weights(torch.float32, 1 << 20) for n, t in bucket}, metrics


def test_a_weighted_sum_of_losses_over_two_batches_is_one_exact_step(world2: World, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    first, second = (plain_loss(loss, model, b) for loss, b in zip((TokenLoss(), RowLoss()), BATCHES, strict=False))
    (first + 0.5 * second).backward()  # type: ignore[no-untyped-call]
    norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    results = [world2.run(mixed, llama, BATCHES, budget) for budget in (20, 10_000)]
    for weights, metrics in (*results[0], *results[1]):
        assert metrics["grad_norm"].value == pytest.approx(norm, rel=1e-5)
        assert metrics["loss"].value == pytest.approx(float((first + 0.5 * second).detach()), rel=1e-5)
        assert metrics["TokenLoss/loss"].value == pytest.approx(float(first.detach()), rel=1e-5)
        for name, value in results[0][0][0].items():
            np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-5 * np.abs(value).max())
