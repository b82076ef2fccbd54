"""Checkpoints in a store: complete or invisible, whatever fails on the way, and a run goes on from there elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from controller.lifecycle import uploads as uploads_module
from controller.lifecycle.checkpoint import Checkpoint, DamagedCheckpoint, begin_checkpoint
from controller.lifecycle.checkpoint_store import CheckpointStore, StoreError
from controller.lifecycle.manifest import NAME
from controller.lifecycle.uploads import Uploads
from controller.record.metrics import read_metrics
from rlhf_dist.typed import ConfigError
from tests.local_runs import launched, run_local
from tests.s3_server import s3_server


class Faulty(MemoryFileSystem):
    """A file system in memory whose k-th write fails, is cut short, or takes a while."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    writes: ClassVar[int] = 0
    fault: ClassVar[Callable[[int, bytes], bytes]] = staticmethod(lambda number, content: content)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        Faulty.writes += 1
        super().pipe_file(path, Faulty.fault(Faulty.writes, value), mode, **options)

    def put_file(self, lpath: str, rpath: str, *_: Any, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())


fsspec.register_implementation("faulty", Faulty, clobber=True)


@pytest.fixture
def store() -> CheckpointStore:
    Faulty.store.clear()
    Faulty.writes, Faulty.fault = 0, staticmethod(lambda number, content: content)
    return CheckpointStore("faulty://bucket/runs/", "x", {})


def checkpoint(root: Path, step: int) -> Checkpoint:
    """One with five files."""

    def save(role: str, folder: str) -> None:
        for name in ("a", "b", "c"):
            (Path(folder) / name).write_bytes(f"{step} {name}".encode() * 1000)
        (Path(folder) / "crc-00001.json").write_text("{}")

    numbers = {"kl": {"coef": 0.5}}
    return begin_checkpoint(
        root, step=step, recipe="sft", ranks={"actor": 1}, numbers=numbers, save_role=save, keep=0
    ).finish()


def once(part: Callable[[], None]) -> None:
    part()


def test_what_was_put_is_what_is_fetched(store: CheckpointStore, tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "here", 4)
    store.put(given, once)
    assert store.steps() == [4]
    found = store.fetch(4, tmp_path / "there/step_4")
    assert isinstance(found, Checkpoint) and found.manifest == given.manifest
    for name in (*given.manifest.files, NAME):
        assert (found.folder / name).read_bytes() == (given.folder / name).read_bytes()


@pytest.mark.parametrize("write", range(1, 6))
@pytest.mark.parametrize("cut", [False, True], ids=["refused", "cut"])
def test_a_write_that_fails_publishes_nothing(store: CheckpointStore, tmp_path: Path, write: int, cut: bool) -> None:
    def fault(number: int, content: bytes) -> bytes:
        if number == write and not cut:
            raise OSError("the bucket is on holiday")
        return content[:-1] if number == write else content

    Faulty.fault = staticmethod(fault)
    given = checkpoint(tmp_path, 4)
    with pytest.raises(StoreError, match=r"could not copy step_4 to faulty://bucket/runs/x: "):
        store.put(given, once)
    assert store.steps() == []
    store.put(given, once)
    assert store.steps() == [4], "the same again is enough"


@pytest.mark.parametrize("name", ["actor/a", NAME])
def test_what_was_damaged_in_the_store_is_not_taken(store: CheckpointStore, tmp_path: Path, name: str) -> None:
    store.put(checkpoint(tmp_path, 4), once)
    path = next(path for path in Faulty.store if path.endswith(f"step_4/{name}"))
    content = bytearray(Faulty.store[path].getvalue())
    content[len(content) // 2] ^= 1
    store._files.pipe_file(path, bytes(content))
    found = store.fetch(4, tmp_path / "there/step_4")
    assert isinstance(found, DamagedCheckpoint) and "faulty://bucket/runs/x" in found.problem
    assert not (tmp_path / "there/step_4").exists()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "FIRST_WAIT_S", 0.01)


