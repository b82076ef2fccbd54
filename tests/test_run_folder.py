"""Where a run begins: what an earlier one left is never replaced without a word, and a failed start blocks nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from controller.lifecycle.folder_lock import LOCK
from controller.lifecycle.manifest import Manifest
from controller.lifecycle.run_folder import Beginning, claim_folder, find_beginning
from rlhf_dist.compose import Launch, compose
from rlhf_dist.typed import ConfigError
from tests.tiny import save_llama

Start = Callable[..., Launch]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(tmp_path: Path, model: Path) -> Start:
    def launch(*overrides: str) -> Launch:
        base = [f"model.path={model}", "task=none", "steps=10", "name=x", f"output.root={tmp_path / 'runs'}"]
        return compose("sft", [*base, *overrides])

    return launch


def claimed(launch: Launch) -> tuple[Beginning, list[str]]:
    notes: list[str] = []
    beginning = find_beginning(launch)
    with claim_folder(launch, notes.append) as claim:
        assert (claim.folder, claim.first_step) == (beginning.folder, beginning.first_step)
    return beginning, notes


def failure(launch: Launch) -> str:
    with pytest.raises(ConfigError) as caught:
        claimed(launch)
    with pytest.raises(ConfigError, match=".*"):
        find_beginning(launch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def finish_steps(folder: Path, model: Path, *, checkpoint: int = 0, steps: int = 0) -> None:
    """What a run leaves that did a step: its metrics, perhaps a checkpoint, perhaps a summary."""
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    if checkpoint:
        role = folder / f"checkpoints/step_{checkpoint}/actor/hf"
        role.mkdir(parents=True)
        (role / "config.json").write_text((model / "config.json").read_text())
        manifest = Manifest(step=checkpoint, recipe="sft", roles=("actor",), numbers={}, files={})
        (role.parents[1] / "manifest.json").write_text(manifest.text())
    if steps:
        (folder / "summary.json").write_text(json.dumps({"steps": steps}))


def test_a_failed_start_does_not_block_the_name(start: Start) -> None:
    beginning, notes = claimed(start())
    assert beginning.note == "" and notes == []
    (beginning.folder / "logs").mkdir()
    (beginning.folder / "metrics.jsonl").touch()
    for resume in ("never", "auto", "overwrite"):
        again, notes = claimed(start(f"resume={resume}", f"seed={len(notes)}"))
        assert again.first_step == 0 and "never finished a step" in notes[0]
    assert (beginning.folder / "logs").is_dir(), "what was printed is kept"


def test_an_earlier_run_is_continued_deleted_or_refused_as_asked(start: Start, model: Path) -> None:
    folder = claimed(start())[0].folder
    finish_steps(folder, model, checkpoint=4)
    assert "holds an earlier run; set resume=auto" in failure(start())
    beginning, notes = claimed(start("resume=auto"))
    assert beginning.first_step == 4 and "continues after 4 steps" in notes[0]
    assert claimed(start("resume=overwrite"))[0].deletes
    assert sorted(path.name for path in folder.iterdir()) == [LOCK, "config.yaml"]


def test_auto_keeps_a_run_without_a_checkpoint_under_another_name(start: Start, model: Path) -> None:
    for number in (1, 2):
        folder = claimed(start("resume=auto"))[0].folder
        finish_steps(folder, model)
        beginning, notes = claimed(start("resume=auto"))
        assert beginning.first_step == 0 and f"is kept as {folder}.{number}" in notes[0]
        assert (folder.parent / f"x.{number}/metrics.jsonl").read_text() and not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(("checkpoint", "summary", "refused"), [(10, 10, True), (12, 12, True), (10, 5, False)])
def test_a_run_that_has_all_its_steps_is_not_run_again(
    start: Start, model: Path, checkpoint: int, summary: int, refused: bool
) -> None:
    folder = claimed(start())[0].folder
    finish_steps(folder, model, checkpoint=checkpoint, steps=summary)
    if refused:
        assert f"has all its {checkpoint} steps already; set steps above {checkpoint}" in failure(start("resume=auto"))
    else:
        assert claimed(start("resume=auto"))[0].first_step == 10, "its export may still be missing"
    assert claimed(start("resume=auto", "steps=20"))[0].first_step == checkpoint


def test_only_a_runs_folder_is_used_or_deleted(start: Start, tmp_path: Path) -> None:
    mine = tmp_path / "runs/x/models"
    mine.mkdir(parents=True)
    (mine / "weights").write_text("mine")
    for resume in ("never", "auto", "overwrite"):
        assert "holds files that are not of a run" in failure(start(f"resume={resume}"))
    assert (mine / "weights").read_text() == "mine"


def test_a_run_of_an_earlier_version_is_known_by_its_settings(start: Start, model: Path) -> None:
    folder = claimed(start())[0].folder
    finish_steps(folder, model)
    (folder / LOCK).unlink()
    assert claimed(start("resume=overwrite"))[0].deletes


HOLD = """
import sys
from controller.lifecycle.run_folder import claim_folder
from rlhf_dist.compose import compose
with claim_folder(compose("sft", sys.argv[1:]), print):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("resume", ["never", "auto", "overwrite"])
def test_a_live_run_is_left_alone_and_its_owner_named(start: Start, tmp_path: Path, model: Path, resume: str) -> None:
    base = [f"model.path={model}", "task=none", "name=x", f"output.root={tmp_path / 'runs'}"]
    command = [sys.executable, "-c", HOLD, *base]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout and owner.stdin and owner.stdout.readline() == "held\n"
        finish_steps(tmp_path / "runs/x", model)
        assert f"belongs to a run that is under way (process {owner.pid} on" in failure(start(f"resume={resume}"))
        owner.kill()  # Nothing tidies up: the kernel lets the lock go.
    assert (tmp_path / "runs/x/metrics.jsonl").is_file()
    assert claimed(start("resume=overwrite"))[0].deletes


def test_a_root_that_cannot_be_written_is_said_before_anything_starts(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file/below", Path("/proc/nowhere")):
        text = failure(start(f"output.root={root}"))
        assert text.startswith("output.root: ") and "cannot be written" in text
    assert not os.path.exists(tmp_path / "runs")


def test_config_yaml_says_how_to_run_it_again(start: Start) -> None:
    launch = start()
    folder = claimed(launch)[0].folder
    first = (folder / "config.yaml").read_text().splitlines()[0]
    assert first == f"# rlhf-dist run sft --config {folder}/config.yaml name=ANOTHER"
    assert compose("sft", ["name=x"], str(folder / "config.yaml")).roles == launch.roles
