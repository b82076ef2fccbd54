"""Episodes that branch: leaves share what came before, draw the same whatever runs beside them, and end each for
itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.row_facts import amounts
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, PolicyError, Row
from rlhf_dist.roles import Actor, Prompts
from tests.episodes.conftest import RESPONSE_TOKENS, Play
from tests.episodes.test_episodes import _log_probs
from workers.engines.generation.transformers import TransformersEngine
from workers.episodes.leaves import Episode
from workers.episodes.rows import episode_columns, episode_metrics, transcript

Body = Callable[[Chat], Awaitable[Any]]


class Of(Environment):
    """An environment of one function."""

    def __init__(self, body: Body, leaves: int = 8) -> None:
        self.body, self.leaves = body, leaves

    async def episode(self, chat: Chat, row: Row) -> None:
        await self.body(chat)


async def turn(chat: Chat) -> int:
    """A turn with its length as its reward, behind something that is said where it is not the first."""
    if len(chat.messages) > 1:
        chat.say(" so:")
    reply = await chat.generate(max_tokens=4)
    chat.reward(float(len(reply.text)))
    return reply.tokens


async def two_levels(chat: Chat) -> None:
    """A trunk and three branches; the first parts in two, and the trunk goes on, too."""
    await turn(chat)

    async def branch(one: Chat) -> None:
        await turn(one)

    first, *_ = await chat.branch(branch, n=3)
    await first.chat.branch(branch, n=2)
    await turn(chat)


def tokens(episodes: list[Episode]) -> dict[tuple[int, str], list[int]]:
    ids = episode_columns(episodes, rewards=True)["response_ids"]
    return {(one.number, one.branch): ids.row(at).tolist() for at, one in enumerate(episodes)}


def test_leaves_share_what_came_before_and_are_drawn_behind_exactly_that(
    play_all: Play, engine: TransformersEngine
) -> None:
    episodes = play_all(Of(two_levels), texts=("2+2=",))
    columns = episode_columns(episodes, rewards=True, trees=[5] * len(episodes))
    assert columns["branch"].rows() == ["", "0/0", "0/1", "1", "2"] and columns["leaf"].values.all()
    segments = [np.unique(columns["segment"].row(row)).tolist() for row in range(5)]
    assert segments == [[0, 1], [0, 2, 3], [0, 2, 4], [0, 5], [0, 6]]
    found: dict[int, list[int]] = {}
    for row in range(5):
        ids, of = columns["response_ids"].row(row), columns["segment"].row(row)
        for segment in np.unique(of):
            assert found.setdefault(segment, ids[of == segment].tolist()) == ids[of == segment].tolist()
        whole = np.concatenate([columns["prompt_ids"].row(row), ids])
        drawn = columns["response_mask"].row(row) == 1
        wanted = _log_probs(engine, whole)[-len(ids) :]
        assert np.abs(wanted - columns["rollout_log_probs"].row(row))[drawn].max() < 1e-4
    assert len({tuple(ids) for ids in found.values()}) == 7, "each branch has draws of its own"
    assert columns["turns"].values.tolist() == [2, 3, 3, 2, 2]
    inherited = columns["token_rewards"].row(1)[:4].sum()
    assert inherited == columns["token_rewards"].row(0)[:4].sum() > 0 and columns["rewards"].row(1) > inherited


def test_what_a_branch_draws_depends_on_its_path_alone(play_all: Play) -> None:
    async def slow(chat: Chat) -> None:
        await chat.run(time.sleep, 0.02 * float(np.random.default_rng().random()))
        await turn(chat)

    async def later(chat: Chat) -> None:
        await turn(chat)
        await chat.branch(slow, n=3)

    async def one_by_one(chat: Chat) -> None:
        await turn(chat)
        for _ in range(3):
            await chat.branch(turn, n=1)

    together = tokens(play_all(Of(later), n=2))
    assert tokens(play_all(Of(one_by_one), EpisodeLimits(concurrent=1), n=2)) == together
    assert len({tuple(ids) for ids in together.values()}) == 12
    assert {key: ids for key, ids in together.items() if key[0] >= 2} == {
        (number + 2, branch): ids for (number, branch), ids in tokens(play_all(Of(later), n=2, rows=(1,))).items()
    }


def test_each_branch_has_an_outcome_of_its_own(play_all: Play) -> None:
    ends: list[Any] = []

    async def go_on(chat: Chat) -> str:
        await chat.generate(max_tokens=4)
        chat.reward(1.0)
        which = len(ends)
        ends.append(None)
        if which == 0:
            raise KeyError("no tool")
        if which == 1:
            raise PolicyError("no move")
        if which == 2:
            while True:
                await chat.generate()
        if which == 3:
            chat.end()
        return "fine"

    async def waits(chat: Chat) -> None:
        await asyncio.sleep(30)

    async def parts(chat: Chat) -> None:
        await turn(chat)
        ends.clear()
        found = await chat.branch(go_on, n=5)
        assert {one.returned for one in found} == {None, "fine"}
        (late,) = await chat.branch(waits, n=1, seconds=0.1)
        assert (late.outcome, late.detail) == ("deadline", "not over within 0.1 s (seconds of chat.branch())")

    episodes = play_all(Of(parts), EpisodeLimits(turns=64), texts=("2+2=",))
    outcomes = sorted(episode.outcome for episode in episodes)
    assert outcomes == ["deadline", "environment_error", "finished", "finished", "length", "policy_error"]
    assert all(episode.trains == (episode.outcome not in ("deadline", "environment_error")) for episode in episodes)
    assert next(one.traceback for one in episodes if one.outcome == "environment_error").endswith("'no tool'\n")
    metrics = {name: metric.value for name, metric in episode_metrics(episodes).items()}
    assert (metrics["episodes"], metrics["lost"], metrics["outcome_length"]) == (1, 2, 1)


def test_infrastructure_of_a_branch_is_tried_again_from_where_it_began(play_all: Play) -> None:
    tries: list[str] = []

    async def flaky(chat: Chat) -> None:
        reply = await chat.generate(max_tokens=6)
        tries.append(reply.text)
        if len(tries) < 3:
            raise ConnectionResetError("the sandbox is gone")
        chat.reward(1.0)

    async def parts(chat: Chat) -> None:
        await turn(chat)
        (branch,) = await chat.branch(flaky, n=1)
        assert branch.outcome == "finished"

    (episode,) = play_all(Of(parts), texts=("2+2=",))
    assert (episode.outcome, episode.attempts, len(tries), len(set(tries))) == ("finished", 1, 3, 1)
    assert episode.chat.turns == 2


def test_a_leaf_may_be_rewarded_until_the_episode_is_over_and_discarded(play_all: Play) -> None:
    async def compares(chat: Chat) -> None:
        branches = await chat.branch(lambda one: one.generate(max_tokens=4), n=3)
        best, second, worst = sorted(branches, key=lambda one: one.returned.text)  # type: ignore[union-attr]
        best.chat.reward(1.0)
        second.chat.reward(0.0)
        worst.chat.discard()

    episodes = play_all(Of(compares), texts=("2+2=",))
    assert [episode.total for episode in episodes] in ([0.0, 1.0], [1.0, 0.0])
    assert episode_metrics(episodes)["discarded_branches"].value == 1
    for episode in episodes:
        with pytest.raises(BaseException, match="finished"):
            episode.chat.reward(1.0)


def test_a_branch_whose_branches_are_discarded_is_a_leaf_again(play_all: Play) -> None:
    async def judges(chat: Chat) -> None:
        await turn(chat)
        for branch in await chat.branch(turn, n=2):
            (verdict,) = await branch.chat.branch(turn, n=1)
            verdict.chat.discard()

    episodes = play_all(Of(judges), texts=("2+2=",))
    assert [(episode.branch, episode.outcome) for episode in episodes] == [("0", "finished"), ("1", "finished")]


def test_a_closed_context_is_a_row_with_what_came_of_it(play_all: Play, engine: TransformersEngine) -> None:
    async def compacts(chat: Chat) -> None:
        await turn(chat)  # its reward is the number of its characters
        chat.compact()
        chat.say("so far: 4. ")
        await chat.generate(max_tokens=3)
        chat.reward(10.0)

        async def answer(one: Chat) -> None:
            await one.generate(max_tokens=3)
            one.reward(20.0 if one.rng.random() < 0.5 else 40.0)

        await chat.branch(answer, n=3)
        chat.compact()  # what is drawn after it is none of the branches'
        await chat.generate(max_tokens=2)

    episodes = play_all(Of(compacts), texts=("2+2=",))
    columns = episode_columns(episodes, rewards=True, trees=[1] * 6)
    assert columns["branch"].rows() == ["", ".1", ".2", "0.1", "1.1", "2.1"]
    assert columns["leaf"].values.tolist() == [0, 0, 1, 1, 1, 1]
    rewards, first = columns["rewards"].values, float(len(transcript(episodes[0])[1]["text"]))
    assert rewards[2] == first + 10 and set(rewards[3:]) <= {first + 30, first + 50}
    assert rewards[0] == rewards[1] == pytest.approx(rewards[2:].mean()), "the mean of the leaves after it"
    sums = [columns["token_rewards"].row(row).sum() for row in range(6)]
    assert sums[0] == pytest.approx(rewards[0]) and sums[1:3] == [pytest.approx(rewards[1] - first), 0]
    assert sums[3:] == [pytest.approx(reward - first) for reward in rewards[3:]]
    assert [columns["turn"].row(row)[0] for row in range(6)] == [0, 1, 2, 1, 1, 1]
    prompts = [episode.chat.conversation.tokenizer.decode(episode.chat.conversation.prompt) for episode in episodes]
    assert prompts[0] == prompts[2] == "<bos>2+2=" and prompts[1] == prompts[3] == "so far: 4. "
    for row in range(6):
        ids = columns["response_ids"].row(row)
        wanted = _log_probs(engine, np.concatenate([columns["prompt_ids"].row(row), ids]))[-len(ids) :]
        assert np.abs(wanted - columns["rollout_log_probs"].row(row)).max() < 1e-4


def test_a_context_that_nothing_came_after_was_the_last(play_all: Play) -> None:
    async def compacts(chat: Chat) -> None:
        await turn(chat)
        chat.compact()

    (episode,) = play_all(Of(compacts), texts=("2+2=",))
    assert (episode.outcome, episode.leaf, episode.branch, episode.chat.turns) == ("finished", True, "", 1)


async def too_many(chat: Chat) -> None:
    await turn(chat)
    await chat.branch(turn, n=5)


async def discards_all(chat: Chat) -> None:
    for branch in await chat.branch(turn, n=2):
        branch.chat.discard()


async def fails_after(chat: Chat) -> None:
    await chat.branch(turn, n=2)
    raise OSError("no judge")


async def draws_nothing(chat: Chat) -> None:
    async def nothing(one: Chat) -> None:
        pass

    await turn(chat)
    await chat.branch(nothing, n=1)


async def goes_on_behind_an_end(chat: Chat) -> None:
    async def to_the_end(one: Chat) -> None:
        while True:
            await one.generate()

    (branch,) = await chat.branch(to_the_end, n=1)
    await branch.chat.branch(turn)


async def does_not_wait(chat: Chat) -> None:
    await turn(chat)
    _ = asyncio.ensure_future(chat.branch(turn, n=1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def discards_itself(chat: Chat) -> None:
    await turn(chat)
    chat.discard()


@pytest.mark.parametrize(
    ("body", "rows", "says"),
    [
        (too_many, 1, "the episode has 5 rows, and Of.leaves says at most 4; set it"),
        (discards_all, 1, "no leaf is left: every branch of the episode was discarded"),
        (fails_after, 2, "what it branched from ended: OSError: no judge"),
        (draws_nothing, 1, "the branch ended before chat.generate() had drawn anything"),
        (goes_on_behind_an_end, 1, "what it branched from ended: ValueError: a branch that has finished may be"),
        (does_not_wait, 1, "still going on when its episode was over"),
        (discards_itself, 1, "ValueError: chat.discard() is for branches"),
    ],
)
def test_what_goes_wrong_with_branches_is_lost_and_said(play_all: Play, body: Body, rows: int, says: str) -> None:
    episodes = play_all(Of(body, leaves=4), texts=("2+2=",), seed=1)
    assert len(episodes) == rows and all(episode.outcome == "environment_error" for episode in episodes)
    assert all(says in episode.detail and not episode.trains for episode in episodes), episodes[0].detail


def test_a_tree_that_is_late_is_lost_as_a_whole(play_all: Play) -> None:
    async def late(chat: Chat) -> None:
        async def waits(one: Chat) -> None:
            await turn(one)
            await asyncio.sleep(30)

        await chat.branch(turn, n=2)
        await chat.branch(waits, n=1)

    episodes = play_all(Of(late), EpisodeLimits(seconds=1.5), texts=("2+2=",))
    assert [episode.outcome for episode in episodes] == ["deadline"] * 3


def test_branches_are_bounded_and_have_to_be_announced(play_all: Play) -> None:
    (one,) = play_all(Of(too_many, leaves=1), texts=("2+2=",))
    assert "chat.branch() makes several rows of an episode; set Of.leaves" in one.detail
    (one,) = play_all(Of(too_many), EpisodeLimits(branches=4), texts=("2+2=",))
    assert "at most 4 branches (EpisodeLimits.branches), this would be 5" in one.detail
    with pytest.raises(ValueError, match="EpisodeLimits.branches must be > 0"):
        EpisodeLimits(branches=0)


def test_a_recipe_knows_how_many_rows_there_may_be() -> None:
    def played(prompts: Any, actor: Any) -> None:
        actor.compute_log_prob(actor.run_episodes(prompts, environment=Of(two_levels, leaves=5), n=3))

    played.__annotations__ = {"prompts": Prompts, "actor": Actor, "return": None}
    dataflow = trace(recipe(played))
    found = amounts(dataflow, {"prompts": 4})["actor.run_episodes"]
    assert (found.rows, found.groups, found.exact) == (60, 4, False)
    assert {"tree", "branch", "leaf", "segment"} <= set(dataflow["actor.run_episodes"].writes)
    assert RESPONSE_TOKENS > 12, "paths of three turns fit"


def test_a_reward_that_no_row_would_have_is_refused(play_all: Play) -> None:
    async def late(chat: Chat) -> None:
        await turn(chat)
        (branch,) = await chat.branch(turn, n=1)
        branch.chat.reward(1.0)
        chat.reward(2.0)

    (episode, *_) = play_all(Of(late), texts=("2+2=",))
    assert episode.outcome == "environment_error" and "got 2, which would be lost; reward before" in episode.detail

    async def thrown_away(chat: Chat) -> None:
        await turn(chat)
        (branch,) = await chat.branch(turn, n=1)
        branch.chat.discard()
        chat.reward(2.0)

    (episode,) = play_all(Of(thrown_away), texts=("2+2=",))
    assert episode.outcome == "finished" and episode.total >= 2


def test_a_branch_that_is_tried_again_begins_where_it_began(play_all: Play) -> None:
    seen: list[int] = []

    async def parts(chat: Chat) -> None:
        await turn(chat)
        gone_on = asyncio.Event()

        async def fails_once(branch: Chat) -> None:
            seen.append(len(branch.messages))
            if len(seen) == 1:
                await gone_on.wait()
                raise ConnectionError("once")
            await turn(branch)

        branches = asyncio.ensure_future(chat.branch(fails_once, n=1))
        await asyncio.sleep(0)
        await turn(chat)
        gone_on.set()
        await branches

    episodes = play_all(Of(parts), texts=("2+2=",))
    assert seen == [2, 2] and [one.outcome for one in episodes] == ["finished"] * 2
    columns = episode_columns(episodes, rewards=True, trees=[5, 5])
    assert [np.unique(columns["segment"].row(row)).tolist() for row in range(2)] == [[0, 1], [0, 2]]
