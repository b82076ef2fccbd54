"""Weights from a pool that trains to one that generates: two process groups that share a store and nothing else."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engines.world import World
from tests.reshard import two_worlds as rank
from tests.tiny import save_llama

Both = tuple[list[Any], list[Any]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def worlds() -> Iterator[tuple[World, World]]:
    both = World(rank.SENDERS), World(rank.RECEIVERS)
    yield both
    for world in both:
        world.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, so that one parameter has two names in the model that generates."""
    return save_llama(tmp_path_factory.mktemp("model"), tied=True)


def together(worlds: tuple[World, World], left: tuple[Any, ...], right: tuple[Any, ...]) -> Both:
    """A function and its arguments on all ranks of each world at the same time."""
    with ThreadPoolExecutor(2) as threads:
        sending = threads.submit(worlds[0].run, *left)
        receiving = threads.submit(worlds[1].run, *right)
        return sending.result(), receiving.result()


def connect(worlds: tuple[World, World], folder: Path, traces: bool = True, timeout_s: float = 30.0) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together(
        worlds, (rank.connect_sender, folder, port, timeout_s), (rank.connect_receiver, folder, port, timeout_s, traces)
    )


def sync(worlds: tuple[World, World], train: bool = True, must_change: bool = True) -> Both:
    return together(worlds, (rank.send, train, must_change), (rank.receive,))


@pytest.mark.parametrize("traces", [True, False], ids=["pieces", "whole tensors"])
def test_what_is_held_is_what_was_trained(worlds: tuple[World, World], model: Path, traces: bool) -> None:
    connect(worlds, model, traces)
    before = None
    for train in (False, True, True):
        sent, received = sync(worlds, train, must_change=train)
        assert all(answer["checksums"] == sent[0]["checksums"] for answer in received)
        assert all(answer["version"] == sent[0]["version"] for answer in received)
        assert len({answer["received"] for answer in received}) == 1, "each takes its copy once"
        assert sent[0]["checksums"] != before, "training changes what is sent"
        before = sent[0]["checksums"]


def test_weights_that_should_have_changed_are_refused_in_both_worlds(worlds: tuple[World, World], model: Path) -> None:
    connect(worlds, model)
    sync(worlds, train=False, must_change=False)
    sent, received = sync(worlds, train=False, must_change=True)
    assert all("must differ from it in some weight" in answer["error"] for answer in sent)
    assert all("failed on ranks [0, 1]" in answer["error"] and answer["version"] == -1 for answer in received)
    sent, received = sync(worlds)
    assert all(answer["checksums"] == sent[0]["checksums"] for answer in received), "the next sync succeeds"


def test_a_pool_that_does_not_come_is_named_and_the_next_sync_succeeds(
    worlds: tuple[World, World], model: Path
) -> None:
    connect(worlds, model, timeout_s=3.0)
    answers = worlds[1].run(rank.receive)
    assert all("phase 'meet'" in answer["error"] and "waiting for ranks 0, 1" in answer["error"] for answer in answers)
    sent, received = sync(worlds)
    assert all(answer["checksums"] == sent[0]["checksums"] for answer in received)
