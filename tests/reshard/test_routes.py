"""Plans, carried out on numpy arrays: every element of every target box exactly once, from the nearest holder."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.reshard.groups import Parallel, generation_grid, parallel_layout, training_grid
from rlhf_dist.reshard.layout import ITEM_BYTES, Layout, LayoutError, ParameterLayout
from rlhf_dist.reshard.rounds import BucketError, Stream, default_bucket_bytes, rounds_of
from rlhf_dist.reshard.routes import LINKS, Routes, lower_bound_bytes, make_routes
from tests.reshard.models import LLAMA_70B, llama
from tests.reshard.random_layouts import random_pair


def holders(layout: Layout, name: str, element: tuple[int, ...]) -> set[int]:
    p = layout.parameters[name]
    inside = ((p.start <= np.array(element)) & (np.array(element) < p.stop)).all(axis=1)
    return set(p.rank[inside].tolist())


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 30), machines=st.sampled_from([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 3], [0, 1, 0, 1]]))
def test_every_element_arrives_once_from_the_nearest_holder(seed: int, machines: list[int]) -> None:
    source, target = random_pair(random.Random(seed))
    routes = make_routes(source, target, machines)
    received = np.zeros((4, len(LINKS)), np.int64)
    sent = np.zeros(4, np.int64)
    for name, rows in routes.transfers.items():
        p = target.parameters[name]
        arrivals = [np.zeros(p.shape, np.int64) for _ in range(4)]
        for start, stop, sender, group in zip(rows.start, rows.stop, rows.sender, rows.group, strict=True):
            box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            at = holders(source, name, tuple(start))
            assert sender in at and sender in holders(source, name, tuple(stop - 1))
            for rank in routes.groups[group]:
                arrivals[rank][box] += 1
                own, near = rank in at, {h for h in at if machines[h] == machines[rank]}
                assert sender == rank if own else (sender in near if near else True)
                size = int(np.prod(stop - start)) * p.item_bytes
                link = 0 if sender == rank else 1 if machines[sender] == machines[rank] else 2
                received[rank, link] += size
                sent[sender] += size if link else 0
        for rank in range(4):
            wanted = np.zeros(p.shape, np.int64)
            for box in p.boxes_of(rank):
                wanted[tuple(slice(*edge) for edge in box)] += 1
            assert (arrivals[rank] == wanted).all()
    assert (received == routes.received).all() and (sent == routes.sent).all()
    assert (routes.moved == lower_bound_bytes(source, target)).all()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), bucket=st.sampled_from([1 << 18, 1 << 20]), most_peers=st.sampled_from([1, 2, 128])
)
def test_both_ends_of_a_stream_agree_and_keep_to_the_budget(seed: int, bucket: int, most_peers: int) -> None:
    routes = make_routes(*random_pair(random.Random(seed)))
    ranks = [rounds_of(routes, rank, bucket, most_peers) for rank in range(4)]
    assert max(rank.buffer_bytes for rank in ranks) <= bucket
    assert len({rank.rounds for rank in ranks}) == 1
    for k in range(ranks[0].rounds):
        messages: dict[tuple[int, int], list[list[object]]] = {}
        for end, part in enumerate(ranks):
            sends = {to: contents(part.sends, k, to=to) for to in range(4)}
            takes = {sender: contents(part.receives, k, sender=sender) for sender in range(4)}
            assert sum(map(bool, sends.values())) <= most_peers and sum(map(bool, takes.values())) <= most_peers
            for peer in range(4):
                messages.setdefault((end, peer), []).append(sends[peer])
                messages.setdefault((peer, end), []).append(takes[peer])
        assert all(sent == taken for sent, taken in messages.values())
    sent = [sum(s.elements * ITEM_BYTES[s.dtype] * len(s.receivers) for s in part.sends) for part in ranks]
    taken = [sum(s.elements * ITEM_BYTES[s.dtype] for s in part.receives) for part in ranks]
    assert sent == routes.sent.tolist() and taken == routes.moved.tolist()


def contents(streams: list[Stream], k: int, to: int | None = None, sender: int | None = None) -> list[object]:
    """What one message of round k holds, in order: its length and its parts."""
    return [
        (stream.room(c), stream.dtype, [(part.at, part.size, part.slice.name) for part in stream.chunks[c]])
        for stream in streams
        if (c := stream.of_round(k)) is not None and (to is None or to in stream.receivers)
        if sender is None or stream.sender == sender
    ]


def test_there_are_as_few_rounds_as_the_budget_allows() -> None:
    source = Layout(2, {"w": ParameterLayout.from_boxes((100, 1000), "float32", [(0, ((0, 100), (0, 1000)))])})
    target = Layout(2, {"w": ParameterLayout.from_boxes((100, 1000), "float32", [(1, ((0, 100), (0, 1000)))])})
    routes = make_routes(source, target)
    [stream] = rounds_of(routes, 0, 80_000).sends
    assert len(stream.chunks) == 10 and all(stream.length(k) == 10_000 for k in range(10))
    [stream] = rounds_of(routes, 0, 90_008).sends
    assert [stream.length(k) for k in range(len(stream.chunks))] == [11_112] * 8 + [11_104]  # even, not 8 and a rest
    with pytest.raises(BucketError, match="at least 8192 for these routes"):
        rounds_of(routes, 0, 8191)


def test_messages_are_large_where_links_are_fast() -> None:
    assert default_bucket_bytes("cuda") == 1 << 30 and default_bucket_bytes("cpu") == 64 << 20


def test_copies_share_the_sending() -> None:
    """Four copies of everything on ranks 0-3, all of it wanted by each of 4-7: a multicast, cut evenly."""
    shape = (1024, 512)
    everyone = ParameterLayout.from_mesh(shape, "bfloat16", np.arange(4), [None])
    wanted = ParameterLayout.from_mesh(shape, "bfloat16", np.arange(4, 8), [None])
    routes = make_routes(Layout(8, {"w": everyone}), Layout(8, {"w": wanted}))
    whole = 1024 * 512 * 2
    assert routes.sent.tolist() == [whole] * 4 + [0] * 4
    assert routes.moved.tolist() == [0] * 4 + [whole] * 4
    assert [routes.groups[g] for g in routes.transfers["w"].group] == [(4, 5, 6, 7)] * 4


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_equal_senders_differ_by_one_piece_at_most(seed: int) -> None:
    rng = random.Random(seed)
    shapes = {f"p{i}": (rng.randint(1, 400), rng.choice([1, 64, 512])) for i in range(rng.randint(1, 12))}
    source = {n: ParameterLayout.from_mesh(s, "float32", np.arange(3), [None]) for n, s in shapes.items()}
    target = {n: ParameterLayout.from_mesh(s, "float32", np.arange(3, 6), [0]) for n, s in shapes.items()}
    routes = make_routes(Layout(6, source), Layout(6, target))
    largest = max(int((rows.volume).max()) * 4 for rows in routes.transfers.values())
    assert routes.sent[:3].max() - routes.sent[:3].min() <= largest
    assert routes.sent.sum() == routes.moved.sum()


def box(rank: int, *edges: tuple[int, int]) -> tuple[int, tuple[tuple[int, int], ...]]:
    return rank, edges


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        ([box(0, (0, 2), (0, 4))], r"w of shape \[4, 4\]: boxes must cover all 16 elements, got 8 in \[\[0:2, 0:4\]\]"),
        (
            [box(0, (0, 3), (0, 4)), box(1, (2, 4), (0, 4))],
            r"equal or disjoint, got \[0:3, 0:4\] on rank 0 and \[2:4, 0:4\] on rank 1",
        ),
        ([box(0, (0, 5), (0, 4))], r"box \[0:5, 0:4\] of rank 0 must lie inside the shape"),
        ([box(0, (0, 4), (0, 4)), box(0, (0, 4), (0, 4))], r"rank 0 must hold box \[0:4, 0:4\] once, got it 2 times"),
        ([box(2, (0, 4), (0, 4))], r"must be on a rank in 0..1, got rank 2"),
    ],
)
def test_wrong_layouts_name_parameter_and_boxes(boxes: list, says: str) -> None:  # type: ignore[type-arg]
    good = Layout(2, {"w": ParameterLayout.from_boxes((4, 4), "float32", [box(0, (0, 4), (0, 4))])})
    bad = Layout(2, {"w": ParameterLayout.from_boxes((4, 4), "float32", boxes)})
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(LayoutError, match=says):
            make_routes(*pair)


def test_differing_names_shapes_and_dtypes_are_named() -> None:
    def one(name: str, shape: tuple[int, ...] = (4, 4), dtype: str = "float32") -> Layout:
        return Layout(2, {name: ParameterLayout.from_mesh(shape, dtype, np.arange(2), [0])})

    with pytest.raises(LayoutError, match="sent but not wanted: a"):
        make_routes(one("a"), one("b"))
    with pytest.raises(
        LayoutError, match=r"a must have one shape and dtype .* \[4, 4\] float32 sent and \[4, 6\] float"
    ):
        make_routes(one("a"), one("a", (4, 6)))
    with pytest.raises(LayoutError, match=r"float32 sent and \[4, 4\] bfloat16 wanted \(boxes \[0:2, 0:4\] and"):
        make_routes(one("a"), one("a", dtype="bfloat16"))
    with pytest.raises(LayoutError, match="dtype must be one of float32, bfloat16.*got int8"):
        make_routes(one("a", dtype="int8"), one("a"))


def test_a_plan_is_made_once() -> None:
    pair = random_pair(random.Random(3))
    assert make_routes(*pair) is make_routes(*random_pair(random.Random(3)))
    assert make_routes(*pair) is not make_routes(*pair, [0, 1, 2, 3])


def full(world: int, sizes: Parallel) -> Routes:
    parameters = llama(*LLAMA_70B)
    node = (np.arange(world) // 8).tolist()
    source = {n: ParameterLayout.from_mesh(c.shape, "bfloat16", np.arange(world), [0]) for n, c in parameters.items()}
    target = parallel_layout(parameters, generation_grid(sizes, "vanilla"), "bfloat16")
    return make_routes(Layout(world, source), target, node)


def test_llama_70b_on_512_ranks_is_planned() -> None:
    """How long that takes is measured by `make bench-reshard`."""
    routes = full(512, Parallel(8, 8, 8, 1, 8))
    part = rounds_of(routes, 100, 1 << 30)
    assert part.buffer_bytes <= 1 << 30
    for k in range(part.rounds):  # no more operations at one time than NCCL is trusted with
        peers = {(s.sender, to) for s in part.sends if s.of_round(k) is not None for to in s.receivers}
        peers |= {(s.sender, 100) for s in part.receives if s.of_round(k) is not None}
        assert len(peers) <= 256
    assert (routes.moved == lower_bound_bytes(routes.source, routes.target)).all()
    parameters = llama(*LLAMA_70B)
    training = parallel_layout(parameters, training_grid(Parallel(8, 8, 8)), "bfloat16")
    routes = make_routes(training, routes.target, routes.node.tolist())
    assert (routes.moved == lower_bound_bytes(training, routes.target)).all()
    assert routes.sent.max() < 1.2 * routes.sent.mean()
    assert sum(c.shape[0] * (c.shape[1] if len(c.shape) > 1 else 1) for c in parameters.values()) == 70_553_706_496
    assert Fraction(int(training.bytes_per_rank()[8]), 2) > 0
