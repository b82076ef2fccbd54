"""Whose a run's folder is: of live runs, runs that were killed, other boots and other hosts, with and without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from controller.lifecycle import folder_lock
from controller.lifecycle.folder_lock import LOCK, FolderTaken, Owner, held, owner_of, state_of, this_process

HERE = Owner(host="a", pid=1, started=100.0, boot="now", since="today")


@pytest.mark.parametrize(
    ("owner", "started", "age_s", "state"),
    [
        (HERE, 100.0, 1e6, "live"),  # a process that is there lives, whatever its beat
        (HERE, None, 0.0, "stale"),
        (HERE, 900.0, 0.0, "stale"),  # the pid is another process's now
        (replace(HERE, boot="before"), 100.0, 0.0, "stale"),
        (replace(HERE, host="b", boot="b's"), 100.0, 5.0, "watch"),
        (replace(HERE, host="b", boot="b's"), 100.0, 61.0, "stale"),
    ],
)
def test_an_owner_lives_or_not(owner: Owner, started: float | None, age_s: float, state: str) -> None:
    assert state_of(owner, HERE, started, age_s) == state


def leave(folder: Path, owner: Owner, age_s: float = 0.0) -> None:
    """What a run leaves that was killed so long ago."""
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    then = time.time() - age_s
    os.utime(folder / LOCK, (then, then))


def test_the_record_is_there_while_the_run_lasts(tmp_path: Path) -> None:
    assert owner_of(tmp_path) == ("free", "")
    with held(tmp_path, print):
        state, said = owner_of(tmp_path)
        assert state == "live" and said.startswith(f"process {os.getpid()} on ")
        with pytest.raises(FolderTaken, match=f"process {os.getpid()}"), held(tmp_path, print):
            pass
    assert owner_of(tmp_path) == ("free", "") and (tmp_path / LOCK).is_file(), (
        "the file says that a run made the folder"
    )


@pytest.mark.parametrize(
    "owner",
    [
        replace(this_process(), pid=2**22 + 1),
        replace(this_process(), started=1.0),
        replace(this_process(), boot="before"),
        replace(this_process(), host="elsewhere", boot="other"),
    ],
    ids=["gone", "another process", "another boot", "another host"],
)
def test_what_a_killed_run_left_is_taken_over_at_once(tmp_path: Path, owner: Owner) -> None:
    leave(tmp_path, owner, age_s=120.0)
    assert owner_of(tmp_path)[0] == "stale"
    notes: list[str] = []
    with held(tmp_path, notes.append):
        assert owner_of(tmp_path)[0] == "live"
    assert notes == []


def test_a_young_beat_of_another_host_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "STALE_S", 1.0)
    owner, notes = replace(this_process(), host="node-7", boot="other"), list[str]()
    leave(tmp_path, owner)
    started = time.monotonic()
    with held(tmp_path, notes.append):
        assert 0.8 < time.monotonic() - started < 5.0, "no beat came"
    assert "was held by process" in notes[0] and "node-7" in notes[0]
    leave(tmp_path, owner)
    threading.Timer(0.3, os.utime, [tmp_path / LOCK]).start()
    with pytest.raises(FolderTaken, match="on node-7 since"), held(tmp_path, notes.append):
        pass


def test_the_owner_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.05)
    with held(tmp_path, print):
        os.utime(tmp_path / LOCK, (1.0, 1.0))
        deadline = time.monotonic() + 5
        while (tmp_path / LOCK).stat().st_mtime == 1.0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > 1.0


def test_a_file_system_without_locks_goes_by_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with held(tmp_path, print), pytest.raises(FolderTaken), held(tmp_path, print):
        pass
    leave(tmp_path, replace(this_process(), started=1.0))
    with held(tmp_path, print):
        pass
