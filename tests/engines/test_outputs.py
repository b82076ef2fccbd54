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
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.algorithms import Head, ModelOutput, OverVocabulary, loss
from rlhf_dist.algorithms.losses.distill import divergence
from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import EngineConfig, ModelConfig
from rlhf_dist.wire import WorkerContext
from tests.engines.losses import make_batch
from tests.engines.test_exact import OPTIMIZER, TEMPERATURE, before_tokens, my_rows, padded
from tests.engines.world import World
from tests.tiny import save_classifier, save_llama
from workers.engines.model.packing import rows_of

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
    """A student with heads beside it, and a teacher."""
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
    from workers.build_engines import new_training_engine

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


# --- without gradient ------------------------------------------------------------------------------
def read(student: Path, batch: Batch, engine: dict[str, Any]) -> dict[str, Any]:
    frozen = new_engine(student, trained=False, micro_batch_tokens=30, logit_chunk_tokens=7, **engine)
    asked = ("heads.quality", f"top_k.{K}", "hidden", "heads.risk", "heads.idle", "logits")
    sharing = engine.get("sequence_parallel", 1)
    return frozen.forward(my_rows(batch, "all on rank 0", sharing), asked, TEMPERATURE)  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", [{}, {"sequence_parallel": 2}, {"name": "deepspeed", "zero_stage": 1}])
def test_columns_of_outputs_are_those_of_the_library_s_model(
    world2: World, folders: tuple[Path, Path], engine: dict[str, Any]
) -> None:
    batch = make_batch(2)
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).eval()
    with torch.no_grad():
        plain = plain_outputs(model, load_file(folders[0] / "heads.safetensors"), batch)
    log_probs, ids = plain["log_p"].topk(K)
    mine, other = world2.run(read, folders[0], batch, engine)
    assert mine["top_ids"].values.dtype == np.int32 and np.array_equal(mine["top_ids"].values, ids.numpy())
    rest = (1 - log_probs.exp().sum(-1)).log()
    for name, values in {"top_log_probs": log_probs, "top_log_rest": rest, **plain}.items():
        if name in mine:
            np.testing.assert_allclose(mine[name].values, values.numpy(), rtol=2e-4, atol=2e-5, err_msg=name)
    # At no temperature, and not normalised: below the largest by as much as its log-prob is, times the temperature.
    of_targets = plain["log_p"].gather(-1, torch.from_numpy(batch["response_ids"].values).long()[:, None])[:, 0]
    below = TEMPERATURE * (of_targets - plain["log_p"].amax(-1))
    found = mine["logits"].values - mine["largest_logits"].values
    np.testing.assert_allclose(found, below.numpy(), rtol=2e-4, atol=2e-5)
    assert not mine["heads.idle"].values.any()
    assert mine["heads.quality"].offsets is None and mine["heads.risk"].offsets is not None
    if not engine.get("sequence_parallel"):  # a rank without rows gives columns that go with those of the other
        both = Batch.concat([Batch(mine), Batch(other)])
        assert both.num_rows == batch.num_rows and other["top_ids"].values.shape == (0, K)


# --- files -----------------------------------------------------------------------------------------
def save_and_load(student: Path, teacher: Path, batch: Batch, folder: Path, engine: dict[str, Any]) -> Any:
    trained = new_engine(student, teacher=teacher, **engine)
    trained.step(my_rows(batch, "groups in turn"), everything(), TEMPERATURE)
    weights, checkpoint = weights_of(trained), folder / "checkpoint"
    trained.save(checkpoint).result(120)
    trained.export(folder / "exported")
    trained.step(my_rows(batch, "groups in turn"), everything(), TEMPERATURE)
    moved = weights_of(trained)
    trained.load(checkpoint)
    again = weights_of(trained)
    trained.step(my_rows(batch, "groups in turn"), everything(), TEMPERATURE)
    resumed, layout = weights_of(trained), list(trained.layout())
    started = weights_of(new_engine(folder / "exported", trained=False))
    return weights, again, moved, resumed, started, layout


