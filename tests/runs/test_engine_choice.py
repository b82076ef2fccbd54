"""The training engine is one key for each role: whole recipes on DeepSpeed, FSDP2 and both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from controller.commands.cli import main
from controller.execution.failed_calls import NodeError
from controller.lifecycle.replay import replay
from controller.record.metrics import read_metrics
from rlhf_dist.typed import ConfigError
from tests.runs.test_recipes import ROLLOUT, TRANSFORMERS, finite, weights

Launch = Callable[..., dict[str, Any]]

# A large eps keeps Adam from turning the sign of a rounding error into a full step.
STEADY = ("actor.optimizer.eps=1e-3", "algorithm.mini_batches=2", "steps=3")


def same_weights(one: Path, other: Path, roles: tuple[str, ...] = ("actor",)) -> int:
    """Compares all weights of two runs; how many tensors there were."""
    compared = 0
    for role in roles:
        left, right = weights(one / "models" / role), weights(other / "models" / role)
        assert left and left.keys() == right.keys()
        for name, value in right.items():
            np.testing.assert_allclose(left[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)
            compared += 1
    return compared


def test_ppo_on_deepspeed_with_a_critic_on_fsdp_is_ppo_on_fsdp(launch_warm: Launch, tmp_path: Path) -> None:
    settings = (*ROLLOUT, *STEADY, "critic.optimizer.eps=1e-3")
    launch_warm("ppo", *settings, "name=fsdp")
    launch_warm("ppo", *settings, "name=mixed", "actor.engine=deepspeed", "reference.engine=deepspeed")
    assert same_weights(tmp_path / "mixed", tmp_path / "fsdp", ("actor", "critic")) > 20


@pytest.mark.parametrize(
    "engine",
    [
        ("actor.engine=deepspeed", "actor.engine.zero_stage=1"),
        ("actor.engine=deepspeed", "actor.engine.zero_stage=2"),
        ("actor.engine.sequence_parallel=2",),
        ("actor.engine.tensor_parallel=2", "reference.engine.tensor_parallel=2"),
        ("actor.engine.replicas=2", "reference.engine.sequence_parallel=2"),
        ("actor.engine.packing=false",),
    ],
    ids=" ".join,
)
def test_grpo_is_the_same_on_every_engine(launch_warm: Launch, tmp_path: Path, engine: tuple[str, ...]) -> None:
    settings = (*TRANSFORMERS, *STEADY, "algorithm.samples_per_prompt=2")
    if not (tmp_path.parent / "grpo_on_fsdp").exists():
        launch_warm("grpo", *settings, "name=grpo_on_fsdp", root=tmp_path.parent)
    kept = ("output.inputs_every=2", "output.checkpoint_every=2", "output.inputs_nodes=[actor.update_actor]")
    launch_warm("grpo", *settings, *engine, *kept)
    assert same_weights(tmp_path / "grpo", tmp_path.parent / "grpo_on_fsdp") > 10
    if "deepspeed" not in engine[0]:  # it would begin its own world in this process
        numbers = {one.name: one for one in replay(tmp_path / "grpo", 2, "actor.update_actor").numbers()}
        assert all(one.equal or one.rounded for one in numbers.values() if one.equal is not None), numbers
        assert numbers["actor/grad_norm"].equal is not None, "one rank has the whole model and all rows"


def test_a_resumed_deepspeed_run_ends_with_the_weights_of_one_that_never_stopped(
    launch_warm: Launch, tmp_path: Path
) -> None:
    settings = (*TRANSFORMERS, "actor.engine=deepspeed", "output.checkpoint_every=1", "algorithm.samples_per_prompt=2")
    launch_warm("grpo", *settings, "steps=3", root=tmp_path / "straight")
    launch_warm("grpo", *settings, "steps=2", root=tmp_path / "resumed")
    launch_warm("grpo", *settings, "steps=3", "resume=auto", root=tmp_path / "resumed")
    one, other = (weights(tmp_path / way / "grpo/models/actor") for way in ("straight", "resumed"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_export_writes_what_the_run_exported_and_names_what_is_wrong(
    launch_warm: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch_warm("sft", "output.checkpoint_every=1", "actor.engine=deepspeed")
    run, out = str(tmp_path / "sft"), tmp_path / "out"
    assert main(["export", run, str(out)]) == 0
    exported = weights(tmp_path / "sft/models/actor")
    for name, value in weights(out).items():
        np.testing.assert_array_equal(value, exported[name])
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == 128
    capsys.readouterr()
    for arguments, message in (
        ([run, str(out)], "is there already"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "x")], "no complete checkpoint at"),
        ([run, str(tmp_path / "x"), "--role", "critic"], "has no role 'critic'; it has actor"),
        ([run, str(tmp_path / "x"), "--adapter"], "this model has no adapters"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    shard = next((tmp_path / "sft/checkpoints/step_2/actor").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["export", run, str(tmp_path / "x")]) == 2
    assert "the checkpoint is damaged" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused_before_anything_starts(launch_warm: Launch, tied: Path) -> None:
    launch_warm("sft", "output.checkpoint_every=1")
    wider = tied.with_name("other_config")
    wider.mkdir()
    for file in tied.iterdir():
        (wider / file.name).write_bytes(file.read_bytes())
    (wider / "config.json").write_text((tied / "config.json").read_text().replace('"vocab_size": ', '"vocab_size": 1'))
    with pytest.raises(ConfigError, match="actor.model.path=.* has vocab_size=1"):
        launch_warm("sft", "resume=auto", "steps=3", f"actor.model.path={wider}")


NAN_LOSS = '''
from dataclasses import dataclass

import torch

from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples


@dataclass(frozen=True)
class Sometimes:
    """Not a number in one group."""

    reads = ("group_id",)
    outputs = ("log_probs",)
    average = "tokens"

    def __call__(self, model, rows):
        first = (rows["group_id"] == rows["group_id"].min())[rows.row_of_token]
        return torch.where(first & (len(rows["group_id"]) < 3), torch.nan, -model.log_probs), {}


@recipe
def broken(examples: Examples, actor: Actor) -> None:
    actor.update_actor(examples, loss=Sometimes(), mini_batches=1)
'''


def test_a_loss_that_is_not_a_number_is_skipped_or_stops_the_run_and_leaves_its_rows(
    launch_warm: Launch, tmp_path: Path, model: Path
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(NAN_LOSS)
    summary = launch_warm(str(file), "actor.optimizer.nonfinite=skip")
    assert summary["last"]["actor/skipped_steps"] == 1 and summary["last"]["actor/version"] == 0
    same_before = weights(tmp_path / "broken/models/actor")
    assert all(np.array_equal(value, same_before[name]) for name, value in weights(model).items())
    with pytest.raises(NodeError, match=r"Sometimes is not finite in optimizer step 0.*nonfinite=skip") as stopped:
        launch_warm(str(file))
    dumps = list((tmp_path / "broken/nonfinite").glob("*.parquet"))
    assert dumps and all(str(dump.parent) in str(stopped.value) for dump in dumps)
    assert {"prompt_ids", "response_ids", "group_id"} <= set(pq.read_table(dumps[0]).column_names)


def test_adapters_train_beside_a_base_that_the_reference_shares(
    launch_warm: Launch, tmp_path: Path, model: Path
) -> None:
    settings = (*ROLLOUT, "actor.engine.lora.rank=4", "algorithm.samples_per_prompt=4", "output.checkpoint_every=1")
    summary = launch_warm("grpo", *settings, "actor.optimizer.lr=3e-2", "algorithm.kl_coef=0.1", "steps=4")
    assert finite(summary)
    rows = read_metrics(tmp_path / "grpo")
    # The sampler follows the adapters: what vLLM sampled with is what the trainer computes with.
    assert all(row["actor/rollout_mismatch"] < 1e-4 for row in rows)
    assert rows[0]["actor/ref_kl_k3"] < 1e-6 < rows[-1]["actor/ref_kl_k3"], (
        "the reference is the base, whatever the adapters do"
    )
    merged, base = weights(tmp_path / "grpo/models/actor"), weights(model)
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert changed and all("_proj" in name for name in changed)
    run = str(tmp_path / "grpo")
    assert main(["export", run, str(tmp_path / "merged")]) == 0
    for name, value in weights(tmp_path / "merged").items():
        np.testing.assert_allclose(value, merged[name], rtol=0, atol=1e-6 * np.abs(value).max())
    assert main(["export", run, str(tmp_path / "adapter"), "--adapter"]) == 0
    from peft import PeftModel

    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    for name, value in with_adapter.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(value.numpy(), merged[name], rtol=0, atol=1e-6 * np.abs(merged[name]).max())
