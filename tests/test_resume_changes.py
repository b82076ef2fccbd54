"""What may be another when a run goes on, what may not unless it is said, and that rows go on where they stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from controller.lifecycle.decisive_settings import check_unchanged, decisive_settings
from controller.lifecycle.manifest import Manifest
from controller.lifecycle.run_folder import sources_of, steps_from
from controller.record.metrics import read_metrics
from rlhf_dist.batch import Batch
from rlhf_dist.compose import Launch, compose
from rlhf_dist.config import SourceConfig
from rlhf_dist.data.source import PromptSource
from rlhf_dist.typed import ConfigError
from tests.local_runs import launched, run_local
from tests.tiny import save_llama

RECIPE = """
from rlhf_dist.algorithms import policy_gradient
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reward
from beside_mine import SCALE


def length(prompt, response, answer):
    return float(len(response))


@host_op(reads=("rewards", "response_mask"), writes=("advantages",))
def scaled(batch):
    mask = batch["response_mask"]
    return Batch({"advantages": Column(SCALE * batch["rewards"].values.repeat(mask.lengths), mask.offsets)})


@recipe
def mine(prompts: Prompts, actor: Actor, reward: Reward) -> None:
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=2))
    actor.update_actor(scaled(batch), loss=policy_gradient())
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user's; one for all tests, since a process has one module of a name."""
    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "model")
    return folder


