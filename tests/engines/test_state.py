"""What an engine holds and hands out: weights, checksums, checkpoints, exports, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.algorithms.contract import Average, ModelOutput, Output, Rows
from rlhf_dist.batch import Batch
from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf_dist.reshard.checksum import full_checksum
from rlhf_dist.wire import WorkerContext
from tests.engines.losses import TokenLoss, ValueLoss, make_batch
from tests.engines.world import World
from tests.tiny import VOCABULARY, save_classifier

Weights = dict[str, Tensor]


ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "fsdp tensor pieces": {"tensor_parallel": 2},
    "fsdp replicas": {"replicas": 2},
    "deepspeed 1": {"name": "deepspeed", "zero_stage": 1},
    "deepspeed 2": {"name": "deepspeed", "zero_stage": 2},
    "deepspeed 3": {"name": "deepspeed", "zero_stage": 3},
}
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


def new_engine(
    folder: Path, head: str = "policy", init: str = "pretrained", seed: int = 0, trained: bool = True, **engine: Any
) -> Any:
    from workers.build_engines import new_training_engine

    context = WorkerContext(role="actor", rank=dist.get_rank(), world=dist.get_world_size(), device="cpu", seed=seed)
    optimizer = OptimizerConfig(lr=1e-2) if trained else None
    model = ModelConfig(path=str(folder), init=init)
    return new_training_engine(model, EngineConfig(**engine), optimizer, head, context)  # type: ignore[arg-type]


def weights_of(engine: Any, dtype: torch.dtype = torch.float32, bucket_bytes: int = 20_000) -> dict[str, np.ndarray]:
    buckets = list(engine.full_weights(dtype, bucket_bytes))
    assert all(len(b) == 1 or sum(t.nbytes for _, t in b) <= bucket_bytes for b in buckets)
    assert len(buckets) > 1, "the bucket size must matter here"
    return {name: tensor.float().numpy() for bucket in buckets for name, tensor in bucket}


def my_rows(batch: Batch, engine: dict[str, Any] | None = None) -> Batch:
    sharing = (engine or {}).get("tensor_parallel", 1)
    groups = batch.group()[dist.get_rank() // sharing :: dist.get_world_size() // sharing]
    return batch.take(np.concatenate([*groups, np.empty(0, np.int64)]))


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    assert set(left) == set(right)
    for name, value in right.items():
        np.testing.assert_allclose(left[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


# --- weights and checksums -------------------------------------------------------------------------
def weights_and_checksums(
    folder: Path, head: str, dtype: torch.dtype, settings: dict[str, Any], trained: bool = True
) -> tuple[Any, Any, Any]:
    engine = new_engine(folder, head, trained=trained, logit_chunk_tokens=8, **settings)
    # After a forward pass without a backward pass, which leaves FSDP's root gathered unless it is told.
    engine.forward(my_rows(make_batch(), settings), ["log_probs" if head == "policy" else "values"])
    assert engine.layout().check() is not None
    whole = {name: tensor for bucket in engine.full_weights(dtype, 20_000) for name, tensor in bucket}
    received = {name: full_checksum(tensor) for name, tensor in whole.items()}
    return weights_of(engine, dtype), engine.checksums(dtype), received


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["llama", "tied_llama"])
def test_full_weights_are_the_checkpoint_and_sharded_checksums_match(
    world2: World, request: pytest.FixtureRequest, model: str, dtype: torch.dtype, engine: dict[str, Any]
) -> None:
    folder = request.getfixturevalue(model)
    plain = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    assert ("lm_head.weight" in plain) == (model == "llama"), "a tied head comes once, as the embedding"
    for weights, sharded, received in world2.run(weights_and_checksums, folder, "policy", dtype, engine):
        same(weights, {name: value.detach().to(dtype).float().numpy() for name, value in plain.items()})
        assert sharded == received
        assert len(set(received.values())) > len(received) // 2


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("engine", [ENGINES[name] for name in ("fsdp", "deepspeed 1", "deepspeed 3")])
def test_checksums_match_where_ranks_have_nothing_of_a_parameter(
    world4: World, llama: Path, tmp_path: Path, engine: dict[str, Any], trained: bool
) -> None:
    folder = llama if trained else save_classifier(tmp_path)
    for weights, sharded, received in world4.run(
        weights_and_checksums, folder, "value", torch.bfloat16, engine, trained
    ):
        assert weights["score.weight"].shape == (1, 32), "one row over four ranks"
        assert sharded == received


def random_weights(folder: Path, seed: int) -> dict[str, np.ndarray]:
    return weights_of(new_engine(folder, init="random", seed=seed))


def test_random_weights_depend_on_the_seed_and_not_on_the_number_of_ranks(
    world1: World, world2: World, llama: Path
) -> None:
    alone, two = world1.run(random_weights, llama, 3), world2.run(random_weights, llama, 3)
    same(two[0], alone[0])
    other = world1.run(random_weights, llama, 4)[0]
    assert not np.allclose(other["lm_head.weight"], alone[0]["lm_head.weight"])


# --- files -----------------------------------------------------------------------------------------
def train_and_save(
    folder: Path, head: str, settings: dict[str, Any], before: list[Batch], after: list[Batch], checkpoint: Path
) -> Any:
    engine = new_engine(folder, head, micro_batch_tokens=40, **settings)
    loss = TokenLoss() if head == "policy" else ValueLoss()
    for batch in before:
        engine.step(my_rows(batch, settings), loss)
    saved = engine.save(checkpoint)
    # Steps go on while the checkpoint is written: it holds what was there when `save` returned.
    losses = [engine.step(my_rows(batch, settings), loss)["loss"].value for batch in after]
    saved.result(60)
    return losses, weights_of(engine), engine.version


def load_and_train(folder: Path, head: str, settings: dict[str, Any], after: list[Batch], checkpoint: Path) -> Any:
    engine = new_engine(folder, head, init="random", seed=9, micro_batch_tokens=40, **settings)
    # A forward pass gathers weights; they must not outlive the load.
    engine.forward(my_rows(make_batch(), settings), ["log_probs" if head == "policy" else "values"])
    engine.load(checkpoint)
    loss = TokenLoss() if head == "policy" else ValueLoss()
    losses = [engine.step(my_rows(batch, settings), loss)["loss"].value for batch in after]
    return losses, weights_of(engine), engine.version


@every_engine
@pytest.mark.parametrize(("head", "model"), [("policy", "tied_llama"), ("value", "llama")])
def test_training_resumed_on_another_number_of_ranks_continues_as_if_nothing_happened(
    request: pytest.FixtureRequest, tmp_path: Path, head: str, model: str, engine: dict[str, Any]
) -> None:
    folder = request.getfixturevalue(model)
    saved_by = request.getfixturevalue("world2")
    others = ["world4"] if engine.get("tensor_parallel", 1) + engine.get("replicas", 1) > 2 else ["world1"]
    batches = [make_batch(seed) for seed in range(4)]
    args = (folder, head, engine, batches[:2], batches[2:], tmp_path / "checkpoint")
    losses, weights, version = saved_by.run(train_and_save, *args)[0]
    for name in ["world2", *others]:
        world = request.getfixturevalue(name)
        resumed, again, resumed_version = world.run(load_and_train, folder, head, engine, batches[2:], args[-1])[0]
        assert resumed_version == version == 4
        np.testing.assert_allclose(resumed, losses, rtol=1e-5)
        # Adam turns rounding in near-zero gradients into visible steps; the same ranks must agree exactly.
        same(again, weights, tolerance=0.0 if world is saved_by else 1e-3)
    files = {file.suffix for file in args[-1].rglob("*") if file.is_file()}
    assert files == {".safetensors", ".json", ".jinja"}, "nothing that has to be unpickled"
    with pytest.raises(RuntimeError, match="holds a checkpoint already"):
        saved_by.run(train_and_save, *args)


def test_loading_from_a_folder_without_a_checkpoint_says_so(world1: World, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no checkpoint in"):
        world1.run(load_and_train, llama, "policy", {}, [], tmp_path)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut_short, r"bytes instead of"), (flip_a_bit, "not what was written"), (Path.unlink, "is missing")],
    ids=["cut short", "one bit", "missing"],
)
def test_a_damaged_checkpoint_is_refused_on_every_rank_and_the_file_named(
    world2: World, llama: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    world2.run(train_and_save, llama, "policy", {}, [make_batch()], [], tmp_path / "checkpoint")
    damage(next((tmp_path / "checkpoint").glob("shard-00002-*.safetensors")))
    with pytest.raises(RuntimeError, match=rf"rank 0:(.|\n)*shard-00002.*{message}(.|\n)*rank 1:(.|\n)*{message}"):
        world2.run(load_and_train, llama, "policy", {}, [], tmp_path / "checkpoint")


def test_a_checkpoint_of_another_model_or_engine_is_refused(
    world2: World, llama: Path, tied_llama: Path, tmp_path: Path
) -> None:
    world2.run(train_and_save, llama, "policy", {}, [make_batch()], [], tmp_path / "checkpoint")
    with pytest.raises(RuntimeError, match=r"another model: lm_head.weight is \[\d+, 32\] in it and not there here"):
        world2.run(load_and_train, tied_llama, "policy", {}, [], tmp_path / "checkpoint")
    with pytest.raises(RuntimeError, match="engine fsdp wrote it, this is deepspeed"):
        world2.run(load_and_train, llama, "policy", ENGINES["deepspeed 3"], [], tmp_path / "checkpoint")


@every_engine
def test_a_checkpoint_exports_without_an_engine_what_the_engine_exports(
    world2: World, llama: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    from workers.engines.files.export import export_checkpoint

    _, weights, _ = world2.run(train_and_save, llama, "policy", engine, [make_batch()], [], tmp_path / "checkpoint")[0]
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", dtype=None, adapter=False)
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    same({name: value.detach().numpy() for name, value in exported.items()}, weights)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([VOCABULARY["4"]]) == "4"
    with pytest.raises(FileExistsError, match="is there already"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", dtype=None, adapter=False)


def train_and_export(folder: Path, head: str, target: Path) -> Any:
    engine = new_engine(folder, head)
    engine.step(my_rows(make_batch()), TokenLoss() if head == "policy" else ValueLoss())
    engine.export(target)
    batch = make_batch(1)
    return engine.forward(batch, ["log_probs" if head == "policy" else "scores"])


@pytest.mark.parametrize("model", ["llama", "tied_llama"])
def test_an_exported_policy_loads_in_transformers_with_the_same_log_probs(
    world2: World, request: pytest.FixtureRequest, tmp_path: Path, model: str
) -> None:
    columns = world2.run(train_and_export, request.getfixturevalue(model), "policy", tmp_path)[0]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert exported.dtype == torch.float32 and type(exported).__name__ == "LlamaForCausalLM"
    batch = make_batch(1)
    for k in (0, batch.num_rows - 1):
        prompt, response = batch["prompt_ids"].row(k), batch["response_ids"].row(k)
        with torch.no_grad():
            logits = exported(torch.tensor(np.concatenate([prompt, response])[None].astype(np.int64))).logits[0]
        log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = log_p.gather(1, torch.tensor(response.astype(np.int64))[:, None])[:, 0].numpy()
        np.testing.assert_allclose(columns["log_probs"].row(k), expected, rtol=2e-5, atol=2e-5)
    assert AutoTokenizer.from_pretrained(tmp_path).decode([VOCABULARY["4"], VOCABULARY["2"]]) == "42"


def export_as(folder: Path, target: Path, engine: dict[str, Any]) -> None:
    new_engine(folder, dtype="float32", **engine).export(target)


def test_an_export_has_the_dtype_training_started_from_unless_told(world2: World, llama: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(half)
    for name, engine, expected in (
        ("own", {}, torch.bfloat16),
        ("told", {"export_dtype": "float32"}, torch.float32),
    ):
        world2.run(export_as, half, tmp_path / name, engine)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert exported.dtype == exported.lm_head.weight.dtype == expected


def test_an_exported_value_model_loads_in_transformers_and_in_the_engine(
    world2: World, llama: Path, tmp_path: Path
) -> None:
    scores = world2.run(train_and_export, llama, "value", tmp_path)[0]["scores"].values
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert exported.config.num_labels == 1
    batch = make_batch(1)
    for k in range(batch.num_rows):
        ids = np.concatenate([batch["prompt_ids"].row(k), batch["response_ids"].row(k)])
        with torch.no_grad():
            logit = exported(torch.tensor(ids[None].astype(np.int64))).logits[0, 0]
        assert float(logit) == pytest.approx(float(scores[k]), rel=2e-5, abs=2e-5)
    assert np.abs(scores).max() > 1e-3, "the head starts at zero and must have been trained"
    weights, _, _ = world2.run(weights_and_checksums, tmp_path, "value", torch.float32, {})[0]
    np.testing.assert_array_equal(weights["score.weight"], exported.score.weight.detach().numpy())


# --- what it refuses -------------------------------------------------------------------------------
@dataclass(frozen=True)
class BrokenLoss:
    """NaN in the rows of one group."""

    group: int = 102
    reads: tuple[str, ...] = ("group_id",)
    outputs: tuple[Output, ...] = ("log_probs",)
    average: Average = "tokens"

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        assert model.log_probs is not None
        broken = (rows["group_id"] == self.group)[rows.row_of_token]
        return torch.where(broken, float("nan"), model.log_probs), {}


def break_a_step(folder: Path, settings: dict[str, Any]) -> tuple[str, Any, Any, float]:
    from workers.engines.training.interface import NonFiniteLoss

    engine = new_engine(folder, micro_batch_tokens=40, **settings)
    before = weights_of(engine)
    try:
        engine.step(my_rows(make_batch(), settings), BrokenLoss())
    except NonFiniteLoss as error:
        message, fields = str(error), (error.loss, error.step, error.groups)
    same(weights_of(engine), before)
    assert engine.version == 0
    rows = my_rows(make_batch(), settings)
    clean = engine.step(rows, TokenLoss())["grad_norm"].value
    fresh = new_engine(folder, micro_batch_tokens=40, **settings).step(rows, TokenLoss())["grad_norm"].value
    return message, fields, clean, fresh


@every_engine
def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_weights_change(
    world2: World, llama: Path, engine: dict[str, Any]
) -> None:
    for message, fields, clean, fresh in world2.run(break_a_step, llama, engine):
        assert fields == ("BrokenLoss", 0, (102,))
        assert "BrokenLoss" in message and "102" in message and "unchanged" in message
        assert clean == fresh, "no gradient of the failed step is left over"


def step_over_nothing(folder: Path) -> tuple[int, float]:
    engine = new_engine(folder)
    tokens = engine.step(make_batch().slice(0, 0), TokenLoss())["tokens"].value
    return engine.version, tokens


def test_a_step_over_no_rows_at_all_does_nothing(world2: World, llama: Path) -> None:
    assert world2.run(step_over_nothing, llama) == [(0, 0.0), (0, 0.0)]


def bfloat16_step(folder: Path, settings: dict[str, Any]) -> tuple[float, float, Sequence[str], float]:
    engine = new_engine(folder, dtype="bfloat16", micro_batch_tokens=40, **settings)
    batch = my_rows(make_batch(), settings)
    exact = new_engine(folder, **settings).forward(batch, ["log_probs"])["log_probs"].values
    apart = float(np.abs(engine.forward(batch, ["log_probs"])["log_probs"].values - exact).max())
    first = engine.step(batch, TokenLoss())
    kinds = {str(shard.dtype) for shards in engine.local_shards().values() for shard in shards}
    return apart, first["loss"].value, sorted(kinds), first["grad_norm"].value


@every_engine
def test_bfloat16_computes_in_bfloat16_over_float32_master_weights(
    world2: World, llama: Path, engine: dict[str, Any]
) -> None:
    for apart, loss, kinds, norm in world2.run(bfloat16_step, llama, engine):
        assert 1e-4 < apart < 0.2 and np.isfinite(loss) and norm > 0
        assert kinds == ["torch.float32"]


def frozen_and_trained(folder: Path, settings: dict[str, Any]) -> tuple[float, set[str], set[str]]:
    batch = my_rows(make_batch(), settings)
    found, kinds = [], []
    for trained in (False, True):
        engine = new_engine(folder, trained=trained, dtype="bfloat16", **settings)
        found.append(engine.forward(batch, ["log_probs"])["log_probs"].values)
        kinds.append({str(shard.dtype) for shards in engine.local_shards().values() for shard in shards})
    return float(np.abs(found[0] - found[1]).max()), kinds[0], kinds[1]


@every_engine
def test_a_frozen_model_is_held_in_the_dtype_it_computes_in(world2: World, llama: Path, engine: dict[str, Any]) -> None:
    """Half the bytes of a reference at rest, and the same log-probs as a trained engine of the same weights."""
    ranks = world2.run(frozen_and_trained, llama, engine)
    # Whole copies on every rank are said to be on the first.
    assert {kind for _, frozen, _ in ranks for kind in frozen} == {"torch.bfloat16"}
    assert all(trained == {"torch.float32"} and apart == 0.0 for apart, _, trained in ranks)


def wrong_outputs(folder: Path) -> None:
    new_engine(folder).step(my_rows(make_batch()), ValueLoss())


def test_asking_a_policy_for_values_names_what_it_has(world1: World, llama: Path) -> None:
    with pytest.raises(RuntimeError, match=r"gives log_probs, entropy, .*, asked for values"):
        world1.run(wrong_outputs, llama)


def test_a_missing_model_folder_is_named(world1: World, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no model at .*config\.json"):
        world1.run(wrong_outputs, tmp_path / "nowhere")


def frozen_value_model(folder: Path) -> None:
    new_engine(folder, "value", trained=False)


def test_a_frozen_value_model_without_a_head_is_refused(world1: World, llama: Path) -> None:
    with pytest.raises(RuntimeError, match="has no score.weight: it is no reward model"):
        world1.run(frozen_value_model, llama)
