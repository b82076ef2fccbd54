"""`rlhf-dist replay`: a node once more from what the run kept, to the last bit; what is kept, and how much of it."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.commands.cli import main
from controller.commands.replay import _text
from controller.execution.failed_calls import NodeError
from controller.lifecycle.replay import _on_one_rank, replay
from controller.lifecycle.replayed import Replayed, rounding_of
from controller.report.payload import run_payload
from controller.report.run_files import read_run
from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import EngineConfig, FunctionConfig, LanguageModelConfig, RolloutConfig
from rlhf_dist.saved_calls import SavedCall, SavedRows, read_calls, saved_steps, step_folder, together, write_call
from rlhf_dist.typed import ConfigError
from tests.tiny import save_llama

RECIPE = """
import sys

from rlhf_dist.algorithms import loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts, Reward, State, state_op


def length(prompt, response, answer):
    if hasattr(sys, "a_person_looks"):  # in a run it is called in a process that nobody sits at
        breakpoint()
    return float(len(response))


class Baseline(State):
    def initial(self, cfg):
        return {"mean": 0.0}

    @state_op(reads=("rewards",))
    def see(self, values, batch):
        mean = 0.5 * values["mean"] + 0.5 * float(batch["rewards"].values.mean())
        return {"mean": mean}, {"mean": Mean(mean, 0)}


@host_op(reads=("rewards", "response_ids"), writes=("advantages",))
def centred(batch, *, over: float):
    breakpoint()
    rewards = batch["rewards"].values - over
    return Batch({"advantages": Column(rewards.repeat(batch["response_ids"].lengths), batch["response_ids"].offsets)})


@loss(reads=("advantages",), average="tokens")
def plain(model, rows, weight: float = 1.0):
    breakpoint()
    if rows["advantages"].max() > LIMIT:
        raise ValueError("an advantage is too large")
    return -weight * rows["advantages"] * model.log_probs, {}


@recipe
def mine(prompts: Prompts, actor: Actor, baseline: Baseline, reward: Reward) -> None:
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=2))
    baseline.see(batch)
    breakpoint()
    batch = centred(actor.compute_log_prob(batch), over=baseline.value("mean"))
    actor.update_actor(batch, loss=plain(0.5), epochs=2, mini_batches=2)
    actor.compute_log_prob(batch)
