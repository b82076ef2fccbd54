"""Disks that are full, read-only, or hold something else: said before the start where it can be known."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controller.lifecycle.disk_space import RunFolderFailed, said_of_disk
from controller.lifecycle.folder_lock import LOCK
from controller.lifecycle.run_folder import find_beginning
from controller.record.metrics import read_metrics
from rlhf_dist.typed import ConfigError
from tests.local_runs import launched, run_local

Disk = Callable[[str], Path]


@pytest.fixture
def disk(four_steps: Path, tmp_path: Path) -> Iterator[Disk]:
    """A file system of its own for runs, of the size that is asked for; called again, it changes."""
    place = tmp_path / "runs"
    for name in ("model", "data.jsonl"):
        (tmp_path / name).symlink_to(four_steps / name)
    place.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        again = ["-o", f"remount,{options}"] if mounted else ["-t", "tmpfs", "-o", options, "tmpfs"]
        done = subprocess.run(["mount", *again, str(place)], capture_output=True, text=True, check=False)
        if done.returncode and "CI" not in os.environ:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted = True
        return tmp_path

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def test_a_disk_without_room_for_a_checkpoint_is_refused(disk: Disk) -> None:
    root = disk("size=128k")
    with pytest.raises(ConfigError, match=r"runs has 128.0 KiB free, and a checkpoint takes 2\d\d.\d KiB \(actor 2"):
        find_beginning(launched(root, "steps=4"))
    assert find_beginning(launched(root, "steps=4", "output.checkpoint_every=null")).note == ""
    disk("size=600k")
    assert "3 of them at one time: it may fill up" in find_beginning(launched(root, "steps=8")).note
    disk("size=9m")
    assert find_beginning(launched(root, "steps=8")).note == ""
    disk("ro")
    with pytest.raises(ConfigError, match=r"output.root: .*runs cannot be written \(Read-only file system\)"):
        find_beginning(launched(root, "steps=4"))


def test_a_disk_that_fills_up_ends_the_run_and_its_last_checkpoint_is_whole(disk: Disk, four_steps: Path) -> None:
    root = disk("size=480k")
    with pytest.raises(Exception, match="No space left on device") as ended:
        run_local(launched(root, "steps=4"))
    assert "\n" not in str(ended.value) and type(ended.value).__module__.startswith("controller.")
    disk("size=9m")
    run_local(launched(root, "steps=4", "resume=auto"))
    assert [row["step"] for row in read_metrics(root / "runs/x")] == [0, 1, 2, 3]
    assert sorted(path.name for path in (root / "runs/x/checkpoints").iterdir()) == ["step_2", "step_4"]
    ours, theirs = (place / "runs/x/models/actor/model-00001.safetensors" for place in (root, four_steps))
    assert ours.read_bytes() == theirs.read_bytes()


def test_what_cannot_be_written_ends_the_run_naming_its_checkpoint(disk: Disk, four_steps: Path) -> None:
    folder = disk("size=2m") / "runs/x"
    shutil.copytree(four_steps / "runs/x", folder)
    with pytest.raises(
        RunFolderFailed, match=r"No space left on device; \S+ \S+ free\); its last checkpoint is step_4;"
    ):
        with said_of_disk(folder):
            (folder / "metrics.jsonl").write_bytes(bytes(4 << 20))


@pytest.mark.parametrize(
    ("name", "folder"), [("metrics.jsonl", True), ("config.yaml", True), ("checkpoints", False), ("logs", False)]
)
def test_a_file_where_a_folder_should_be_is_said(four_steps: Path, tmp_path: Path, name: str, folder: bool) -> None:
    for entry in ("model", "data.jsonl"):
        (tmp_path / entry).symlink_to(four_steps / entry)
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x" / LOCK).touch()
    if folder:
        (tmp_path / "runs/x" / name).mkdir()
    else:
        (tmp_path / "runs/x" / name).touch()
    with pytest.raises(
        ConfigError, match=rf"{name} is a (file|folder), and the run writes a (file|folder) of that name"
    ):
        find_beginning(launched(tmp_path, "steps=4"))
