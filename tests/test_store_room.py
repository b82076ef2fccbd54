"""A cluster is not started where its object store or its session has no room."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.cluster.pool import ClusterError
from controller.cluster.store_room import LONGEST_FOLDER, remark_on_room, temporary_folder

HUGE = 1 << 60


def test_room_in_shared_memory_on_disk_or_nowhere(tmp_path: Path) -> None:
    assert remark_on_room(1 << 20, tmp_path, shared=tmp_path) == ""
    remark = remark_on_room(1 << 20, tmp_path, shared=tmp_path / "none")
    assert "its object store lies on disk, which is slow: " in remark and "--shm-size" in remark
    with pytest.raises(ClusterError, match=r"have no room: .* MiB free, .*; give more shared memory"):
        remark_on_room(HUGE, tmp_path, shared=tmp_path)


@pytest.mark.parametrize(("name", "why"), [("file", "File exists"), ("file/below", "Not a directory")])
def test_a_session_needs_a_folder(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match=rf"keeps its session in .*, which cannot be written \({why}.*RAY_TMPDIR"):
        remark_on_room(1 << 20, tmp_path / name, shared=tmp_path)


def test_a_session_s_folder_is_made_as_ray_would(tmp_path: Path) -> None:
    remark_on_room(1, tmp_path / "new/below", shared=tmp_path)
    assert (tmp_path / "new/below").is_dir()


def test_a_session_lies_where_ray_would_put_it_and_where_its_sockets_can(monkeypatch: pytest.MonkeyPatch) -> None:
    fits, long = "/" + "x" * (LONGEST_FOLDER - 1), "/" + "x" * LONGEST_FOLDER
    for ray, usual, folder in ((None, None, "/tmp"), (None, fits, fits), (None, long, "/tmp"), (fits, "/y", fits)):
        for name, value in (("RAY_TMPDIR", ray), ("TMPDIR", usual)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert temporary_folder() == Path(folder)
    monkeypatch.setenv("RAY_TMPDIR", long)
    with pytest.raises(ClusterError, match=f"at most {LONGEST_FOLDER} bytes of its path, got {LONGEST_FOLDER + 1}"):
        temporary_folder()
