"""The demo's folder: what is not a demo's stays, and so does that of a demo under way."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.commands.cli import main
from controller.lifecycle.folder_lock import held


def _refusal(root: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert main(["demo", "--root", str(root), *overrides]) == 2
    return capsys.readouterr().err


def test_files_that_are_not_of_a_demo_are_never_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    assert "holds files that are not of a demo (thesis.tex); choose another --root" in _refusal(tmp_path, capsys)
    assert thesis.read_text() == "years of work" and not (tmp_path / "model").exists()

    other = tmp_path / "other"
    (other / "sft").mkdir(parents=True)
    (other / "sft/data.jsonl").write_text("{}")
    assert "not of a demo (sft)" in _refusal(other, capsys)
    assert (other / "sft/data.jsonl").exists()


def test_a_mistyped_setting_deletes_no_earlier_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo/config.yaml").write_text("\ndata:\n\nplacement:\n\noutput:\n")
    (tmp_path / "summary.json").write_text("{}")
    assert "unknown key stepz; did you mean steps?" in _refusal(tmp_path, capsys, "stepz=3")
    assert (tmp_path / "ppo/config.yaml").is_file() and (tmp_path / "summary.json").is_file()


def test_a_folder_that_cannot_be_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file/below", Path("/proc/nowhere")):
        assert f"error: {root} cannot be written (" in _refusal(root, capsys)


def test_a_demo_under_way_keeps_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ppo"
    folder.mkdir()
    with held(folder, print):
        for how in ([], ["resume=auto"]):
            assert "is written by another demo (process" in _refusal(tmp_path, capsys, *how)
    assert folder.is_dir() and not (tmp_path / "model").exists()
