"""Placement on real Ray, FSDP2 and generation engines: where roles run changes no number; generation may run ahead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.lifecycle.replay import replay
from controller.record.metrics import read_metrics
from controller.record.timeline import draw
from rlhf_dist.batch import Batch
from tests.tiny import save_classifier

Launch = Callable[..., dict[str, Any]]
ROLES = ("actor", "critic", "reference", "reward")
REWARD = f"{Path(__file__).parent}/digit_reward.py:digits"
TINY = (
    "actor.rollout.engine=transformers",
    "actor.rollout.max_response_tokens=6",
    "actor.optimizer.lr=1e-3",
    "critic.optimizer.lr=1e-3",
    "algorithm.mini_batches=2",
    "output.save_model=false",
)
APART = ("placement=standalone", "reward.function=" + REWARD, *TINY)


def partitions(items: tuple[str, ...]) -> Iterator[list[list[str]]]:
    """All ways to put `items` into pools: 15 for four."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for k in range(len(rest)):
            yield [*rest[:k], [items[0], *rest[k]], *rest[k + 1 :]]


def placement(partition: list[list[str]], slots: int = 1) -> list[str]:
    """Overrides that place the roles of each part in a pool of its own."""
    pools = [f"placement.pools.p{k}.slots={slots}" for k in range(len(partition))]
    roles = [f"placement.roles.{role}=p{k}" for k, part in enumerate(partition) for role in part]
    return ["~placement.pools.main", "~placement.roles.default", *pools, *roles]


def numbers(folder: Path) -> list[dict[str, float]]:
    """Every step's metrics that say nothing of time, place or store."""
    timed = ("time_s/", "step_s", "tokens_per_s", "store/", "actor/sync_")
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if not k.startswith(timed) and "padding" not in k} for row in rows]


def test_all_15_partitions_of_ppos_roles_give_the_same_numbers(launch_warm: Launch, tmp_path: Path) -> None:
    scorer = save_classifier(tmp_path / "scorer")
    found = {}
    for partition in partitions(ROLES):
        name = "+".join("_".join(part) for part in partition)
        scored = ("reward.function=null", f"reward.model.path={scorer}")
        launch_warm("ppo", f"name={name}", *TINY, *scored, *placement(partition))
        found[name] = numbers(tmp_path / name)
    assert len(found) == 15
    first = next(iter(found.values()))
    assert len(first) == 2 and first[1]["actor/grad_norm"] > 0 and first[0]["reward/reward"] != 0
    for name, rows in found.items():
        assert rows == first, name


