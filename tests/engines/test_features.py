"""What an engine does beside plain training: adapters, parameter groups, compiled layers, hidden states, offload."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_dist.batch import Batch
from rlhf_dist.config import EngineConfig, LoraConfig, ModelConfig, OptimizerConfig
from rlhf_dist.metrics import Metrics
from rlhf_dist.wire import WorkerContext
from tests.engines.losses import RowLoss, TokenLoss, ValueLoss, make_batch
from tests.engines.test_exact import TEMPERATURE, before_tokens, my_rows, padded, plain_loss
from tests.engines.world import World

STEADY = OptimizerConfig(lr=1e-2, eps=1e-3)


def new_engine(folder: Path, optimizer: OptimizerConfig | None, head: str = "policy", **engine: Any) -> Any:
    import torch.distributed as dist

    from workers.build_engines import new_training_engine

    context = WorkerContext(role="actor", rank=dist.get_rank(), world=dist.get_world_size(), device="cpu", seed=0)
    return new_training_engine(ModelConfig(path=str(folder)), EngineConfig(**engine), optimizer, head, context)  # type: ignore[arg-type]


def weights_of(engine: Any) -> dict[str, np.ndarray]:
    return {n: t.numpy() for bucket in engine.full_weights(torch.float32, 1 << 20) for n, t in bucket}


# --- adapters ----------------------------------------------------------------------------------------
LORA = LoraConfig(rank=4, alpha=8.0)


def train_adapters(folder: Path, batches: list[Batch], **engine: Any) -> tuple[dict[str, np.ndarray], Any, Any, Any]:
    engine_ = new_engine(folder, STEADY, lora=LORA, micro_batch_tokens=40, **engine)
    before = engine_.forward(my_rows(batches[0], "groups in turn"), ["log_probs"])["log_probs"].values
    for batch in batches:
        engine_.step(my_rows(batch, "groups in turn"), TokenLoss(), TEMPERATURE)
    base = engine_.forward(my_rows(batches[0], "groups in turn"), ["log_probs"], base=True)["log_probs"].values
    sums = engine_.checksums(torch.float32)
    return weights_of(engine_), before, base, sums


def plain_adapters(folder: Path, batches: list[Batch]) -> dict[str, Tensor]:
    """peft on one process, full batches."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=LORA.targets, lora_dropout=0.0)
    peft.inject_adapter_in_model(settings, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, start in model.named_parameters():
            if "lora_A" in name:
                torch.nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=STEADY.lr, betas=STEADY.betas, eps=STEADY.eps, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        plain_loss(TokenLoss(), model, batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, STEADY.grad_clip)
        optimizer.step()
    merged = {}
    for name, value in model.named_parameters():
        if "lora_" in name:
            continue
        if "base_layer" in name:
            layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
            value = value + layer.get_delta_weight("default")
        merged[name.replace(".base_layer", "")] = value.detach()
    return merged


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_train_as_peft_trains_them_and_merge_into_the_weights(
    request: pytest.FixtureRequest, llama: Path, ranks: int
) -> None:
    from rlhf_dist.reshard.checksum import full_checksum

    batches = [make_batch(seed) for seed in range(3)]
    expected = plain_adapters(llama, batches)
    plain = dict(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).named_parameters())
    results = request.getfixturevalue(f"world{ranks}").run(train_adapters, llama, batches)
    for weights, before, base, sums in results:
        assert set(weights) == set(expected)
        for name, value in expected.items():
            error = np.abs(weights[name] - value.numpy()).max() / float(value.abs().max())
            assert error <= 1e-5, f"{name} differs by {error:.1e}"
            assert sums[name] == full_checksum(torch.from_numpy(weights[name]))
        np.testing.assert_array_equal(base, before)  # the base does not move, and adapters start at zero
    moved = [name for name, value in plain.items() if not np.array_equal(results[0][0][name], value.detach().numpy())]
    assert moved and all("_proj" in name for name in moved)


