"""A reward function costs its row, whatever it does: it runs in a process of its own that is watched and replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rlhf_dist.batch import Batch, Column
from rlhf_dist.rewards.calls import Outcome
from rlhf_dist.rewards.child import Limits
from rlhf_dist.rewards.load import load_reward
from rlhf_dist.rewards.process import OUTPUT_BYTES, ScoringProcess, under_way
from rlhf_dist.rewards.rule import RewardFunctionError, reward_columns

SOURCE = """
import asyncio, os, signal, sys, time

def faulty(response):
    if response == "exit": os._exit(7)
    if response == "sys.exit": sys.exit(3)
    if response == "hang": time.sleep(1e6)
    if response == "stuck": any(iter(int, 1))
    if response == "alarm": signal.alarm(1); time.sleep(20)
    if response == "leak": kept = [bytearray(1 << 26) for _ in iter(int, 1)]
    if response == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if response == "raise": raise KeyError("nope")
    return 1.0

def alarms(response):
    signal.signal(signal.SIGALRM, signal.SIG_IGN if response == "0" else signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    time.sleep(0.1)
    return float(os.getpid())

def forks(response):
    child = os.fork()
    if response == "stays" and child == 0: time.sleep(1000)
    return float(child)

def loud(response):
    for _ in range(64): print("x" * (1 << 20))
    return 1.0

async def waits(response):
    await asyncio.sleep(0.2)
    if response == "exit": os._exit(7)
    if response == "hang": await asyncio.sleep(1e6)
    if response == "raise": raise KeyError("nope")
    return 1.0

def process(response):
    return float(os.getpid())

def children_leak(response):
    if 0 in (os.fork(), os.fork()):
        kept = bytearray(120 << 20)
        for at in range(0, len(kept), 4096): kept[at] = 1
        time.sleep(100)
    time.sleep(100)

def environment(response): return float(response in os.environ)

class NeedsAFile:
    def __init__(self): self.file = open("/no/such/file")
    def __call__(self, response): return 1.0
"""


@pytest.fixture
def scoring(tmp_path: Path) -> object:
    file = tmp_path / "rewards_of_test.py"
    file.write_text(SOURCE)

    @contextmanager
    def start(
        name: str,
        timeout_s: float = 20.0,
        memory_bytes: int = 512 << 20,
        role: str = "reward",
        environment: tuple[str, ...] = (),
    ) -> Iterator[object]:
        loaded = load_reward(f"{file}:{name}")
        limits = Limits(timeout_s=timeout_s, memory_bytes=memory_bytes, environment=environment)
        process = ScoringProcess(loaded, limits, role)

        def score(*responses: str, stop: bool = True) -> list[Outcome]:
            return process.score({"response": list(responses)}, len(responses), stop=stop)

        try:
            yield score
        finally:
            process.close()

    return start


def test_what_a_row_does_to_its_process_fails_that_row_and_no_other(scoring, tmp_path) -> None:  # type: ignore[no-untyped-def]
    bad = {
        "exit": r"ended its process (exit code 7)",
        "sys.exit": "called sys.exit(3)",
        "hang": "did not return within cost.timeout_s=2 s",
        "stuck": "did not return within cost.timeout_s=2 s",
        "alarm": "ended its process by SIGALRM",
        "leak": "raised MemoryError",
        "crash": "ended its process by SIGSEGV",
        "raise": f"raised KeyError: 'nope'; at {tmp_path}/rewards_of_test.py:12 in faulty",
    }
    rows = [row for text in bad for row in ("fine", text)] + ["fine"]
    with scoring("faulty", timeout_s=2.0, role="cost") as score:
        outcomes = score(*rows, stop=False)
        assert outcomes[::2] == [{"reward": 1.0}] * (len(bad) + 1)
        for outcome, text in zip(outcomes[1::2], bad.values(), strict=True):
            assert isinstance(outcome, str) and text in outcome
        assert score("fine") == [{"reward": 1.0}]
        stopped = score("fine", "exit", "hang", "hang")
        assert isinstance(stopped[1], str) and "exit code 7" in stopped[1]


def test_an_alarm_that_a_row_leaves_does_not_ring_in_the_next(scoring) -> None:  # type: ignore[no-untyped-def]
    with scoring("alarms") as score:
        outcomes = score(*map(str, range(4)))
        assert len({outcome["reward"] for outcome in outcomes}) == 1  # one process did all four


def test_a_copy_of_the_process_is_no_second_reward_and_ends_with_it(scoring) -> None:  # type: ignore[no-untyped-def]
    with scoring("forks") as score:
        outcomes = score("returns", "returns", "stays")
        assert all(outcome["reward"] > 0 for outcome in outcomes)  # the copies would say 0
        staying = int(outcomes[2]["reward"])
        assert psutil.pid_exists(staying)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(staying) and psutil.Process(staying).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_function_that_prints_for_ever_fills_no_log(scoring, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    with scoring("loud") as score:
        assert score("a") == [{"reward": 1.0}] == score("b")
        time.sleep(0.2)
    printed = capfd.readouterr().out
    assert len(printed) <= 2 * OUTPUT_BYTES + 200 and "bytes of the reward function's output left out]" in printed


def test_async_calls_wait_together_and_one_that_ends_the_process_is_found(scoring) -> None:  # type: ignore[no-untyped-def]
    with scoring("waits", timeout_s=3.0) as score:  # in which a process starts, on a busy machine too
        assert score("fine") == [{"reward": 1.0}]  # the process is up
        started = time.monotonic()
        assert score(*("fine",) * 16) == [{"reward": 1.0}] * 16
        assert time.monotonic() - started < 2.0  # one after the other is 3.2 s
        outcomes = score("fine", "hang", "fine", "exit", stop=False)
        assert outcomes[0] == outcomes[2] == {"reward": 1.0}
        assert outcomes[1] == "did not return within 3 s" and "exit code 7" in str(outcomes[3])
        assert "as one of rows" in str(score("exit", "fine")[0])
        rows = Batch({"response": Column.strings(["hang", "raise"])})
        with pytest.raises(RewardFunctionError, match="for row 1 .*nope"):  # not the one that had to be left
            reward_columns("waits", rows, score("hang", "raise"))


def test_memory_of_what_it_forks_counts(scoring) -> None:  # type: ignore[no-untyped-def]
    with scoring("children_leak", memory_bytes=320 << 20) as score:
        (outcome,) = score("a")
        assert "more than reward.memory_bytes=335544320" in str(outcome)


def test_a_process_that_is_killed_between_two_batches_is_replaced(scoring) -> None:  # type: ignore[no-untyped-def]
    with scoring("process") as score:
        (first,) = score("a")
        os.kill(int(first["reward"]), 9)
        (second,) = score("a")
        assert second["reward"] not in (first["reward"], float(os.getpid()))


def test_a_constructor_that_fails_is_said_at_the_start(scoring) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RewardFunctionError, match=r"NeedsAFile could not be set up: FileNotFoundError.*/no/such/file"):
        with scoring("NeedsAFile"):
            pass


def test_what_cannot_travel_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "locked.py"
    file.write_text(
        "import threading\nclass Locked:\n    def __init__(self): self.lock = threading.Lock()\n"
        "    def __call__(self, response): return 1.0\nlocked = Locked()\n"
    )
    with pytest.raises(ValueError, match="cannot be sent to the process that computes rewards.*name the class"):
        load_reward(f"{file}:locked")
    load_reward(f"{file}:Locked")


def test_a_reward_has_none_of_the_runs_secrets_but_those_that_are_named(  # type: ignore[no-untyped-def]
    scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "MY_DATABASE", "JUDGE_API_KEY")
    for name in secrets:
        monkeypatch.setenv(name, "planted")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with scoring("environment", environment=("JUDGE_API_KEY",)) as score:
        outcomes = score(*secrets, "OMP_NUM_THREADS", "PATH")
        assert [outcome["reward"] for outcome in outcomes] == [0, 0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(RewardFunctionError, match="reward.environment names NOT_THERE, which is not set"):
        with scoring("environment", environment=("NOT_THERE",)):
            pass


class _Returning(np.ndarray):  # type: ignore[type-arg]
    """A table whose calls return between one look and the next."""

    def __gt__(self, other: Any) -> Any:
        seen = np.asarray(self) > other
        np.asarray(self)[:] = 0.0
        return seen


def test_a_call_that_returns_while_it_is_looked_at_is_not_overdue() -> None:
    table = np.array([0.0, 100.0]).view(_Returning)
    assert under_way(table, before=40.0).tolist() == []
    assert under_way(np.array([0.0, 30.0, 100.0]), before=40.0).tolist() == [1]
    assert under_way(np.array([0.0, 30.0, 100.0])).tolist() == [1, 2]
