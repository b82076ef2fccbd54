"""A part of `make chaos`: a rank that is stopped, in a run with a Ray of its own. Other faults take minutes each."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import Chaos, summary
from benchmarks.chaos_modes import SYNC_TABLE


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_go_on_to_the_same_weights_and_leave_nothing(tmp_path: Path) -> None:
    faults = [fault for fault in SYNC_TABLE if fault.kind == "stop trainer in update"]
    outcomes = list(Chaos(tmp_path).run(faults))
    for one in outcomes:
        assert one.happened and one.how and one.identical, one
        assert one.named and not one.left, one
        assert one.notice_s is not None and one.notice_s < 60, one
    report = summary(outcomes)
    assert (report["recovered"], report["rows_lost"], report["rows_doubled"]) == (1, 0, 0)
