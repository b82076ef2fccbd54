"""A cluster is not started where its object store or its session has no room."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.cluster.pool import ClusterError
from controller.cluster.store_room import remark_on_room

HUGE = 1 << 60


def test_room_in_shared_memory_on_disk_or_nowhere(tmp_path: Path) -> None:
    assert remark_on_room(1 << 20, tmp_path, tmp_path) == ""
    remark = remark_on_room(1 << 20, tmp_path / "none", tmp_path)
    assert "its object store lies on disk, which is slow: " in remark and "--shm-size" in remark
    with pytest.raises(ClusterError, match=r"have no room: .* MiB free, .*; give more shared memory"):
        remark_on_room(HUGE, tmp_path, tmp_path)


@pytest.mark.parametrize(("name", "why"), [("file", "File exists"), ("file/below", "Not a directory")])
def test_a_session_needs_a_folder(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match=rf"keeps its session in .*, which cannot be written \({why}.*RAY_TMPDIR"):
        remark_on_room(1 << 20, tmp_path, tmp_path / name)


def test_a_session_s_folder_is_made_as_ray_would(tmp_path: Path) -> None:
    remark_on_room(1, tmp_path, tmp_path / "new/below")
    assert (tmp_path / "new/below").is_dir()
