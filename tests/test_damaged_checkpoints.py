"""Every kind of damage to every file of a checkpoint: the newest good one is taken, and what was left out is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from controller.commands.cli import main
from controller.lifecycle.checkpoint import (
    Checkpoint,
    CheckpointIncomplete,
    PendingCheckpoint,
    begin_checkpoint,
    checked,
    find_checkpoints,
)
from controller.lifecycle.export import ExportIncomplete, check_exported, export
from controller.lifecycle.run_folder import claim_folder, find_beginning
from controller.record.metrics import read_metrics
from rlhf_dist.typed import ConfigError
from tests.local_runs import launched, settings

SHARD = "actor/shard-00001-model-00001-of-00001.safetensors"
FILES = (
    *("manifest.json", "actor/crc-00001.json", "actor/model.json", SHARD),
    *("actor/hf/config.json", "actor/hf/tokenizer.json"),
)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "no text": lambda file: file.write_bytes(b"\xff\xfe" + file.read_bytes()[2:]),
    "a bit flipped": _flip,
    "gone": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.fixture
def root(four_steps: Path, tmp_path: Path) -> Path:
    for name in ("model", "data.jsonl"):
        (tmp_path / name).symlink_to(four_steps / name)
    shutil.copytree(four_steps / "runs", tmp_path / "runs")
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_the_newest_good_checkpoint_is_taken(root: Path, name: str, damage: str) -> None:
    folder = root / "runs/x/checkpoints"
    DAMAGES[damage](folder / "step_4" / name)
    launch, notes = launched(root, "steps=6", "resume=auto"), list[str]()
    find_beginning(launch)
    with claim_folder(launch, notes.append) as beginning:
        assert beginning.first_step == 2
    (said,) = [note for note in notes if "continues" in note]
    assert f"continues after 2 steps; damaged and left out: step_4 ({name.split('/')[-1]}" in said.replace(
        "actor/", ""
    ).replace("hf/", "")
    assert (folder / "step_4.set_aside").is_dir() and not (folder / "step_4").exists(), "its step is done again"


def test_a_manifest_of_another_step_is_not_believed(root: Path) -> None:
    folder = root / "runs/x/checkpoints"
    shutil.rmtree(folder / "step_4")
    shutil.copytree(folder / "step_2", folder / "step_3")
    notes: list[str] = []
    with claim_folder(launched(root, "resume=auto", "steps=6"), notes.append) as beginning:
        assert beginning.first_step == 2
    assert "step_3 (manifest.json is of step 2, which is not the folder's)" in notes[0]


def test_a_step_is_picked_and_later_ones_do_not_come_back(root: Path) -> None:
    notes: list[str] = []
    with claim_folder(launched(root, "steps=6", "resume=step_2"), notes.append) as beginning:
        assert beginning.first_step == 2
    assert [one.step for one in find_checkpoints(root / "runs/x/checkpoints")] == [2]
    with pytest.raises(ConfigError, match=r"resume=step_4: .*x has step_2$"):
        find_beginning(launched(root, "steps=6", "resume=step_4"))


def test_where_none_is_good_all_are_named_and_nothing_is_touched(root: Path) -> None:
    folder = root / "runs/x/checkpoints"
    for step in (2, 4):
        DAMAGES["cut"](folder / f"step_{step}" / SHARD)
    with pytest.raises(ConfigError) as refused:
        find_beginning(launched(root, "steps=6", "resume=auto"))
    said = str(refused.value)
    assert "\n" not in said and f"step_4 ({SHARD} has" in said and f"step_2 ({SHARD} has" in said
    assert sorted(path.name for path in folder.iterdir()) == ["step_2", "step_4"]


def test_a_run_goes_on_from_the_good_one_to_the_same_weights(
    root: Path, four_steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _flip(root / "runs/x/checkpoints/step_4" / SHARD)
    metrics = root / "runs/x/metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(lines[0] + b'{"step": 1, "lo\n\xff\xfe\n' + b"".join(lines[2:]))
    assert main(["run", "sft", "--local", *settings(root, "steps=4", "resume=auto")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "damaged and left out: step_4" in said and "2 faulty or cut lines of the earlier run are left out" in said
    assert [row["step"] for row in read_metrics(root / "runs/x")] == [0, 2, 3]
    ours, theirs = (place / "runs/x/models/actor/model-00001.safetensors" for place in (root, four_steps))
    assert ours.read_bytes() == theirs.read_bytes()


def test_an_export_of_a_damaged_one_is_refused(root: Path, tmp_path: Path) -> None:
    _flip(root / "runs/x/checkpoints/step_4" / SHARD)
    for given in ("checkpoints/step_4", "."):
        with pytest.raises(ConfigError, match=r"the checkpoint is damaged: .*step_4 \(actor/shard.*CRC-32 differs"):
            export(str(root / "runs/x" / given), str(tmp_path / "out"), None, None, False)


@pytest.mark.parametrize("damage", ["empty", "cut", "gone"])
@pytest.mark.parametrize("name", ["model-00001.safetensors", "model.safetensors.index.json", "config.json"])
def test_an_exported_model_that_is_not_seen_whole_gets_no_name(root: Path, name: str, damage: str) -> None:
    folder = root / "runs/x/models/actor"
    check_exported(folder, "actor")
    DAMAGES[damage](folder / name)
    with pytest.raises(ExportIncomplete, match=r"the exported model of actor is not complete in .*all nodes share"):
        check_exported(folder, "actor")


@pytest.mark.parametrize("unseen", ["crc-00002.json", "shard-00002-model-00001-of-00002.safetensors"])
def test_a_checkpoint_without_a_ranks_files_is_not_published(tmp_path: Path, unseen: str) -> None:
    def save(role: str, folder: str) -> None:
        for rank in (1, 2):
            shard = Path(folder) / f"shard-{rank:05d}-model-{1:05d}-of-{2:05d}.safetensors"
            shard.write_bytes(b"weights")
            (Path(folder) / f"crc-{rank:05d}.json").write_text(json.dumps({shard.name: [7, 0]}))
        (Path(folder) / unseen).unlink()

    pending = begin_checkpoint(tmp_path, step=3, recipe="sft", ranks={"actor": 2}, numbers={}, save_role=save, keep=1)
    with pytest.raises(CheckpointIncomplete, match=r"rank 1 of actor wrote is not seen.*put output.root on a file sys"):
        pending.finish()
    assert find_checkpoints(tmp_path) == []


def test_the_last_good_one_is_never_deleted(tmp_path: Path) -> None:
    def pending(step: int, keep: int) -> PendingCheckpoint:
        numbers = {"kl": {"coef": 0.5}}
        return begin_checkpoint(
            tmp_path, step=step, recipe="sft", ranks={}, numbers=numbers, save_role=print, keep=keep
        )

    for step in (1, 2):
        pending(step, keep=1).finish()
    assert [one.step for one in find_checkpoints(tmp_path)] == [2]
    DAMAGES["empty"](tmp_path / "step_2/manifest.json")
    good = pending(3, keep=1).finish()
    assert isinstance(checked(good, read=None), Checkpoint) and (tmp_path / "step_3").is_dir()
    again = pending(3, keep=1).finish()
    assert (again.folder, (tmp_path / "step_3.set_aside").is_dir()) == (good.folder, True), "a step that is done again"
    assert pending(4, keep=1).partial.is_dir() and (tmp_path / "step_3").is_dir(), "until the next one is complete"
