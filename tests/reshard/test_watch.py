"""Who is named when a sync stalls: told from records at a real store."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from workers.network import rendezvous
from workers.reshard.watch import Record, Watch, stack_of


@pytest.fixture
def watches() -> Iterator[list[Watch]]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    made = [Watch(store.clone(), rank, 3, silence_s=2.0) for rank in range(3)]
    for watch in made:
        watch.start(0)
        watch.enter("exchange")
    yield made
    for watch in made:
        watch.close()


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def test_the_reason_of_the_rank_that_failed_reaches_those_that_wait(watches: list[Watch]) -> None:
    watches[2].fail("rank 2 failed with OSError: no memory left", [2])
    with watches[0].waiting([1, 2], "round 3 of 8"):
        assert within(10, lambda: watches[0].trouble is not None)
        found = watches[0].trouble
        assert found is not None and found.ranks == (2,) and "no memory left" in found.cause
        watches[0].start(1)  # the next sync begins without it
        assert watches[0].trouble is None


def test_a_rank_without_a_beat_is_named_and_one_that_computes_is_not(watches: list[Watch]) -> None:
    with watches[0].waiting([1, 2], ""):
        time.sleep(3.0)
        assert watches[0].trouble is None  # rank 1 and 2 beat, whatever else they do
        watches[1].close()
        assert within(15, lambda: watches[0].trouble is not None)
        found = watches[0].trouble
        assert found is not None and found.ranks == (1,) and "no word for" in found.cause and "exchange" in found.cause


def test_at_the_deadline_who_computes_is_named_before_who_waits(watches: list[Watch]) -> None:
    with watches[0].waiting([1, 2], "round 1"), watches[1].waiting([0, 2], "round 1"):
        time.sleep(0.5)
        assert watches[0].after_deadline([1, 2]) == (2,)
        assert watches[0].table([1]) and "waiting for ranks 0, 2" in watches[0].table([1])[0]


def test_after_an_error_who_says_nothing_is_named(watches: list[Watch]) -> None:
    watches[1].fail("connection closed", [])
    found = watches[0].after_error("connection closed by peer")
    assert found.ranks == (2,) and found.cause == "connection closed by peer"


def test_a_record_says_where_its_process_is() -> None:
    assert Record(phase="exchange", what="round 3 of 8", waits=(1,), pid=7, host="node-a").show(0) == (
        "rank 0 (pid 7 on node-a) in exchange, round 3 of 8, waiting for rank 1"
    )


def test_a_stack_of_another_process(tmp_path: Path) -> None:
    file = tmp_path / "stuck.py"
    file.write_text("import time\ndef stuck_here():\n    print('on', flush=True)\n    time.sleep(60)\nstuck_here()\n")
    with subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"on\n"
            said = stack_of(process.pid)
            if "not installed" in said or "ermission" in said:
                pytest.skip(said)
            assert "stuck_here" in said
        finally:
            process.kill()


def test_a_store_listens_on_its_pool_s_address_alone() -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    store = rendezvous("127.0.0.2", port, hosts=True, timeout_s=5.0)
    with socket.create_connection(("127.0.0.2", port), 5):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
    with pytest.raises(RuntimeError, match=f"must listen on 127.0.0.2:{port}.*already in use"):
        rendezvous("127.0.0.2", port, hosts=True, timeout_s=5.0)
    store.set("key", "value")
    assert rendezvous("127.0.0.2", port, hosts=False, timeout_s=5.0).get("key") == b"value"
