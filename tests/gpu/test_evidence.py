"""The file that `make gpu-evidence` writes, here without a GPU: what ran, what failed, what was skipped and why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
OTHERS = """
import pytest

pytestmark = pytest.mark.gpu

def test_passes(): pass

def test_fails(): assert 1 == 2, "one is not two"

def test_wants_more(): pytest.importorskip("no_such_library")

@pytest.fixture
def broken(): raise OSError("no such device")

def test_breaks_before_it_starts(broken): pass
"""


def evidence(output: Path, *paths: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.gpu.evidence", "--output", str(output), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT)
    assert output.is_file(), done.stderr + done.stdout
    return done.returncode, json.loads(output.read_text())


def test_outcomes_and_reasons_are_written_and_a_failure_is_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "test_others.py").write_text(OTHERS)
    (tmp_path / "test_unreadable.py").write_text("import no_such_library\n")
    code, found = evidence(tmp_path / "found.json", str(tmp_path))
    assert found["torch"] == torch.__version__ and (found["device"] is None) == (not torch.cuda.is_available())
    assert code == 1 and found["counts"] == {"passed": 1, "failed": 3, "skipped": 1}
    told = {
        test["name"].rpartition("::")[2].rpartition("/")[2]: (test["outcome"], test["reason"])
        for test in found["tests"]
    }
    assert told["test_passes"] == ("passed", "")
    assert told["test_fails"] == ("failed", "AssertionError: one is not two")
    assert told["test_breaks_before_it_starts"] == ("failed", "OSError: no such device")
    assert told["test_wants_more"][0] == "skipped" and "no_such_library" in told["test_wants_more"][1]
    assert "No module named 'no_such_library'" in told["test_unreadable.py"][1]


def test_everything_marked_gpu_is_in_this_folder_and_says_what_it_needs(request: pytest.FixtureRequest) -> None:
    marked = [item for item in request.session.items if item.get_closest_marker("gpu")]
    assert {item.path.parent for item in marked} <= {Path(__file__).parent}, "make gpu-evidence runs this folder"
    for item in marked:
        needs = [mark for mark in item.iter_markers("skipif") if mark.kwargs["reason"] == "needs a CUDA device"]
        assert needs and needs[0].args == (not torch.cuda.is_available(),), item.nodeid
