"""Rows of a replica that died go to the others, each once, and every call has a reply in the end."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.cluster.pool import Pool
from controller.execution.replicas import hand_over, living
from controller.execution.worker_group import Shards


def shards_of(rows: int, copies: int, team: int) -> tuple[Shards, list[int]]:
    """As a node that generates is cut, and the part that each of its calls has."""
    parts = tuple(np.array_split(np.arange(rows), copies))
    made = Shards(parts=parts, answering=tuple(range(0, copies * team, team)), part_of_answer=tuple(range(copies)))
    return made, [call // team for call in range(copies * team)]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(2, 5), st.integers(1, 2), st.integers(0, 40))
def test_however_many_die_one_after_the_other_each_row_has_one_call_of_a_living_replica(
    data: st.DataObject, copies: int, team: int, rows: int
) -> None:
    shards, part_of_call = shards_of(rows, copies, team)
    pool = Pool("gen", tuple(range(copies * team)), team=team)
    rank_of_call = list(range(copies * team))
    tokens, dead = np.arange(rows) + 1, set[int]()
    for first in data.draw(st.lists(st.sampled_from(range(copies)), max_size=copies - 1, unique=True)):
        dead |= set(range(first * team, (first + 1) * team))
        lost = [call for call, rank in enumerate(rank_of_call) if rank in dead]
        shards, pieces = hand_over(shards, part_of_call, lost, living(pool, dead), tokens)
        for piece in pieces:
            for call, rank in zip(piece.calls, piece.ranks, strict=True):
                if call == len(rank_of_call):
                    rank_of_call.append(rank)
                    part_of_call.append(piece.part)
                assert part_of_call[call] == piece.part
                rank_of_call[call] = rank
    assert not set(rank_of_call) & dead
    assert sorted(np.concatenate(shards.parts).tolist()) == list(range(rows))
    answered = [part_of_call[call] for call in shards.answering]
    assert answered == list(shards.part_of_answer) and sorted(answered) == list(range(len(shards.parts)))
    for part in range(len(shards.parts)):
        ranks = [rank for call, rank in enumerate(rank_of_call) if part_of_call[call] == part]
        assert ranks == list(range(ranks[0], ranks[0] + team)), "one replica has it, each of its ranks once"


def test_the_rows_of_a_dead_replica_are_spread_by_their_tokens() -> None:
    shards, part_of_call = shards_of(8, 4, 1)
    tokens = np.array([9, 1, 1, 1, 1, 1, 1, 1])
    after, pieces = hand_over(shards, part_of_call, [0], [(1,), (2,), (3,)], tokens)
    assert [piece.ranks for piece in pieces] == [(1,), (2,)], "it had two rows"
    assert [after.parts[piece.part].tolist() for piece in pieces] == [[0], [1]]
