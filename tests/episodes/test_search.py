"""Search over steps in branches: what is kept, what is backed up, and what becomes of it in rows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from rlhf_dist.batch import Batch, Column
from rlhf_dist.environments import Chat, Environment, PolicyError, Row
from rlhf_dist.environments.search import Node, Step, beam_search, self_judged, tree_search
from rlhf_dist.transforms import tree_nodes, tree_pairs
from tests.episodes.conftest import Play
from workers.episodes.leaves import Episode
from workers.episodes.rows import episode_columns


class Searched(Environment):
    """An environment that keeps the nodes of its search, for the test to look at."""

    def __init__(self, search: Callable[[Chat], Awaitable[None]], leaves: int) -> None:
        self.search, self.leaves = search, leaves

    async def episode(self, chat: Chat, row: Row) -> None:
        await self.search(chat)


async def step(branch: Chat) -> Step:
    """Three tokens, worth the mean of their characters' codes; done where one is a 7."""
    reply = await branch.generate(max_tokens=3)
    return Step(value=float(np.mean([ord(one) for one in reply.text or " "])), done="7" in reply.text)


def test_a_beam_keeps_the_best_and_discards_what_leads_to_none_of_them(play_all: Play) -> None:
    found: list[Node] = []

    async def search(chat: Chat) -> None:
        found.extend(await beam_search(chat, step, width=2, expand=3, depth=2))

    episodes = play_all(Searched(search, leaves=2), texts=("2+2=",))
    assert len(episodes) == 2 and all(episode.trains for episode in episodes)
    assert sorted(episode.total for episode in episodes) == pytest.approx(sorted(_worth(node) for node in found))
    assert episodes[0].discarded in (5, 6), "of 9 steps 2 are the best, and 1 or 2 lead to them"
    whole: list[Node] = []

    async def unpruned(chat: Chat) -> None:
        whole.extend(await beam_search(chat, step, width=2, expand=3, depth=2, prune=False))

    every = play_all(Searched(unpruned, leaves=9), texts=("2+2=",))
    assert [node.step for node in whole] == [node.step for node in found] and whole[0].step == max(
        (node.step for node in whole),
        key=lambda one: one.value,  # type: ignore[union-attr]
    )
    assert len(every) == 7 and every[0].discarded == 0, "one first step is no parent, two have three children each"


def test_a_tree_search_backs_values_up_and_its_rows_know_them(play_all: Play) -> None:
    starts: list[Node] = []

    async def search(chat: Chat) -> None:
        starts.append(await tree_search(chat, step, simulations=4, expand=2, depth=3, explore=20.0))

    episodes = play_all(Searched(search, leaves=16), texts=("2+2=",))
    (start,) = starts
    seen = [node for node in _all(start) if node is not start]
    assert start.visits == len(seen) and start.total == pytest.approx(sum(node.step.value for node in seen))  # type: ignore[union-attr]
    for node in seen:
        below = _all(node)
        assert node.visits >= len(below) and node.mean <= max(one.step.value for one in below) + 1e-9  # type: ignore[union-attr]
    batch = _batch(episodes)
    leaves = [node.step.value for node in seen if not node.children]  # type: ignore[union-attr]
    np.testing.assert_allclose(sorted(batch["rewards"].values), sorted(leaves), rtol=1e-6)
    nodes, pairs = tree_nodes(batch).columns, tree_pairs(batch).columns
    assert nodes.num_rows == len(seen)
    parents = [node for node in _all(start) if node.children]
    assert pairs.num_rows == 2 * sum(_worth(node.children[0]) != _worth(node.children[1]) for node in parents)


def test_a_step_that_ends_otherwise_is_not_gone_on_from(play_all: Play) -> None:
    async def fails_once(branch: Chat) -> Step:
        found = await step(branch)
        if branch.rng.random() < 0.4:
            raise PolicyError("no step")
        return found

    for search in (
        lambda chat: beam_search(chat, fails_once, width=2, expand=4, depth=2, prune=False),
        lambda chat: tree_search(chat, fails_once, simulations=3, expand=4, depth=2),
    ):
        episodes = play_all(Searched(search, leaves=16), texts=("2+2=",))  # type: ignore[arg-type]
        outcomes = {episode.outcome for episode in episodes}
        assert outcomes == {"finished", "policy_error"} and all(one.trains for one in episodes)
        assert all(one.unrewarded == (one.outcome == "policy_error") for one in episodes)


def test_the_model_may_judge_itself_without_leaving_a_row(play_all: Play) -> None:
    said: list[float] = []

    async def judged(branch: Chat) -> Step:
        await branch.generate(max_tokens=3)
        said.append(await self_judged(branch, " good, 0 to 9? ", max_tokens=3, default=-1.0))
        return Step(value=said[-1])

    async def search(chat: Chat) -> None:
        await beam_search(chat, judged, width=1, expand=4, depth=1, prune=False)

    episodes = play_all(Searched(search, leaves=4), texts=("2+2=",))
    assert sorted(episode.total for episode in episodes) == sorted(said)
    assert episodes[0].discarded == 4 and all(episode.chat.turns == 1 for episode in episodes)


def _all(node: Node) -> list[Node]:
    return [node, *(below for child in node.children for below in _all(child))]


def _worth(node: Node) -> float:
    """Mean of its leaves."""
    leaves = [one.step.value for one in _all(node) if not one.children and one.step is not None]
    return float(np.float64(sum(np.float32(leaf) for leaf in leaves)) / len(leaves))


def _batch(episodes: list[Episode]) -> Batch:
    columns = episode_columns(episodes, rewards=True, trees=[1] * len(episodes))
    return Batch({**columns, "group_id": Column(np.zeros(len(episodes), np.int64))})
