"""Open outputs of every engine against plain single-process PyTorch: hidden states, heads, distributions, teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf_dist.algorithms import Head, ModelOutput, OverVocabulary, loss
from rlhf_dist.algorithms.losses.distill import divergence
from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import EngineConfig, ModelConfig
from rlhf_dist.wire import WorkerContext
from tests.engines.losses import make_batch
from tests.engines.test_exact import OPTIMIZER, TEMPERATURE, before_tokens, my_rows, padded
from tests.engines.world import World
from tests.tiny import save_llama
from workers.engines.packing import rows_of

HEADS = (Head(name="quality", outputs=2, at="last_token", scale=0.1), Head(name="risk", scale=0.1), Head(name="idle"))
K = 3


def collision(log_p: Tensor, weight: Tensor) -> Tensor:
    """Chance that two draws are the same token, times a column."""
    return (2 * log_p).exp().sum(-1) * weight


@loss(
    reads=("label", "returns", "top_log_probs", "top_log_rest"),
    outputs=(
        *("log_probs", "hidden", "heads.quality", "heads.risk", "log_probs_at.top_ids"),
        OverVocabulary(name="collision", function=collision, reads=("returns",)),
        OverVocabulary(name="jsd", function=lambda p, q: divergence(p, q, kl="jsd", beta=0.3), teacher="teacher"),
    ),
    average="rows",
)
def everything(model: Any, rows: Any) -> Any:
    """A term of each output."""
    per_token = -model.log_probs + 0.1 * model.hidden.square().mean(-1) + (model.heads["risk"] - rows["returns"]) ** 2
    log_p = torch.cat([model.log_probs_at["top_ids"], model.log_rest["top_ids"][:, None]], -1)
    log_q = torch.cat([rows["top_log_probs"], rows["top_log_rest"][:, None]], -1)
    per_token = per_token + divergence(log_p, log_q, kl="reverse", beta=0.5)
    per_token = per_token + model.over_vocabulary["collision"] + model.over_vocabulary["jsd"]
    quality = F.cross_entropy(model.heads["quality"], (rows["label"] > 0).long(), reduction="none")
    return rows.mean_tokens(per_token) + quality, {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student with heads beside it, and a wider teacher."""
    student = save_llama(tmp_path_factory.mktemp("student"))
    width = AutoModelForCausalLM.from_pretrained(student).config.hidden_size
    generator = torch.Generator().manual_seed(5)
    weights = {h.name: torch.randn(h.outputs, width, generator=generator) * 0.3 for h in HEADS if h.name != "idle"}
    save_file(weights, student / "heads.safetensors")
    return student, save_llama(tmp_path_factory.mktemp("teacher"), tied=True)


def plain_outputs(model: Any, heads: dict[str, Tensor], batch: Batch, hidden: Any = None) -> dict[str, Tensor]:
    ids, mask = padded(batch)
    states = model.base_model(ids, attention_mask=mask).last_hidden_state
    before = torch.cat(before_tokens(states, batch))
    log_p = (model.lm_head(before) / TEMPERATURE).log_softmax(-1)
    targets = torch.from_numpy(batch["response_ids"].values.astype(np.int64))
    last = torch.from_numpy(batch["prompt_ids"].lengths + batch["response_ids"].lengths - 1)
    found = {
        "log_probs": log_p.gather(1, targets[:, None])[:, 0],
        "hidden": before,
        "log_p": log_p,
        "heads.quality": states[torch.arange(batch.num_rows), last] @ heads["quality"].T,
        "heads.risk": before @ heads["risk"][0],
    }
    if "top_ids" in batch:
        at = torch.from_numpy(batch["top_ids"].values.astype(np.int64))
        rest = (1 - log_p.double().exp().gather(1, at).sum(-1)).log().float()
        found["log_probs_at.top_ids"] = torch.cat([log_p.gather(1, at), rest[:, None]], -1)
        found["over_vocabulary.collision"] = collision(log_p, torch.from_numpy(batch["returns"].values))
    return found


