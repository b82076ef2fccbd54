"""Over-sampling and the step's deadline: which groups a step keeps, what becomes of the others, and what is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.execution.replicas import hand_over
from controller.execution.worker_group import Shards, _kept
from controller.record.metrics import read_metrics
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.row_facts import amounts
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.roles import Actor, Prompts
from tests.episodes.conftest import Play
from workers.engines.generation.transformers import TransformersEngine
from workers.episodes.leaves import Episode
from workers.episodes.rows import episode_metrics, group_metrics

Tool = Callable[[], object]
TEXTS = ("3", "1", "2", "1", "5")
"""Turns of each row's episodes."""


class Turns(Environment):
    """As many turns as the prompt says, each with a tool behind it, which calls what `tools` has for the prompt."""

    def __init__(self, tools: Mapping[str, Tool] | None = None, fails: str = "") -> None:
        self.tools, self.fails = tools or {}, fails

    async def episode(self, chat: Chat, row: Row) -> None:
        for turn in range(int(row.prompt[0])):
            await chat.generate(max_tokens=3)
            await chat.run(self.tools.get(row.prompt, str), seconds=100)
            chat.say("so?")
            if turn == 0 and row.prompt == self.fails:
                raise OSError("no tool")
        chat.reward(1.0)


@pytest.fixture
def forever() -> Iterator[Tool]:
    """A tool that does not answer as long as the test runs."""
    over = threading.Event()
    yield over.wait
    over.set()


def kept(episodes: list[Episode], n: int = 2) -> list[int]:
    return sorted({episode.number // n for episode in episodes if episode.trains})


def drawn(episodes: list[Episode]) -> dict[int, list[int]]:
    return {
        one.number: [int(token) for piece in one.chat.conversation.pieces for token in piece.token_ids]
        for one in episodes
        if one.trains
    }


def test_the_groups_with_fewest_turns_are_kept_whatever_tools_take(play_all: Play, engine: TransformersEngine) -> None:
    def slow() -> None:
        time.sleep(0.2)

    whole = drawn(play_all(Turns(), texts=TEXTS, n=2))
    ways: list[tuple[dict[str, Tool], int]] = [({"1": slow}, 256), ({}, 1)]
    for tools, concurrent in ways:
        episodes = play_all(Turns(tools), EpisodeLimits(concurrent=concurrent), texts=TEXTS, n=2, wanted=3)
        assert kept(episodes) == [1, 2, 3], "of equal turns the first rows"
        assert drawn(episodes) == {number: whole[number] for number in drawn(episodes)}
        assert not engine._in_flight
    assert {one.outcome for one in episodes if not one.trains} == {"surplus"}
    metrics = {name: one.value for name, one in episode_metrics(episodes).items()}
    assert (metrics["episodes"], metrics["outcome_surplus"], metrics["lost"]) == (10, 4, 0)
    counted = {name: one.value for name, one in group_metrics(episodes, wanted=3, n=2).items()}
    assert (counted["groups"], counted["groups_incomplete"], counted["groups_missing"]) == (3, 0, 0)


def test_an_episode_that_falls_behind_is_ended_in_the_middle_of_it(play_all: Play, forever: Tool) -> None:
    *_, late = episodes = play_all(Turns({"5": forever}), texts=("1", "1", "5"), n=1, wanted=2)
    assert (late.outcome, late.chat.turns) == ("surplus", 1)
    assert late.detail == "its row is not among the first 2 of this rank (groups=)"
    assert group_metrics(episodes, wanted=2, n=1)["surplus_tokens"].value == 3


def test_by_turns_a_slow_tool_is_waited_for_and_by_time_it_is_not(play_all: Play, forever: Tool) -> None:
    others = threading.Semaphore(0)

    def after_the_others() -> None:
        for _ in range(4):
            assert others.acquire(timeout=90)

    rows: dict[str, Any] = {"texts": ("1", "2", "2"), "n": 1, "wanted": 2}
    assert kept(play_all(Turns({"1": after_the_others, "2": others.release}), **rows), n=1) == [0, 1]
    assert kept(play_all(Turns({"1": forever}), first="time", **rows), n=1) == [1, 2]


def test_a_group_that_lost_a_member_comes_behind_those_that_are_complete(play_all: Play) -> None:
    episodes = play_all(Turns(fails="1"), texts=("1", "2", "3"), n=1, wanted=2)
    assert kept(episodes, n=1) == [1, 2]
    assert episodes[0].outcome == "environment_error", "what went wrong in a group stays to be seen"
    episodes = play_all(Turns(fails="1"), texts=("1", "2", "3"), n=1, wanted=3)
    counted = {name: one.value for name, one in group_metrics(episodes, wanted=3, n=1).items()}
    assert kept(episodes, n=1) == [1, 2] and counted["groups_missing"] == 1


def test_a_deadline_of_the_step_ends_what_runs_and_what_has_not_begun(play_all: Play, forever: Tool) -> None:
    limits = EpisodeLimits(step_seconds=0.5, concurrent=1)
    episodes = play_all(Turns({"2": forever}), limits, texts=("2", "1"), n=1)
    assert [one.outcome for one in episodes] == ["step_deadline"] * 2 and episodes[1].chat.turns == 0
    assert "0.5 s (EpisodeLimits.step_seconds)" in episodes[0].detail
    metrics = {name: one.value for name, one in episode_metrics(episodes).items()}
    assert (metrics["lost"], metrics["outcome_step_deadline"]) == (2, 2)


def test_ranks_share_what_is_kept_evenly_and_together_have_all_of_it() -> None:
    for rows, groups, ranks in ((160, 128, 8), (5, 3, 2), (3, 3, 2), (7, 1, 4), (0, 4, 2), (4, 9, 2)):
        parts = tuple(np.random.default_rng(0).permutation(rows)[k::ranks] for k in range(ranks))
        each = tuple(range(ranks))
        shards = Shards(parts=parts, answering=each, part_of_answer=each, kept=_kept(parts, groups))
        shares = [shards.wanted(part) for part in each]
        assert sum(share or 0 for share in shares) == min(rows, groups)
        fair = [len(part) * groups / max(rows, groups) for part in parts]
        assert all(abs((share or 0) - wanted) <= 1 for share, wanted in zip(shares, fair, strict=True))
    assert Shards(parts=parts, answering=each, part_of_answer=each).wanted(0) is None


def test_what_is_kept_stays_as_much_when_others_take_the_rows_of_a_rank_that_died() -> None:
    parts = tuple(np.arange(24)[k::3] for k in range(3))
    shards = Shards(parts=parts, answering=(0, 1, 2), part_of_answer=(0, 1, 2), kept=_kept(parts, 17))
    after, pieces = hand_over(shards, [0, 1, 2], [1], [(0,), (2,)], np.ones(24, np.int64))
    assert len(pieces) == 2 and sum(after.wanted(part) or 0 for part in range(len(after.parts))) == 17


def traced(**settings: Any) -> Any:
    def played(prompts: Any, actor: Any) -> None:
        actor.compute_log_prob(actor.run_episodes(prompts, environment=Turns(), n=3, **settings))

    played.__annotations__ = {"prompts": Prompts, "actor": Actor, "return": None}
    return trace(recipe(played))


def test_what_is_kept_is_known_before_a_run_and_what_cannot_be_is_refused() -> None:
    found = amounts(traced(groups=3), {"prompts": 4})["actor.compute_log_prob"]
    assert (found.rows, found.groups, found.exact) == (9, 3, False)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"groups": 0}, "needs groups >= 1, of which it keeps the first, or None for all, got 0"),
        ({"groups": 1.5}, "got 1.5"),
        ({"first": "luck"}, "says what is first= by 'turns' or by 'time', got 'luck'"),
    ]
    for settings, says in refused:
        with pytest.raises(GraphError) as error:
            traced(**settings)
        assert says in str(error.value)
    with pytest.raises(ValueError, match="EpisodeLimits.step_seconds must be > 0, or None for no deadline, got 0"):
        EpisodeLimits(step_seconds=0)