@pytest.fixture
def mine(place: Path) -> Callable[..., Launch]:
    (place / "mine.py").write_text(RECIPE)
    (place / "beside_mine.py").write_text("SCALE = 1.0\n")
    (place / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')

    def launch(*overrides: str) -> Launch:
        base = [f"model.path={place / 'model'}", f"data.train.path={place / 'data.jsonl'}", "model.dtype=float32"]
        return compose(str(place / "mine.py"), [*base, "reward.function=length", *overrides])

    return launch


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


MATTERS = {
    "seed": "1",
    "actor.optimizer.lr": "1",
    "actor.optimizer.betas": "[0.5,0.6]",
    "data.prompts_per_step": "16",
    "data.train.shuffle": "false",
    "actor.rollout.temperature": "0.5",
    "actor.rollout.max_response_tokens": "9",
    "actor.engine.dtype": "bfloat16",
    "reward.failed_reward": "0",
}
HARMLESS = (
    *("steps=1000", "output.keep_checkpoints=7", "actor.engine.micro_batch_tokens=7", "reward.timeout_s=7"),
    *("actor.rollout.kv_cache_bytes=99999999", "placement.pools.main.slots=2", "ray.call_timeout_s=7"),
)


def test_what_matters_to_a_step_and_what_does_not(mine: Callable[..., Launch]) -> None:
    before = decisive_settings(mine())
    assert changed(before, decisive_settings(mine(*HARMLESS))) == set()
    other = mine(*(f"{key}={value}" for key, value in MATTERS.items()))
    assert changed(before, decisive_settings(other)) == set(MATTERS)


def test_files_count_by_what_they_hold(mine: Callable[..., Launch], place: Path) -> None:
    before = decisive_settings(mine())
    shutil.copytree(place / "model", place / "moved")
    shutil.move(place / "data.jsonl", place / "rows.jsonl")
    moved = (f"model.path={place / 'moved'}", f"data.train.path={place / 'rows.jsonl'}")
    assert changed(before, decisive_settings(mine(*moved))) == set()
    with (place / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "1+2=", "answer": "3"}\n')
    assert changed(before, decisive_settings(mine(*moved))) == {"data.train.path"}
    weights = place / "moved/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert changed(before, decisive_settings(mine(*moved))) == {"data.train.path", "actor.model.path"}


@pytest.mark.parametrize(
    ("file", "old", "new", "matters"),
    [
        ("mine.py", "@recipe", "# a comment\n\n@recipe", False),
        ("mine.py", "n=2", "n=3", True),
        ("mine.py", "len(response)", "-len(response)", True),
        ("beside_mine.py", "1.0", "2.0", True),
    ],
)
def test_code_counts_but_for_comments(
    mine: Callable[..., Launch], place: Path, file: str, old: str, new: str, matters: bool
) -> None:
    before = decisive_settings(mine())
    (place / file).write_text((place / file).read_text().replace(old, new))
    assert bool(changed(before, decisive_settings(mine()))) == matters


def test_a_change_is_refused_with_both_values_unless_it_is_named() -> None:
    was, now = {"seed": 0, "actor.optimizer.lr": 1e-5}, {"seed": 1, "actor.optimizer.lr": 2e-5}
    with pytest.raises(ConfigError) as refused:
        check_unchanged(Path("runs/x/step_4"), was, now, ["seed"])
    assert str(refused.value) == (
        "runs/x/step_4 was made with actor.optimizer.lr=1e-05 (now 2e-05); set what it was, or go on with the new one "
        "and resume_changes=[actor.optimizer.lr]"
    )
    assert check_unchanged(Path("x"), was, now, ["*.lr", "seed"]) == [
        "actor.optimizer.lr=1e-05 (now 2e-05)",
        "seed=0 (now 1)",
    ]
    assert check_unchanged(Path("x"), was, {**was, "later": 1}, []) == [], "a setting of a later version"
    with pytest.raises(ConfigError, match=r"data.heldout=null \(now set\)"):
        check_unchanged(Path("x"), {"data.heldout": None}, {"data.heldout.path": "contents 3f"}, [])
    with pytest.raises(ConfigError, match="no setting 'lr' decides"):
        check_unchanged(Path("x"), was, now, ["lr"])


def test_rows_go_on_where_they_stopped_however_often_their_number_changes(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{n}+1="}}\n' for n in range(70)))
    source = PromptSource(
        SourceConfig(path=str(tmp_path / "rows.jsonl")), tokenizer=tmp_path / "model", seed=3, max_prompt_tokens=20
    )
    launch = compose("grpo", [f"model.path={tmp_path / 'model'}", "task=none", "reward.function=math:sqrt"])
    before, drawn = None, list[Batch]()
    for rows, until in ((8, 4), (16, 6), (3, 9), (5, 11)):  # 32 + 32 + 9 + 10 rows
        now = replace(launch, run=replace(launch.run, data=replace(launch.run.data, prompts_per_step=rows)))
        of = sources_of(now, before)["prompts"]
        first = 0 if before is None else before.step
        drawn += [source.emit(step, of["rows"], of["shift"]) for step in range(first, until)]
        sources = {"prompts": of}
        before = Manifest(step=until, recipe="grpo", roles=(), numbers={}, files={}, sources=sources)
    whole = Batch.concat(drawn)
    assert whole["group_id"].values.tolist() == list(range(83)), "none skipped, none twice"
    assert list(whole["prompt"].rows()) == list(source.take(np.arange(83))["prompt"].rows())
    counted = replace(launch, run=replace(launch.run, data=replace(launch.run.data, epochs=2)), epoch_rows=70)
    assert steps_from(counted, {"prompts": {"rows": 16, "shift": -32}}) == 11, "4 steps of 8 rows, and 7 of 16 for 108"


def test_a_resumed_run_with_other_rows_a_step_uses_every_row_once(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    rows = [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(16)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_local(launched(tmp_path, "steps=4"))
    more = ("steps=6", "resume=auto", "data.prompts_per_step=4")
    with pytest.raises(ConfigError, match=r"made with data.prompts_per_step=2 \(now 4\); .*resume_changes=\[data.pro"):
        run_local(launched(tmp_path, *more))
    run_local(launched(tmp_path, *more, "resume_changes=[data.prompts_per_step]"))
    metrics = read_metrics(tmp_path / "runs/x")
    assert [row["examples/rows"] for row in metrics] == [2, 2, 2, 2, 4, 4]
    assert [row["examples/epoch"] for row in metrics] == [0.125, 0.25, 0.375, 0.5, 0.75, 1.0]
    run_local(launched(tmp_path, "steps=7", "resume=auto", "data.prompts_per_step=4"))
    assert read_metrics(tmp_path / "runs/x")[-1]["examples/epoch"] == 1.25, "what was changed once is its own now"
