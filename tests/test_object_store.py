"""The object store's numbers are asked for beside the steps."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from controller.cluster import object_store
from controller.cluster.object_store import WAIT_S, ObjectStore


def test_a_node_that_does_not_answer_holds_no_step_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, silent = iter(range(10, 20)), threading.Event()

    def stats() -> Any:
        if silent.is_set():
            time.sleep(4 * WAIT_S)
            raise ConnectionError("a node did not answer")
        return SimpleNamespace(object_store_bytes_used=7, spilled_bytes_total=next(answers))

    monkeypatch.setattr(object_store, "_stats", stats)
    store = ObjectStore(every_s=0.0)
    assert store.metrics() == {"store/used_bytes": 7.0, "store/spilled_bytes": 1.0}  # 11 since 10
    silent.set()
    began = time.monotonic()
    assert store.metrics() == {} and time.monotonic() - began < 3 * WAIT_S
    assert store.metrics() == {}  # the same question; no other is asked meanwhile
    silent.clear()
    deadline = time.monotonic() + 20.0
    while not (found := store.metrics()) and time.monotonic() < deadline:
        pass
    assert found == {"store/used_bytes": 7.0, "store/spilled_bytes": 2.0}