def with_teacher(batch: Batch, folder: Path) -> tuple[Batch, Tensor]:
    """The batch with what the teacher says of it, by plain PyTorch; and its distributions [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = plain_outputs(model, {"quality": torch.zeros(1, 32), "risk": torch.zeros(1, 32)}, batch)
    chosen, at = found["log_p"].topk(K)
    offsets = batch["response_ids"].offsets
    rest = (1 - chosen.double().exp().sum(-1)).log().float()
    columns = {
        "hidden": Column(found["hidden"].numpy(), offsets),
        "top_ids": Column(at.int().numpy(), offsets),
        "top_log_probs": Column(chosen.numpy(), offsets),
        "top_log_rest": Column(rest.numpy(), offsets),
    }
    return batch.with_columns(columns), found["log_p"]


def new_engine(folder: Path, heads: Any = HEADS, head: Any = "policy", trained: bool = True, **engine: Any) -> Any:
    from workers.engines.build import new_training_engine

    frozen = {"teacher": str(engine.pop("teacher"))} if "teacher" in engine else {}
    context = WorkerContext(
        role="actor",
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        device="cpu",
        seed=0,
        heads=heads,
        frozen_folders=frozen,
    )
    optimizer = OPTIMIZER if trained else None
    return new_training_engine(ModelConfig(path=str(folder)), EngineConfig(**engine), optimizer, head, context)


def weights_of(engine: Any) -> dict[str, np.ndarray]:
    found = {name: tensor.numpy() for bucket in engine.full_weights(torch.float32, 1 << 20) for name, tensor in bucket}
    return found | {f"heads.{name}": weight.numpy() for name, weight in engine._whole_heads().items()}


def train(student: Path, teacher: Path, batch: Batch, split: str, engine: dict[str, Any]) -> Any:
    trained = new_engine(student, teacher=teacher, **engine)
    sharing = engine.get("sequence_parallel", 1) * engine.get("tensor_parallel", 1)
    metrics = trained.step(my_rows(batch, split, sharing), everything(), TEMPERATURE)
    return weights_of(trained), metrics


ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp, one pass, all on rank 0": ("all on rank 0", {"micro_batch_tokens": 10_000}),
    "fsdp, a row a pass, uneven ranks": ("groups in turn", {"micro_batch_tokens": 1, "logit_chunk_tokens": 3}),
    "two sequence pieces": ("groups in turn", {"micro_batch_tokens": 20, "sequence_parallel": 2}),
    "two tensor pieces": ("groups in turn", {"micro_batch_tokens": 20, "tensor_parallel": 2}),
    "deepspeed 1": ("groups in turn", {"micro_batch_tokens": 20, "name": "deepspeed", "zero_stage": 1}),
    "deepspeed 3": ("groups in turn", {"micro_batch_tokens": 20, "name": "deepspeed"}),
}


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path]) -> tuple[Batch, dict[str, Tensor], float, float]:
    """The batch; weights, loss and gradient norm of one plain step on it."""
    student, teacher = folders
    batch, log_q = with_teacher(make_batch(1), teacher)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    heads = {name: nn.Parameter(weight) for name, weight in load_file(student / "heads.safetensors").items()}
    heads["idle"] = nn.Parameter(torch.zeros_like(heads["risk"]))
    parameters = {**dict(model.named_parameters()), **{f"heads.{name}": weight for name, weight in heads.items()}}
    heads["idle"].grad = torch.zeros_like(heads["idle"])
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr * 0.5, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    found = plain_outputs(model, heads, batch)
    found["over_vocabulary.jsd"] = divergence(found.pop("log_p"), log_q, kl="jsd", beta=0.3)
    rows = rows_of(batch, everything().reads, torch.device("cpu"))
    value = everything()(ModelOutput.of(found), rows)[0].mean()
    value.backward()
    norm = nn.utils.clip_grad_norm_(parameters.values(), OPTIMIZER.grad_clip)
    optimizer.step()
    return batch, {name: p.detach() for name, p in parameters.items()}, float(value.detach()), float(norm)


@pytest.mark.parametrize("how", ENGINES)
def test_a_step_on_every_output_equals_a_plain_step(
    world2: World, folders: tuple[Path, Path], expected: Any, how: str
) -> None:
    batch, weights, value, norm = expected
    split, engine = ENGINES[how]
    for mine, metrics in world2.run(train, *folders, batch, split, engine):
        assert metrics["loss"].value == pytest.approx(value, rel=1e-5)
        assert metrics["grad_norm"].value == pytest.approx(norm, rel=1e-5)
        assert set(mine) == set(weights)
        for name, plain in weights.items():
            scale = max(float(plain.abs().max()), 1e-6)
            np.testing.assert_allclose(mine[name], plain.numpy(), rtol=0, atol=1e-5 * scale, err_msg=name)