@pytest.mark.parametrize("engine", [{}, {"name": "deepspeed"}], ids=["fsdp", "deepspeed 3"])
def test_heads_are_saved_resumed_and_exported_beside_the_model(
    world2: World, folders: tuple[Path, Path], expected: Any, tmp_path: Path, engine: dict[str, Any]
) -> None:
    from workers.engines.files.export import export_checkpoint

    found = world2.run(save_and_load, *folders, expected[0], tmp_path, engine)
    for weights, again, moved, resumed, started, layout in found:
        for name, values in weights.items():
            assert np.array_equal(again[name], values), name
            assert np.array_equal(started[name], values), name
            assert np.array_equal(resumed[name], moved[name]), name
        assert not np.array_equal(moved["heads.quality"], weights["heads.quality"])
        assert not any("quality" in name for name in layout), "a generation engine is not sent heads"
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "later", dtype=None, adapter=False)
    for folder in ("exported", "later"):
        heads = load_file(tmp_path / folder / "heads.safetensors")
        assert heads.keys() == {head.name for head in HEADS}
        assert np.array_equal(heads["quality"].numpy(), found[0][0]["heads.quality"])
        AutoModelForCausalLM.from_pretrained(tmp_path / folder)


def declared_otherwise(student: Path) -> None:
    new_engine(student, heads=(Head(name="quality", outputs=4),), trained=False)


def test_a_head_of_another_size_in_the_folder_is_refused(world1: World, folders: tuple[Path, Path]) -> None:
    with pytest.raises(RuntimeError, match=r"head quality of shape \[2, 32\], the role declares \[4, 32\]"):
        world1.run(declared_otherwise, folders[0])


# --- several labels --------------------------------------------------------------------------------
@loss(reads=("returns", "label"), outputs=("scores", "values"), average="rows")
def of_labels(model: Any, rows: Any) -> Any:
    """Cross-entropy of three labels, and each label's value drawn to the return."""
    error = (model.values - rows["returns"][:, None]).square().mean(-1)
    return F.cross_entropy(model.scores, rows["label"].long() + 1, reduction="none") + rows.mean_tokens(error), {}


def train_labels(folder: Path, batch: Batch) -> Any:
    trained = new_engine(folder, (), "value", micro_batch_tokens=20)
    scores = trained.scores(my_rows(batch, "all on rank 0"))
    metrics = trained.step(my_rows(batch, "groups in turn"), of_labels())
    return scores, metrics["loss"].value, metrics["grad_norm"].value


def test_a_model_of_several_labels_scores_and_trains_all_of_them(world2: World, tmp_path: Path) -> None:
    config = AutoModelForSequenceClassification.from_pretrained(save_classifier(tmp_path / "one")).config
    config.num_labels = 3
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "three")
    batch = make_batch(3)
    ids, mask = padded(batch)
    at = model.score(model.base_model(ids, attention_mask=mask).last_hidden_state)
    last = torch.from_numpy(batch["prompt_ids"].lengths + batch["response_ids"].lengths - 1)
    scores = at[torch.arange(batch.num_rows), last]
    rows = rows_of(batch, of_labels().reads, torch.device("cpu"))
    values = torch.cat(before_tokens(at, batch))
    value = of_labels()(ModelOutput.of({"scores": scores, "values": values}), rows)[0].mean()
    value.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    (mine, first, gradient), (nothing, second, _) = world2.run(train_labels, tmp_path / "three", batch)
    np.testing.assert_allclose(mine, scores.detach().numpy(), rtol=2e-5, atol=2e-5)
    assert nothing.shape == (0, 3)
    assert first == second == pytest.approx(float(value.detach()), rel=1e-5)
    assert gradient == pytest.approx(float(norm), rel=1e-5)


# --- teachers --------------------------------------------------------------------------------------
def test_a_head_that_is_no_matrix_is_no_teacher_s(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    from transformers import BertConfig, BertLMHeadModel

    from workers.engines.training.teacher_head import teacher_head

    size = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32}
    BertLMHeadModel(BertConfig(vocab_size=50, is_decoder=True, **size)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertLMHeadModel.*is not one matrix; distil its top_k instead"):
        teacher_head(tmp_path, torch.float32, torch.device("cpu"))
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(teacher_head(folder, torch.float32, torch.device("cpu")).weight, model.lm_head.weight)
