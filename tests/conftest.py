"""Folders whose tests start real process groups, engines or clusters are `slow`: left out of `make check`.

`make test` runs files of tests in two processes (pytest-xdist). A test marked `alone` waits until the other process is
between two tests, and the other waits until it is over.
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the Makefile says: sums of more threads differ in their last bits
SLOW_FOLDERS = {"engines", "generation", "gpu", "runs"}
GATE, ROOM = Path(__file__), Path(__file__).with_name("__init__.py")
"""Files to lock. Whoever has the room may run; the gate is passed on the way in, and held by one that waits to be
alone, so that others do not go in again and again before it."""


@pytest.fixture(scope="session")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and what a run of four steps left, to copy (`local_runs.py`)."""
    from tests.local_runs import run_four_steps  # imports torch

    root = tmp_path_factory.mktemp("four_steps")
    run_four_steps(root)
    return root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it runs in the background with interrupts ignored, and processes of tests would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        # Whoever ends tests that take too long reads what has failed so far, as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries say at the end of the process what they lost


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of pytest-timeout: a wait is no part of a test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    alone = item.get_closest_marker("alone") is not None
    with GATE.open() as gate, ROOM.open() as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            # What is alive now (torch, vLLM, 4,000 tests) is no garbage: no later collection need go through it, of
            # which closing an engine asks for one.
            gc.collect()
            gc.freeze()
            fcntl.flock(room, fcntl.LOCK_UN)  # closing it would not do, where a test left a fork of this process