# --- parameter groups --------------------------------------------------------------------------------
def train_with_scales(folder: Path, scales: dict[str, float]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    engine = new_engine(folder, OptimizerConfig(lr=1e-2, lr_scale=scales, weight_decay=0.1), "value")
    before = weights_of(engine)
    engine.step(my_rows(make_batch(), "groups in turn"), ValueLoss())
    return before, weights_of(engine)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_a_learning_rate_scale_moves_a_head_further_and_holds_others_still(
    world2: World, llama: Path, name: str
) -> None:
    before, after = world2.run(train_with_scales, llama, {"score": 10, "embed_tokens": 0})[0]
    np.testing.assert_array_equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    # Adam's first step is the learning rate, wherever the gradient is not tiny.
    assert np.abs(after["score.weight"] - before["score.weight"]).max() == pytest.approx(0.1, rel=1e-3)
    moved = np.abs(after["model.norm.weight"] - before["model.norm.weight"]).max()
    assert 0 <= moved <= 0.0101


def test_a_learning_rate_scale_that_finds_nothing_is_an_error(world1: World, llama: Path) -> None:
    with pytest.raises(RuntimeError, match="lr_scale: 'hat' finds none of"):
        world1.run(train_with_scales, llama, {"hat": 2.0})


# --- compiled layers ---------------------------------------------------------------------------------
def compiled_and_not(folder: Path) -> list[tuple[dict[str, np.ndarray], Metrics]]:
    found = []
    for compiled in (True, False):
        engine = new_engine(folder, STEADY, compile=compiled, micro_batch_tokens=60)
        metrics = [engine.step(my_rows(make_batch(seed), "groups in turn"), TokenLoss()) for seed in range(2)]
        found.append((weights_of(engine), metrics[-1]))
    return found


def test_compiled_layers_train_alike(world1: World, llama: Path) -> None:
    (one, first), (other, second) = world1.run(compiled_and_not, llama)[0]
    assert first["grad_norm"].value == pytest.approx(second["grad_norm"].value, rel=1e-4)
    for name, value in other.items():
        np.testing.assert_allclose(one[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


# --- hidden states, offload, random numbers ----------------------------------------------------------
def hidden_states(folder: Path, batch: Batch, engine: dict[str, Any]) -> list[np.ndarray]:
    return new_engine(folder, None, micro_batch_tokens=30, **engine).hidden_states(my_rows(batch, "all on rank 0"))


@pytest.mark.parametrize("engine", [{}, {"name": "deepspeed"}], ids=["fsdp", "deepspeed"])
def test_hidden_states_are_those_that_tokens_are_predicted_from(
    world2: World, llama: Path, engine: dict[str, Any]
) -> None:
    batch = make_batch()
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids, mask = padded(batch)
    with torch.no_grad():
        expected = before_tokens(model.base_model(ids, attention_mask=mask).last_hidden_state, batch)
    mine, nothing = world2.run(hidden_states, llama, batch, engine)
    assert nothing == [] and len(mine) == batch.num_rows
    for row, value in zip(mine, expected, strict=True):
        assert row.shape == value.shape and row.dtype == np.float32
        np.testing.assert_allclose(row, value.numpy(), rtol=2e-5, atol=2e-5)


def applied(apply: Any, engine: Any, lr: float) -> float:
    """The engine's own step, once its gradients are seen to take what it says they do."""
    gradients = [p.grad.to_local() for p in engine._parameters.values() if p.grad is not None]
    assert sum(gradient.nbytes for gradient in gradients) == engine.gradient_bytes
    return float(apply(lr))


def away_between_steps(
    folder: Path, engine: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, int]]:
    """Weights after steps with everything moved in between, and without; bytes of each part while it was away."""
    rows, results, left = my_rows(make_batch(), "groups in turn"), [], {}
    for moves in (True, False):
        trained = new_engine(folder, STEADY, **engine)
        if trained._config.name == "fsdp":
            trained._apply = partial(applied, trained._apply, trained)
        for _ in range(2):
            if moves:
                parts = trained.device_parts()
                sizes = {kind: part.leave() for kind, part in parts.items()}
                left = {kind: part.held_bytes for kind, part in parts.items()}
                with pytest.raises(RuntimeError, match="take the turn first"):
                    trained.local_shards()
                for kind, part in parts.items():
                    assert part.come() in (part.nbytes, 0) and part.held_bytes == part.nbytes >= sizes[kind]
                    part.written()
            trained.step(rows, TokenLoss())
        results.append(weights_of(trained))
    return results[0], results[1], left


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"lora": LoraConfig(rank=4)},
        {"name": "deepspeed", "zero_stage": 1, "dtype": "bfloat16"},
        {"name": "deepspeed"},
    ],
    ids=["fsdp", "lora", "zero-1", "zero-3"],
)
def test_what_leaves_between_steps_comes_back_as_it_was(world2: World, llama: Path, engine: dict[str, Any]) -> None:
    for one, other, left in world2.run(away_between_steps, llama, engine):
        assert all(np.array_equal(one[name], other[name]) for name in other)
        assert {"parameters", "optimizer"} <= left.keys() and not any(left.values()), "nothing of it stays"


class NoisyLoss(RowLoss):
    """Draws a random number for each row, as a user's loss may."""

    def __call__(self, model: Any, rows: Any) -> Any:
        loss, metrics = super().__call__(model, rows)
        return loss * torch.rand(len(loss)), metrics


def noisy_steps(folder: Path, checkpoint: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rows = my_rows(make_batch(), "groups in turn")
    straight = new_engine(folder, STEADY)
    straight.step(rows, NoisyLoss())
    straight.save(checkpoint).result(60)
    torch.rand(17)  # whatever else draws in this process
    straight.step(rows, NoisyLoss())
    resumed = new_engine(folder, STEADY)
    resumed.load(checkpoint)
    resumed.step(rows, NoisyLoss())
    return weights_of(straight), weights_of(resumed)


def test_random_numbers_in_a_loss_are_the_same_after_a_resume(world2: World, llama: Path, tmp_path: Path) -> None:
    for straight, resumed in world2.run(noisy_steps, llama, tmp_path / "checkpoint"):
        assert all(np.array_equal(straight[name], resumed[name]) for name in straight)