def test_an_upload_is_tried_again_until_it_is_there(store: CheckpointStore, tmp_path: Path, quick: None) -> None:
    def fault(number: int, content: bytes) -> bytes:
        if number in (2, 3, 5, 9):
            raise OSError("slow down")
        return content[: len(content) // 2] if number == 7 else content

    Faulty.fault = staticmethod(fault)
    notes: list[str] = []
    with Uploads(store, keep=1, retry_s=20, tell=notes.append) as uploads:
        uploads.add(checkpoint(tmp_path, 2))
        deadline = time.monotonic() + 10
        while not uploads.done and time.monotonic() < deadline:
            time.sleep(0.01)
        uploads.add(checkpoint(tmp_path, 4))
    assert (uploads.done, uploads.failed) == ([2, 4], [])
    assert store.steps() == [4], "older ones go once the newer one is there"
    assert any("checkpoint after 2 steps, on its way: OSError: slow down; tried again for" in note for note in notes)


def test_an_upload_that_never_arrives_is_said_and_the_run_goes_on(
    store: CheckpointStore, tmp_path: Path, quick: None
) -> None:
    def fault(number: int, content: bytes) -> bytes:
        raise OSError("no such bucket")

    Faulty.fault = staticmethod(fault)
    notes: list[str] = []
    with Uploads(store, keep=1, retry_s=0.2, tell=notes.append) as uploads:
        uploads.add(checkpoint(tmp_path, 2))
    assert (uploads.done, uploads.failed) == ([], [2]) and store.steps() == []
    assert f"is in {tmp_path}/step_2 alone: could not copy step_2 to faulty://bucket/runs/x: OSError: no" in notes[-1]
    with pytest.raises(ConfigError, match="cannot be written within .* no such bucket.*check its URL"):
        store.probe()


def test_a_slow_store_delays_nobody_and_its_files_are_not_deleted_under_it(
    store: CheckpointStore, tmp_path: Path
) -> None:
    asked, answers = Event(), Event()

    def fault(number: int, content: bytes) -> bytes:
        asked.set()
        assert answers.wait(60)
        return content

    Faulty.fault = staticmethod(fault)
    notes: list[str] = []
    with Uploads(store, keep=0, retry_s=20, tell=notes.append) as uploads:
        first = checkpoint(tmp_path, 2)
        uploads.add(first)
        assert asked.wait(60) and uploads.in_use(first.folder)
        uploads.add(checkpoint(tmp_path, 4))
        uploads.add(checkpoint(tmp_path, 6))
        answers.set()
    assert (uploads.done, uploads.failed, store.steps()) == ([2, 6], [4], [2, 6])
    assert any("after 4 steps is not copied: one before it is under way" in note for note in notes)
    assert not first.folder.exists(), "it was to be deleted, and is once it is not needed"


@pytest.mark.parametrize(
    ("url", "said"),
    [("nowhere://bucket", "Protocol not known: nowhere"), ("s3://bucket", "pip install 'rlhf-dist")],
)
def test_a_store_that_is_none_is_refused(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # where another test has loaded it
    with pytest.raises(ConfigError, match=f"output.store={url}: .*{said}"):
        CheckpointStore(url, "x", {})


# --- a real S3 protocol ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """A server that speaks S3, with a bucket; what reaches it."""
    for package in ("moto", "s3fs"):
        if "CI" not in os.environ:
            pytest.importorskip(package)
    with s3_server() as options:
        yield options


def test_a_bucket_that_is_not_there_is_said_and_not_made(s3: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="s3://buckte/runs/x cannot be written .*bucket does not exist"):
        CheckpointStore("s3://buckte/runs", "x", dict(s3)).probe()
    assert not fsspec.filesystem("s3", **s3).exists("buckte")


def test_a_folder_of_another_disk_is_made(tmp_path: Path) -> None:
    there = CheckpointStore(f"file://{tmp_path}/backup/runs", "x", {})
    there.probe()
    there.put(checkpoint(tmp_path / "here", 4), once)
    assert there.steps() == [4] and (tmp_path / "backup/runs/x/step_4" / NAME).is_file()


def test_a_run_goes_on_from_s3_on_a_machine_that_has_nothing(
    s3: dict[str, str], four_steps: Path, tmp_path: Path
) -> None:
    for name in ("model", "data.jsonl"):
        (tmp_path / name).symlink_to(four_steps / name)
    given = ", ".join(f"{key}: {value!r}" for key, value in s3.items())
    store = ("output.store=s3://bucket/runs", f"output.store_options={{{given}}}")
    run_local(launched(tmp_path, "steps=2", *store))
    files = fsspec.filesystem("s3", **s3)
    assert files.exists(f"bucket/runs/x/step_2/{NAME}")
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(ConfigError, match="s3://bucket/runs/x holds an earlier run; set resume=auto"):
        run_local(launched(tmp_path, "steps=4", *store))
    run_local(launched(tmp_path, "steps=4", "resume=auto", *store))
    assert [row["step"] for row in read_metrics(tmp_path / "runs/x")] == [2, 3]
    ours, theirs = (root / "runs/x/models/actor/model-00001.safetensors" for root in (tmp_path, four_steps))
    assert ours.read_bytes() == theirs.read_bytes()
    (tmp_path / "runs/x/checkpoints/step_4/manifest.json").write_text("")
    files.pipe_file("bucket/runs/x/step_4/actor/model.json", b"{}")
    run_local(launched(tmp_path, "steps=5", "resume=auto", *store))
    assert [row["step"] for row in read_metrics(tmp_path / "runs/x")] == [2, 3, 4]