"""
NODES = ("prompts", "actor.generate_sequences", "reward.compute_reward", "baseline.see", "actor.compute_log_prob")
NODES += ("centred", "actor.update_actor", "actor.compute_log_prob#2")

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    save_llama(folder / "model")
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(16)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module", autouse=True)
def nobody_stops() -> Iterator[None]:
    hook, sys.breakpointhook = sys.breakpointhook, lambda *args, **kwargs: None
    yield
    sys.breakpointhook = hook


def run_of(place: Path, name: str, *overrides: str, limit: float = 1e9) -> Path:
    """A run of two or three steps in this process."""
    recipe = place / f"{name}.py"
    recipe.write_text(RECIPE.replace("LIMIT", str(limit)))
    said = [
        f"model.path={place / 'model'}",
        "task=none",
        f"data.train.path={place / 'data.jsonl'}",
        "model.dtype=float32",
    ]
    said += ["data.prompts_per_step=2", "steps=3", "actor.rollout.max_response_tokens=4", "reward.function=length"]
    said += [f"name={name}", f"output.root={place / 'runs'}", "actor.optimizer.lr=1e-3", "output.save_model=false"]
    said += ["actor.rollout.ratio_tolerance=1000000"]  # the last node looks at what the update has changed
    code = main(["run", f"{recipe}:mine", *said, *overrides, "--local"])
    assert code == (0 if limit > 1e6 else 1)
    return place / "runs" / name


@pytest.fixture(scope="module")
def kept(place: Path) -> Path:
    return run_of(place, "kept", "output.inputs_every=1", "output.checkpoint_every=1", "output.keep_checkpoints=2")


def test_every_node_gives_to_the_last_bit_what_it_gave_in_the_run(kept: Path) -> None:
    assert saved_steps(kept) == {1: sorted(NODES), 2: sorted(NODES)}, "the newest two of three steps"
    for node in NODES:
        done = replay(kept, 2, node)
        compared = [*done.columns(), *done.numbers()]
        assert compared and all(one.equal for one in compared), (node, [one for one in compared if not one.equal])
    again = replay(kept, 2, "actor.compute_log_prob#2")
    assert "checkpoints/step_2" in again.weights and "then actor.update_actor of step 2 again" in again.weights
    assert not list((kept / "inputs").rglob("*.pkl")) and not (kept / "replay").exists()


def test_other_weights_only_where_they_are_asked_for(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"those after 1 steps, and .*has step_2, step_3; --weights start\|step_2"):
        replay(kept, 1, "actor.compute_log_prob")
    assert main(["replay", str(kept), "--step", "1", "--node", "actor.compute_log_prob", "--weights", "start"]) == 0
    assert "not as in the run: at most" in capsys.readouterr().out
    assert main(["replay", str(kept), "--step", "1", "--node", "centred", "--format", "json"]) == 0, "needs none"
    said = json.loads(capsys.readouterr().out)
    assert said["columns"]["advantages"]["equal"] is True and said["rows"] == 4


def test_breakpoints_stop_in_recipe_host_op_loss_and_reward(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[tuple[str, Any]] = []

    def stop(*args: Any, **kwargs: Any) -> None:
        frame = sys._getframe(1)
        fetched = frame.f_locals["batch"].fetch("rewards") if frame.f_code.co_name == "mine" else None
        stopped.append((frame.f_code.co_name, fetched))

    monkeypatch.setattr(sys, "breakpointhook", stop)
    monkeypatch.setattr(sys, "a_person_looks", True, raising=False)
    for node in ("reward.compute_reward", "centred", "actor.update_actor"):
        replay(kept, 2, node)
    names = [name for name, _ in stopped]
    assert names.count("length") == 4 and "centred" in names and "plain" in names
    rewards = [fetched for name, fetched in stopped if name == "mine"]
    (recorded,) = read_calls(step_folder(kept, 2), "reward.compute_reward")
    assert recorded.outputs is not None and rewards[0] == recorded.outputs["rewards"].rows()


def test_a_node_that_fails_keeps_its_inputs_and_fails_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = run_of(place, "failed", limit=-1e9)
    assert saved_steps(failed) == {0: ["actor.update_actor"]}, "nothing is kept but of the call that failed"
    assert "rlhf-dist replay" in capsys.readouterr().out
    assert main(["replay", str(failed)]) == 0
    assert "failed: ValueError: an advantage is too large" in capsys.readouterr().out
    with pytest.raises(NodeError, match=r"an advantage is too large; at .*failed\.py:\d+ in plain"):
        replay(failed, 0, "actor.update_actor")
    recipe = place / "failed.py"
    recipe.write_text(recipe.read_text().replace("-1000000000.0", "1e9"))
    sys.modules.pop("failed", None)
    done = replay(failed, 0, "actor.update_actor")
    assert done.failure and done.recorded is None and done.metrics["actor/grad_norm"] > 0, "the file was mended"


def test_nothing_is_kept_where_it_is_switched_off(place: Path) -> None:
    assert not (run_of(place, "off", "output.keep_inputs=0", limit=-1e9) / "inputs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere", "--step", "1", "--node", "centred"), "nowhere is not the folder of a run"),
        (("RUN", "--step", "7", "--node", "centred"), "no inputs of step 7; it has those of step 1, 2"),
        (
            ("RUN", "--step", "2", "--node", "center"),
            "no inputs of center, did you mean centred? there are those of actor.",
        ),
        (("RUN", "--step", "2"), "--step and --node are given together"),
        (("RUN", "--step", "2", "--node", "actor.update_actor", "--weights", "step_9"), "has no such checkpoint"),
        (("RUN", "--step", "2", "--node", "centred", "actor.lr=1"), "did you mean actor.optimizer.lr"),
    ],
    ids=["no run", "no step", "typo", "no node", "no checkpoint", "setting"],
)
def test_mistakes_are_one_line(
    kept: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *(str(kept) if word == "RUN" else word for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") == 1


def test_parts_of_several_ranks_are_one_batch_in_the_order_of_the_whole(tmp_path: Path) -> None:
    def part(number: int, index: list[int], parent: list[int]) -> SavedCall:
        columns = Batch(
            {"x": Column.ragged([[float(i)] * (i + 1) for i in index]), "t": Column.strings([str(i) for i in index])}
        )
        outputs = Batch({"y": Column(np.asarray([10 * index[p] for p in parent]))})
        rows = SavedRows(columns=columns, row_index=np.asarray(index), mini_batch=np.asarray(index) % 2)
        return SavedCall(step=0, node="a.b", part=number, batches=(rows,), outputs=outputs, parent=np.asarray(parent))

    for call in (part(0, [3, 0], [0, 0, 1]), part(1, [1, 2], [1, 0])):
        write_call(tmp_path, call)
    whole = together(read_calls(tmp_path, "a.b"))
    (rows,) = whole.batches
    assert rows.columns["t"].rows() == ["0", "1", "2", "3"] and rows.columns["x"].lengths.tolist() == [1, 2, 3, 4]
    assert rows.row_index.tolist() == [0, 1, 2, 3] and rows.mini_batch is not None
    assert rows.mini_batch.tolist() == [0, 1, 0, 1]
    assert whole.outputs is not None and whole.outputs["y"].rows() == [0, 10, 20, 30, 30]
    assert whole.parent is not None and whole.parent.tolist() == [0, 1, 2, 3, 3]
    write_call(tmp_path, replace(part(0, [3, 0], [0]), failure="again"))
    assert read_calls(tmp_path, "a.b")[0].failure == "again", "of a step that was done again"
    (tmp_path / "a.b/part_0/call.json").write_text("{")
    with pytest.raises(ValueError, match="is not what a run wrote"):
        read_calls(tmp_path, "a.b")


@pytest.mark.parametrize(
    ("dtype", "off", "rounded"), [("float32", 2e-5, True), ("float32", 1e-3, False), ("bfloat16", 1e-2, True)]
)
def test_a_number_is_as_in_the_run_to_the_last_bit_to_rounding_or_not(dtype: str, off: float, rounded: bool) -> None:
    log_probs = np.asarray([-4.0, -1e-6, np.nan], np.float32)
    kept = {
        "ids": Column(np.asarray([7, 8, 9])),
        "log_probs": Column(log_probs),
        "text": Column.strings(["a", "b", "c"]),
    }
    found = {**kept, "log_probs": Column(log_probs + np.float32(off)), "ids": Column(np.asarray([7, 8, 10]))}
    done = Replayed(
        node="a.b", step=3, line="mine.py:7", weights="none", rows=3, of_rows=5, parts=2, failure="",
        rounding=rounding_of([dtype]), outputs=Batch(found), recorded=Batch(kept),
        metrics={"loss": 1.0 + off, "nan": np.nan, "own": 1.0}, recorded_metrics={"loss": 1.0, "nan": np.nan},
    )  # fmt: skip
    said = {one.name: (one.equal, one.rounded) for one in (*done.columns(), *done.numbers())}
    assert said["log_probs"] == said["loss"] == (False, rounded)
    assert said["ids"] == (False, False), "a token has no rounding"
    assert said["text"] == said["nan"] == (True, False) and said["own"] == (None, False)
    lines = "\n".join(_text(done))
    assert "3 rows of the 5 in the run: the processes that had the others kept nothing" in lines
    assert ("as in the run, to rounding: +" in lines) == rounded
    assert json.loads(json.dumps(done.as_json()))["columns"]["log_probs"]["rounded"] is rounded


def test_settings_that_cut_a_model_over_ranks_are_put_aside() -> None:
    role = LanguageModelConfig(
        engine=EngineConfig(tensor_parallel=2, replicas=4), rollout=RolloutConfig(tensor_parallel=2)
    )
    whole = _on_one_rank(role)
    assert (whole.engine.tensor_parallel, whole.engine.replicas, whole.rollout.tensor_parallel) == (1, 1, 1)
    assert _on_one_rank(FunctionConfig()) == FunctionConfig()


def test_what_there_is_is_listed_without_reading_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("\ndata:\n\nplacement:\n\noutput:\n")
    rows = SavedRows(columns=Batch({"x": Column(np.arange(2))}), row_index=np.arange(2))
    for part, failure in ((0, ""), (1, "too large")):
        write_call(step_folder(tmp_path, 3), SavedCall(step=3, node="a.b", part=part, failure=failure, batches=(rows,)))
    for file in tmp_path.rglob("*.arrow"):
        file.write_text("no rows")
    assert main(["replay", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "--step 3 --node a.b   failed: too large\n"
    (step_folder(tmp_path, 3) / "a.b/part_0/call.json").write_text("{")
    assert main(["replay", str(tmp_path)]) == 2
    assert "is not what a run wrote" in capsys.readouterr().err


def test_a_profiled_step_and_stacks_while_the_run_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, said = place / "runs/traced", list[str]()

    def stop(*args: Any, **kwargs: Any) -> None:
        """A person asks from another terminal, while the run is in a host op."""
        if sys._getframe(1).f_code.co_name == "centred" and not said:
            capsys.readouterr()
            said.append(str(main(["stacks", str(run)])) + capsys.readouterr().out)

    monkeypatch.setattr(sys, "breakpointhook", stop)
    assert run_of(place, "traced", "profile.steps=[1]", "steps=2", "output.checkpoint_every=null") == run
    assert said[0].startswith("0== the run itself, process ") and "thread MainThread:" in said[0]
    assert "traced.py" in said[0] and "in centred" in said[0]
    assert "profiled step 1: 9 traces of 2 processes" in capsys.readouterr().out
    traces = sorted(file.relative_to(run).as_posix() for file in (run / "profile").rglob("*.json.gz"))
    assert "profile/step_000001/local-0/actor.update_actor.json.gz" in traces
    with gzip.open(run / "profile/step_000001/local-0/actor.update_actor.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert any("backward" in str(name) for name in names)
    table = (run / "profile/step_000001/local-0/actor.update_actor.txt").read_text()
    assert "MiB at most" in table and "Self CPU" in table
    facts = dict(run_payload(read_run(run), [], [])["facts"])
    assert "local-0: actor.compute_log_prob, " in facts["profile/step_000001"]
    assert main(["stacks", str(run)]) == 2, "it has ended"
    assert "is of a run that is not under way" in capsys.readouterr().err
