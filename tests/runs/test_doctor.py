"""The doctor on a real Ray with real engines: once with all checks, some of which must fail, and once interrupted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from controller.doctor.catalogue import CHECKS
from controller.doctor.command import report
from controller.doctor.finding import Check, ok
from controller.doctor.subject import Subject, open_subject
from controller.doctor.versions import packages
from tests.runs.test_interrupt import descendants, shared_memory

NOWHERE = "/proc/nowhere/runs"
"""Nobody can make it."""


def hangs(subject: Subject) -> Any:
    return ok(subject.ranks.attempt("hangs", "tests.runs.doctor_worker:Hangs"))


@pytest.fixture(scope="module")
def told(cluster: None) -> dict[str, Any]:
    """What is told of this machine, with ranks that hang between those that do not."""
    checks = [check for check in CHECKS if check.name != "deepspeed"]  # 12 s, most of them imports
    at = [check.name for check in checks].index("training")
    checks.insert(at, Check(name="hangs", run=hangs, limit_s=3.0, advice="wait no longer"))
    said = io.StringIO()
    with open_subject(None, NOWHERE, packages()) as subject, contextlib.redirect_stdout(said):
        code = report(subject, checks, time.monotonic() + 200, as_json=True)
    return {"code": code, **json.loads(said.getvalue())}


def test_what_is_wrong_fails_and_nothing_else_does(told: dict[str, Any]) -> None:
    states = {check["name"]: check["state"] for check in told["checks"]}
    assert len(states) == len(CHECKS) and told["code"] == 1
    assert {name for name, state in states.items() if state == "failed"} == {"disk", "run-folder", "hangs"}, told
    assert all(set(check) == {"name", "state", "found", "advice", "seconds"} for check in told["checks"])
    assert all(check["advice"] for check in told["checks"] if check["state"] in ("failed", "warning"))


def test_ranks_that_hang_are_ended_in_time_and_others_take_their_place(told: dict[str, Any]) -> None:
    checks = {check["name"]: check for check in told["checks"]}
    assert checks["hangs"]["found"] == "no answer within 3 s" and checks["hangs"]["seconds"] < 6
    assert "fsdp over 2 ranks: two steps" in checks["training"]["found"], "on new ranks"


def test_what_the_checks_found_is_there(told: dict[str, Any]) -> None:
    found = {check["name"]: check["found"] for check in told["checks"]}
    assert found["run-folder"].startswith(f"{NOWHERE} cannot be written to: ")
    assert "2 ranks agree" in found["gloo"] and "3 tensors verified" in found["weight-transfer"]
    assert "16 MiB to 1 node" in found["object-store"] and found["clocks"].startswith("at most ")
    assert "synced in pieces and verified" in found["generation"]
    ledger = re.search(r"trainer ([\d.]+) MB \(([\d.]+)\)", found["memory-ledger"])
    assert ledger and float(ledger[1]) == pytest.approx(float(ledger[2]), rel=0.02) and float(ledger[1]) > 40


@pytest.mark.alone
def test_an_interrupted_doctor_ends_within_seconds_and_leaves_nothing(tmp_path: Path) -> None:
    before, output = shared_memory(), tmp_path / "output.txt"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [
        sys.executable,
        "-m",
        "controller.commands.cli",
        "doctor",
        "--only",
        "disk,processes",
        "--folder",
        str(tmp_path),
    ]
    with output.open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 100
        while " disk " not in output.read_text() and time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.1)
        time.sleep(1.0)  # now the ranks are starting
        family = descendants(running.pid)
        assert len(family) > 3, output.read_text()
        started = time.monotonic()
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=30) == 130 and time.monotonic() - started < 10, output.read_text()
        assert output.read_text().splitlines()[-1] == "interrupted"
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive and shared_memory() <= before
    finally:
        if running.poll() is None:
            running.kill()
