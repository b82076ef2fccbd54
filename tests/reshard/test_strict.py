"""The strict link keeps NCCL's rules, and the order of messages that weight syncs once had hangs on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from uuid import uuid4

import pytest
import torch
import torch.distributed as dist

from tests.engines.world import World
from tests.reshard.strict import Mismatch, StrictGroup, StrictWork
from workers.reshard import connect

pytestmark = pytest.mark.slow

WAIT_S = 1.5


@pytest.fixture(scope="module")
def world2() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


def _group(name: str, strict: bool = True) -> StrictGroup:
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store().clone())
    rank, world = dist.get_rank(), dist.get_world_size()
    if strict:
        return StrictGroup(store, rank, world, None, 20.0)
    return dist.ProcessGroupGloo(store, rank, world, connect._gloo_options(None, 20.0))  # type: ignore[return-value]


def _ends(works: list[StrictWork]) -> list[bool]:
    """Which operations have ended after a while."""
    until, ended = time.monotonic() + WAIT_S, []
    for work in works:
        try:
            work.wait(timedelta(seconds=max(until - time.monotonic(), 0.01)))
            ended.append(True)
        except (TimeoutError, RuntimeError):
            ended.append(False)
    return ended


# --- the rules -------------------------------------------------------------------------------------
def test_a_send_ends_when_the_peer_receives(world2: World) -> None:
    assert world2.run(_late_receive, uuid4().hex) == [[False, True], [True]]


def _late_receive(name: str) -> list[bool]:
    group, peer = _group(name), 1 - dist.get_rank()
    if dist.get_rank() == 1:
        time.sleep(WAIT_S + 1)
        return _ends([group.recv([torch.empty(3)], peer, 0)])
    work = group.send([torch.ones(3)], peer, 0)
    first = _ends([work])
    time.sleep(WAIT_S)
    return first + _ends([work])


def test_tags_do_not_count_and_sizes_must_agree(world2: World) -> None:
    assert world2.run(_pairs, uuid4().hex) == [["sent", "Mismatch"], [[1.0, 1.0, 1.0], "Mismatch"]]


def _pairs(name: str) -> list[object]:
    group, peer = _group(name), 1 - dist.get_rank()
    if dist.get_rank() == 0:
        group.send([torch.ones(3)], peer, 7).wait()
        return ["sent", _kind_of_error(group.send([torch.ones(3)], peer, 1))]
    first = torch.empty(3)
    group.recv([first], peer, 99).wait()
    return [first.tolist(), _kind_of_error(group.recv([torch.empty(4)], peer, 1))]


def _kind_of_error(work: StrictWork) -> str:
    try:
        work.wait()
    except Mismatch as error:
        return type(error).__name__
    return "none"


def test_a_rank_that_gives_up_wakes_nobody(world2: World) -> None:
    assert world2.run(_abandoned, uuid4().hex)[0] == [False]


def _abandoned(name: str) -> list[bool]:
    group = _group(name)
    if dist.get_rank() == 1:
        group.abort()
        return []
    sizes = [0, 3]
    return _ends([group.alltoall_base(torch.empty(3), torch.ones(3), sizes, sizes, None)])


# --- what weight syncs did, and what they do --------------------------------------------------------
@pytest.mark.parametrize(("strict", "ends"), [(False, True), (True, False)], ids=["gloo", "strict"])
def test_receive_then_send_of_single_messages_hangs_where_order_counts(world2: World, strict: bool, ends: bool) -> None:
    """The order of posting of the point-to-point exchange that rounds have replaced, two chunks of two streams."""
    for ended in world2.run(_point_to_point, uuid4().hex, strict):
        assert all(ended) == ends and (ends or not any(ended))


def _point_to_point(name: str, strict: bool) -> list[bool]:
    group, peer = _group(name, strict), 1 - dist.get_rank()
    works = []
    for _chunk in range(2):
        for stream in range(2):
            works.append(group.recv([torch.empty(8)], peer, stream))
        for stream in range(2):
            works.append(group.send([torch.ones(8)], peer, stream))
    return _ends(works)


@pytest.mark.parametrize("strict", [False, True], ids=["gloo", "strict"])
def test_rounds_end_on_both(world2: World, strict: bool) -> None:
    for rank, (ended, came) in enumerate(world2.run(_rounds, uuid4().hex, strict)):
        assert all(ended) and came == [[1.0 - rank] * 8] * 2


def _rounds(name: str, strict: bool) -> tuple[list[bool], list[list[float]]]:
    from torch.distributed.distributed_c10d import AllToAllOptions

    group, rank = _group(name, strict), dist.get_rank()
    sizes = [0 if peer == rank else 8 for peer in range(2)]
    came, works = [torch.empty(8), torch.empty(8)], []
    for chunk in range(2):
        mine = torch.full((8,), float(rank))
        works.append(group.alltoall_base(came[chunk], mine, sizes, sizes, AllToAllOptions()))
    return _ends(works), [one.tolist() for one in came]