RECIPE = '''
"""GRPO on the first groups of episodes with 1 to 4 turns."""

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Environment, EpisodeLimits
from rlhf_dist.roles import Actor, Prompts
from rlhf_dist.transforms import grpo_advantage


class Turns(Environment):
    async def episode(self, chat, row):
        for turn in range(int(row.answer)):
            reply = await chat.generate(max_tokens=3)
            chat.say("so?")
        chat.reward(float(len(reply.text)))


@recipe
def first_groups(prompts: Prompts, actor: Actor) -> None:
    limits = EpisodeLimits(step_seconds=STEP)
    batch = actor.run_episodes(prompts, environment=Turns(), n=2, limits=limits, groups=GROUPS)
    actor.update_actor(grpo_advantage(batch), loss=ppo_clip(0.2, on_policy=True))
'''


def test_a_run_keeps_as_many_groups_as_it_says(model: Path, tmp_path: Path) -> None:
    from controller.lifecycle.api import launch
    from rlhf_dist.typed import ConfigError

    def settings(groups: int, step: str = "None") -> list[str]:
        file = tmp_path / f"first_groups_{groups}.py"
        file.write_text(RECIPE.replace("GROUPS", str(groups)).replace("STEP", step))
        given = [f"model.path={model}", "model.dtype=float32", "task=none", f"data.train.path={tmp_path}/few.jsonl"]
        given += ["data.prompts_per_step=4", "steps=1", f"output.root={tmp_path}", "output.rollouts_every=0"]
        return [str(file), *given, "actor.rollout.engine=transformers", "actor.rollout.max_response_tokens=48"]

    rows = [{"prompt": f"{turns}+0=", "answer": str(turns)} for turns in (4, 2, 1, 3)]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for given, says in (
        (
            settings(5),
            "keeps the first groups=5 of those it begins, and there are at most 4; raise data.prompts_per_step",
        ),
        (settings(2, "1800.0"), "EpisodeLimits.step_seconds=1800, which must be less than ray.call_timeout_s = 1800"),
    ):
        with pytest.raises(ConfigError) as error:
            launch(*given, local=True, quiet=True)
        assert says in str(error.value) and "\n" not in str(error.value)
    launch(*settings(2), "name=kept", local=True, quiet=True)
    (step,) = read_metrics(tmp_path / "kept")
    assert (step["actor/groups"], step["actor/rows"], step["actor/outcome_surplus"], step["actor/lost"]) == (2, 4, 4, 0)
    assert step["actor/turns"] == 1.5, "the groups with one turn and with two"
