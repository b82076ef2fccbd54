"""`check --cluster`: bytes a rank by phase of a launch that need not be there, and what cannot fit refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from controller.commands.cli import main
from rlhf_dist.compose import compose
from rlhf_dist.hardware import parse_cluster
from rlhf_dist.model_specs import BUILT_IN
from rlhf_dist.planner.launch_memory import PhaseBytes, check_memory, here_lines, memory_of
from rlhf_dist.planner.machine import cpu_node
from rlhf_dist.typed import ConfigError

REWARD = f"{Path(__file__).parents[1]}/runs/digit_reward.py:digits"
LLAMA = (
    *("task=none", "model.path=llama3-70b", "model.dtype=bfloat16", f"reward.function={REWARD}"),
    *("data.train.path=none.jsonl", "data.prompts_per_step=256", "placement.pools.main.slots=8"),
    *("placement.pools.main.nodes=4", "actor.rollout.tensor_parallel=8", "actor.rollout.kv_cache_bytes=8589934592"),
    *("actor.rollout.max_prompt_tokens=1024", "actor.rollout.max_response_tokens=1024"),
    *(f"{role}.engine.{setting}" for role in ("actor", "critic") for setting in ("activation_checkpointing=true",)),
    *(f"{role}.engine.micro_batch_tokens=2048" for role in ("actor", "critic", "reference")),
)
P = BUILT_IN["llama3-70b"].parameters


def phases(*settings: str, recipe: str = "ppo", cluster: str = "4x8xH100") -> dict[str, PhaseBytes]:
    launch = compose(recipe, [*LLAMA, *settings])
    found = memory_of(launch, parse_cluster(cluster, key="cluster"))
    return {
        one.phase: max((o for o in found if o.phase == one.phase), key=lambda o: sum(o.device.values()))
        for one in found
    }


def test_a_70b_model_on_32_gpus_passes_check_and_prints_bytes_by_phase(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = [*LLAMA, f"output.root={tmp_path}"]
    assert main(["check", "ppo", *settings, "--cluster", "4x8xH100"]) == 0
    text = capsys.readouterr().out
    assert "GiB a rank on 4x8xH100" in text
    assert all(phase in text for phase in ("load", "rest", "generate", "forward", "update", "sync"))
    assert main(["check", "ppo", *settings, "--cluster", "4x8xH100", "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["cluster"] == "4x8xH100"
    assert {one["phase"] for one in report["memory"]} == {"load", "rest", "generate", "forward", "update", "sync"}


def test_states_are_what_the_engines_hold() -> None:
    found = phases()
    host = found["rest"].host
    # Worked by hand: float32 master weights and two moments over 32 ranks; a frozen role in the engine's dtype.
    assert host["actor weights"] == pytest.approx(4 * P / 32) and host["actor optimizer"] == pytest.approx(8 * P / 32)
    assert host["reference weights"] == pytest.approx(2 * P / 32)
    assert not found["rest"].device and not any("generation" in name for name in host), "a sync brings its weights"
    update = found["update"].device
    (role,) = {name.split()[0] for name in update}  # the others wait in host memory
    assert update[f"{role} optimizer"] == pytest.approx(8 * P / 32)
    assert update[f"{role} gradients"] == pytest.approx(4 * P / 32)
    assert found["generate"].device == {
        "actor generation weights": pytest.approx(2 * P / 8),
        "actor KV cache": 8 << 30,
    }
    assert found["generate"].host == host
    tp = phases("actor.engine.tensor_parallel=8")["rest"].host
    replicas = phases("actor.engine.replicas=4")["rest"].host
    assert tp["actor weights"] == pytest.approx(4 * P / 32) and replicas["actor weights"] == pytest.approx(4 * P / 8)
    whole = phases("actor.engine=deepspeed", "actor.engine.zero_stage=1")
    assert whole["rest"].host["actor weights"] == pytest.approx(2 * P), "stage 1 cuts no parameters"
    assert whole["rest"].host["actor optimizer"] == pytest.approx(12 * P / 32)
    assert whole["update"].device["actor gradients"] == pytest.approx(4 * P)


def test_where_everything_fits_nothing_moves() -> None:
    small = ("model.path=llama3-8b", "placement.pools.main.device_bytes=75000000000")
    found = phases(*small)
    assert not any(one.host for phase, one in found.items() if phase != "load")
    rest = found["rest"].device
    assert {"actor optimizer", "critic weights", "reference weights", "actor KV cache"} <= rest.keys()
    assert sum(found["update"].device.values()) < 75e9
    tight = phases(small[0], "placement.pools.main.device_bytes=20000000000")
    assert not tight["rest"].device and sum(tight["update"].device.values()) < 20e9


def test_what_is_offloaded_is_on_the_host_but_for_the_role_at_work() -> None:
    found = phases("actor.engine.offload=all", "critic.engine.offload=all")
    assert "actor weights" not in found["rest"].device
    assert found["rest"].host["actor optimizer"] == pytest.approx(8 * P / 32)
    trains = [name for name in ("actor", "critic") if f"{name} gradients" in found["update"].device]
    assert len(trains) == 1 and f"{trains[0]} optimizer" in found["update"].device


@pytest.mark.parametrize(
    ("settings", "cluster", "says"),
    [
        (("placement.pools.main.nodes=1",), "1x8xH100", r"pool 'main' does not fit: \w+ needs [\d.]+ GiB a rank"),
        (("placement.pools.main.nodes=1",), "1x8xH100", r"role '(actor|critic)' holds most: give the pool more slots"),
        ((), "2x8xH100", "placement.pools.main needs 32 slots on 4 nodes, and 2x8xH100 has 2 nodes of 8"),
        (("model.path=llama3-700b",), "4x8xH100", "llama3-700b"),
    ],
)
def test_what_cannot_fit_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, settings: tuple[str, ...], cluster: str, says: str
) -> None:
    assert main(["check", "ppo", *LLAMA, *settings, f"output.root={tmp_path}", "--cluster", cluster]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and error.count("\n") == 1, error


def test_ranks_on_a_cpu_share_one_memory() -> None:
    launch = compose("ppo", [*LLAMA, "placement.pools.main.nodes=0", "placement.pools.main.slots=2"])
    cluster = cpu_node()
    with pytest.raises(ConfigError, match="2 such ranks and the other pools share the machine's"):
        check_memory(launch, memory_of(launch, cluster), cluster)


def test_a_model_whose_sizes_have_other_names_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "odd", "d_model": 64}')
    (line,) = here_lines(compose("ppo", [*LLAMA, f"model.path={tmp_path / 'odd'}"]))
    assert line.startswith("memory    not computed") and "hidden_size" in line


def test_passes_are_no_longer_than_the_rows_there_are() -> None:
    few = phases("data.prompts_per_step=8", "actor.engine.micro_batch_tokens=1000000")["forward"].device
    many = phases("data.prompts_per_step=2048", "actor.engine.micro_batch_tokens=1000000")["forward"].device
    assert sum(few.values()) < sum(many.values())


def test_a_random_start_holds_a_layer_on_the_way_and_a_folder_a_tensor() -> None:
    model = ("model.path=llama2-70b",)  # its layer is 3.3 times its largest tensor
    read = phases(*model)["load"].host
    drawn = phases(*model, "actor.model.init=random", "critic.model.init=random")["load"].host
    assert max(read.values()) == 4 * 8192 * 32000
    assert max(drawn.values()) == 4 * BUILT_IN["llama2-70b"].layer
