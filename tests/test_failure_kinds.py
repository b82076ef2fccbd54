"""Every failure is of one kind, told where it is raised: only infrastructure is tried again."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlhf_dist.failure import Failure, FailureKind, failure_of_call
from rlhf_dist.python_files import load_file
from rlhf_dist.rewards.rule import RewardFunctionError
from workers.engines.training.interface import NonFiniteLoss
from workers.failures import failure_of
from workers.language_model import OffPolicy
from workers.reshard.link import SyncStopped


def no_store() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(milliseconds=200))


def refused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        socket.create_connection(free.getsockname(), timeout=1)


def wrapped() -> None:
    try:
        no_store()
    except RuntimeError as error:
        raise RuntimeError("the ranks cannot meet") from error


def scored() -> None:
    try:
        refused()
    except ConnectionError as error:
        raise RewardFunctionError("reward function ask_a_server for row 3 failed") from error


def raises(error: BaseException) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


@pytest.mark.parametrize(
    ("fails", "kind"),
    [
        (no_store, FailureKind.INFRASTRUCTURE),
        (refused, FailureKind.INFRASTRUCTURE),
        (wrapped, FailureKind.INFRASTRUCTURE),
        (raises(SyncStopped("meet", 0, [1], "", "gone")), FailureKind.INFRASTRUCTURE),
        (raises(RuntimeError("[/src/gloo/transport/tcp/pair.cc:547] Connection closed")), FailureKind.INFRASTRUCTURE),
        (scored, FailureKind.CODE),
        (raises(KeyError("nope")), FailureKind.CODE),
        (raises(SystemExit(3)), FailureKind.CODE),
        (lambda: json.loads("{"), FailureKind.DATA),
        (lambda: b"\xff".decode(), FailureKind.DATA),
        (lambda: torch.empty(1 << 50), FailureKind.OUT_OF_MEMORY),
        (raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), FailureKind.OUT_OF_MEMORY),
        (raises(NonFiniteLoss("ppo_clip", 3, (5,))), FailureKind.NUMERICS),
        (raises(OffPolicy("the ratio must be 1")), FailureKind.NUMERICS),
    ],
)
def test_the_kind_of_what_is_raised(
    fails: Callable[[], object], kind: FailureKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This file stands for ours: what a user's own line raises has its own test.
    monkeypatch.setattr("workers.failures.is_users", lambda file: False)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - its kind is what is looked at
        fails()
    assert failure_of(caught.value).kind is kind


USERS = """
import json, socket

def ask(port):
    socket.create_connection(("127.0.0.1", port), timeout=1)

def parse(text):
    return json.loads(text)
"""


def test_what_a_users_line_talks_to_is_not_of_this_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USERS)
    mine = load_file(file)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError) as caught:
            mine.ask(free.getsockname()[1])
    assert failure_of(caught.value).kind is FailureKind.CODE
    with pytest.raises(ValueError, match="Expecting") as parsed:
        mine.parse("{")
    assert failure_of(parsed.value).kind is FailureKind.CODE


def test_a_process_that_is_lost_is_infrastructure() -> None:
    assert failure_of_call(ValueError("ActorDiedError, or what Ray says")).kind is FailureKind.INFRASTRUCTURE
    assert Failure(lost=True, text="gone", kind=FailureKind.CODE).kind is FailureKind.INFRASTRUCTURE
