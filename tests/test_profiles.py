"""A profile is written whatever becomes of the op, and what becomes of the profile is not the op's failure."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
profiles = importlib.import_module("workers.profiles")


def test_an_op_that_fails_leaves_its_trace_and_its_table(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of the op"), profiles.profiled(tmp_path, "node"):
        torch.ones(3).sum()
        raise RuntimeError("of the op")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["node.json.gz", "node.txt"]
    assert "aten::sum" in (tmp_path / "node.txt").read_text()


def test_a_trace_that_cannot_be_written_is_said_and_fails_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with profiles.profiled(tmp_path / "file", "node"):
        torch.ones(3).sum()
    assert "the profile of node could not be written" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="of the op"), profiles.profiled(tmp_path / "file", "node"):
        raise RuntimeError("of the op")


def test_a_device_that_failed_does_not_hide_what_came_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("of the device")

    for name, does in (("is_available", lambda: True), ("is_initialized", lambda: True), ("synchronize", broken)):
        monkeypatch.setattr(torch.cuda, name, does)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    # A real one, told of a GPU that is not there, would leave traces of it in this process.
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: SimpleNamespace(start=list, stop=list))
    monkeypatch.setattr(profiles, "_write", lambda *about: None)
    with pytest.raises(RuntimeError, match="of the op"), profiles.profiled(tmp_path, "node"):
        raise RuntimeError("of the op")
    with pytest.raises(RuntimeError, match="of the device"), profiles.profiled(tmp_path, "node"):
        pass