def test_generation_in_its_own_pool_and_over_groups_of_other_sizes_gives_the_same_numbers(
    launch_warm: Launch, tmp_path: Path
) -> None:
    """Weights cross worlds, rows cross from 2 generating ranks to 1 and 3 training ones. What those were given is one
    batch again where a node is replayed."""
    launch_warm("ppo", "name=together", *TINY, f"reward.function={REWARD}", "placement.pools.main.slots=1")
    kept = ("output.inputs_every=1", "output.checkpoint_every=1")
    slots = ("placement.pools.rollout.slots=2", "placement.pools.critic.slots=3")
    launch_warm("ppo", "name=apart", *APART, *slots, *kept)
    for together, apart in zip(numbers(tmp_path / "together"), numbers(tmp_path / "apart"), strict=True):
        assert together.keys() == apart.keys()
        for name, value in together.items():
            assert apart[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    for node, parts in {"actor.generate_sequences": 2, "critic.update_critic": 3, "critic.compute_values": 3}.items():
        done = replay(tmp_path / "apart", 1, node)
        compared = [*done.columns(), *done.numbers()]
        assert (done.parts, done.rows, done.of_rows) == (parts, 4, 4) and "step_1" in done.weights
        assert all(one.equal is not False or one.rounded for one in compared), (node, compared)
        assert any(one.equal or one.rounded for one in compared)


def test_staleness_is_bounded_reported_and_counts_on_after_a_resume(launch_warm: Launch, tmp_path: Path) -> None:
    settings = (
        *APART, "placement.max_staleness=1", "algorithm.correction=token", "output.rollouts_every=1",
        "output.checkpoint_every=3", "name=stale",
    )  # fmt: skip
    launch_warm("ppo", *settings, "steps=3")
    launch_warm("ppo", *settings, "steps=6", "resume=auto")
    rows = read_metrics(tmp_path / "stale")
    # A checkpoint waits for all that is under way, so that the run goes on from it as if it had never stopped.
    assert [row["actor/staleness"] for row in rows] == [0, 1, 1, 0, 1, 1]
    versions = [
        set(Batch.read_parquet(tmp_path / f"stale/rollouts/step_{step:06d}.parquet")["policy_version"].values)
        for step in range(6)
    ]
    assert versions == [{0}, {0}, {2}, {6}, {6}, {8}], "two optimizer steps an update, one update behind"
    assert rows[1]["actor/rollout_ratio_error"] > rows[0]["actor/rollout_ratio_error"]
    assert rows[0]["actor/correction"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("engine", "pieces"), [("transformers", 1), ("vllm", 1), ("vllm", 3)])
def test_interrupted_responses_go_on_with_the_new_weights(
    launch_warm: Launch, tmp_path: Path, engine: str, pieces: int
) -> None:
    summary = launch_warm(
        "grpo", "placement=standalone", "placement.max_staleness=1", "placement.interrupt=true", "steps=5",
        f"placement.pieces={pieces}",
        f"reward.function={REWARD}", f"actor.rollout.engine={engine}", "actor.rollout.max_response_tokens=250",
        "actor.optimizer.lr=1e-3", "algorithm.samples_per_prompt=4", "algorithm.correction=token",
        "output.rollouts_every=1", "output.save_model=false", "name=cut",
    )  # fmt: skip
    rows = read_metrics(tmp_path / "cut")
    assert sum(row.get("actor/continued", 0) for row in rows) > 0, "the long generation was interrupted"
    assert max(row["actor/staleness"] for row in rows) <= 1
    events = json.loads((tmp_path / "cut/trace.json").read_text())["traceEvents"]
    cut = [event for event in events if event.get("args", {}).get("interrupted")]
    names = {event["name"] for event in cut}  # who takes pieces gives its pools up between two, too
    taking = {"reference.compute_ref_log_prob", "reward.compute_reward"} if pieces > 1 else set()
    assert "actor.generate_sequences" in names and names - taking == {"actor.generate_sequences"}
    dump = Batch.read_parquet(tmp_path / "cut/rollouts/step_000004.parquet")
    cut_off = [
        len(text) for text, ended in zip(dump["response"].rows(), dump["finished"].values, strict=True) if not ended
    ]
    # One character a token, special tokens left out: what did not end itself went on to the limit.
    assert all(150 < length <= 250 for length in cut_off), cut_off
    dumps = [Batch.read_parquet(tmp_path / f"cut/rollouts/step_{step:06d}.parquet") for step in range(5)]
    drawn = [versions.tolist() for dump in dumps for versions in dump["policy_version"].rows()]
    assert all(versions == sorted(versions) for versions in drawn)
    assert any(len(set(versions)) == 2 for versions in drawn), "each token says which weights drew it"
    assert summary["steps"] == 5


def test_an_on_policy_run_whose_ratio_is_not_one_is_an_error(launch_warm: Launch) -> None:
    from controller.execution.failed_calls import NodeError

    with pytest.raises(NodeError, match=r"actor.compute_log_prob .*must be 1 on-policy, its mean error is"):
        launch_warm("ppo", *TINY, f"reward.function={REWARD}", "actor.rollout.ratio_tolerance=1e-12")


def test_a_run_leaves_a_trace_a_drawing_idle_shares_and_a_critical_path(launch_warm: Launch, tmp_path: Path) -> None:
    summary = launch_warm("ppo", *APART, "name=seen", "steps=3", "output.checkpoint_every=null")
    assert set(summary["idle_share"]) == {"actor", "rollout", "critic", "reference"}
    assert all(0 <= share < 1 for share in summary["idle_share"].values())
    assert "actor.update_actor" in summary["critical_path_s"]
    assert sum(summary["critical_path_s"].values()) == pytest.approx(3 * summary["step_s"] / 3, rel=0.5)
    events = json.loads((tmp_path / "seen/trace.json").read_text())["traceEvents"]
    pools = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert pools == {"actor", "rollout", "critic", "reference", "host"}
    slices = [event for event in events if event["ph"] == "X"]
    update = next(event for event in slices if event["name"] == "actor.update_actor")
    assert update["args"]["tokens"] > 0 and update["args"]["step"] == 0
    sync = [event for event in slices if event["name"] == "actor.reshard"]
    assert {event["cat"] for event in sync} == {"actor", "rollout"} and all(e["args"]["bytes"] > 0 for e in sync)
    assert draw(tmp_path / "seen").read_bytes().startswith(b"\x89PNG")
    assert read_metrics(tmp_path / "seen")[0]["store/spilled_bytes"] == 0


def test_a_planned_placement_runs_and_reports_what_it_predicted(launch_warm: Launch, tmp_path: Path) -> None:
    launch_warm("ppo", "placement=auto", f"reward.function={REWARD}", *TINY, "name=planned", "steps=2")
    report = json.loads((tmp_path / "planned/plan_report.json").read_text())
    trained = ("actor.generate_sequences", "actor.update_actor", "critic.update_critic")
    for times in (report["predicted"]["nodes"], report["measured"]["nodes"], report["ratio"]):
        assert all(times[node] > 0 for node in trained)
    assert (tmp_path / "planned/calibration.yaml").exists()
