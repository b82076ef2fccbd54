"""Several roles in one episode: whose a row is, whose limit an end was, and what a recipe's graph knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_dist.dataflow.facts import drawn_by, nodes_on_own_rows
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.row_facts import amounts
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.roles import Actor, Opponent, Prompts, Reward
from rlhf_dist.sampling import Sampling
from rlhf_dist.transforms import spoken_by
from rlhf_dist.wire import Call
from tests.episodes.conftest import PROMPT_TOKENS, prompts
from workers.engines.generation.transformers import TransformersEngine
from workers.episodes.leaves import Episode
from workers.episodes.rows import episode_columns
from workers.episodes.run import Speaker, run_episodes


class Talk(Environment):
    """Both say a few tokens, each hears the other; the other's reward is the opposite."""

    def __init__(self, turns: int = 2, silent: bool = False) -> None:
        self.turns, self.silent = turns, silent

    async def episode(self, chat: Chat, row: Row) -> None:
        other = chat.speaker("other")
        other.say("you: ")
        for _ in range(self.turns):
            reply = await chat.generate(max_tokens=4)
            other.say(reply.text)
            answer = await other.generate(max_tokens=5)
            chat.reward(1.0)
            if not self.silent:
                other.reward(-1.0)
            chat.say(answer.text)


def play(
    engine: TransformersEngine, model: Path, environment: Environment, learns: bool, tokens: int = 48, **limits: Any
) -> list[Episode]:
    batch, sampling = prompts(["2+2="]), Sampling(n=1, max_tokens=48)
    call = Call(num_rows=1, row_index=np.arange(1), step=3, node="actor.run_episodes", line="", seed=0)
    other = Speaker(
        name="other",
        engine=engine,
        model=str(model),
        sampling=Sampling(max_tokens=tokens),
        prompt_tokens=PROMPT_TOKENS,
        learns=learns,
    )
    limits_of = EpisodeLimits(seconds=300.0, **limits)
    return run_episodes(
        engine, str(model), batch, call, environment, limits_of, sampling, PROMPT_TOKENS, speakers=[other]
    )


def said(columns: Any, row: int) -> Sequence[int]:
    return columns["response_ids"].row(row)[columns["turn"].row(row) < 0].tolist()  # type: ignore[no-any-return]


def drawn(columns: Any, row: int) -> Sequence[int]:
    return columns["response_ids"].row(row)[columns["turn"].row(row) >= 0].tolist()  # type: ignore[no-any-return]


def test_each_side_is_a_row_that_hears_the_other(engine: TransformersEngine, model: Path) -> None:
    mine, theirs = play(engine, model, Talk(), learns=True)
    assert (mine.speaker, theirs.speaker, mine.number, theirs.number) == ("", "other", 0, 0)
    columns = episode_columns([mine, theirs], rewards=True)
    assert columns["rewards"].values.tolist() == [2, -2] and columns["turns"].values.tolist() == [2, 2]
    assert drawn(columns, 0)[4:] and said(columns, 0) == drawn(columns, 1)[:5], (
        "the first heard the second's first turn"
    )
    assert said(columns, 1) == drawn(columns, 0)[4:], "the second's second turn follows the first's second"
    again = episode_columns(play(engine, model, Talk(), learns=False), rewards=True)
    assert (
        again["response_ids"].rows()[0].tolist() == columns["response_ids"].row(0).tolist() and len(again["turns"]) == 1
    )


def test_ends_are_those_of_whose_limit_it_was(engine: TransformersEngine, model: Path) -> None:
    (lost,) = play(engine, model, Talk(turns=9), learns=False, tokens=8)
    assert lost.outcome == "environment_error" and "another speaker has used up its" in lost.detail
    environment = Talk(turns=9)
    environment.unfinished_reward = -5.0
    mine, theirs = play(engine, model, environment, learns=True, tokens=8)
    assert (mine.outcome, theirs.outcome) == ("length", "length")
    assert theirs.total == sum(theirs.chat.rewards.values()) <= -5 and mine.total >= 1, "the price is the other's"
    (forgot,) = play(engine, model, Talk(silent=True), learns=True)
    assert forgot.outcome == "environment_error" and "of 'other', whose rows are kept" in forgot.detail
    (unknown,) = play(engine, model, Talk(), learns=False, turns=1)
    assert unknown.outcome == "turns", "turns limit the policy"


def test_a_branch_goes_on_with_everybody(engine: TransformersEngine, model: Path) -> None:
    class Forks(Environment):
        leaves = 2

        async def episode(self, chat: Chat, row: Row) -> None:
            other = chat.speaker("other")
            other.say(row.prompt)
            chat.say((await other.generate(max_tokens=4)).text)
            await chat.branch(self.on, n=2)

        async def on(self, chat: Chat) -> None:
            reply = await chat.generate(max_tokens=4)
            chat.speaker("other").say(reply.text)
            chat.say((await chat.speaker("other").generate(max_tokens=4)).text)
            await chat.generate(max_tokens=4)
            chat.reward(0.0)

    one, two = play(engine, model, Forks(), learns=False)
    sides = [episode.chat.speaker("other").conversation for episode in (one, two)]
    assert [side.turns for side in sides] == [2, 2] and sides[0] is not sides[1]
    first, second = ([piece.token_ids.tolist() for piece in side.pieces] for side in sides)
    assert first[0] == second[0] and first[1:] != second[1:], "what was before the fork is shared, no more"


def traced(environment: Environment | None = None, **settings: Any) -> Any:
    def game(prompts: Any, actor: Any, opponent: Any, user: Any, reward: Any) -> None:
        roles = {"opponent": opponent, "user": user, "reward": reward, "self": actor}
        speakers = {name: roles[role] for name, role in settings.get("speakers", {"opponent": "opponent"}).items()}
        rows_of = settings.get("rows_of", ("opponent",))
        batch = actor.run_episodes(prompts, environment=environment or Talk(), n=3, speakers=speakers, rows_of=rows_of)
        for name, role in (("actor", actor), ("opponent", opponent)):
            role.compute_log_prob(spoken_by(batch, name=name))
        actor.compute_log_prob(batch)

    kinds = {"prompts": Prompts, "actor": Actor, "opponent": Actor, "user": Opponent, "reward": Reward, "return": None}
    game.__annotations__ = kinds
    return trace(recipe(game))


def test_the_graph_knows_who_drew_what() -> None:
    dataflow = traced()
    assert amounts(dataflow, {"prompts": 4})["actor.run_episodes"].rows == 4 * 3 * 2
    assert set(dataflow["actor.run_episodes"].weights_read) == {"actor.rollout", "opponent.rollout"}
    own, theirs, mixed = (name for name in (node.name for node in dataflow) if "compute_log_prob" in name)
    assert drawn_by(dataflow, dataflow[own]) == {"actor"} and drawn_by(dataflow, dataflow[theirs]) == {"opponent"}
    assert nodes_on_own_rows(dataflow, "actor") >= {own} and mixed not in nodes_on_own_rows(dataflow, "actor")
    assert nodes_on_own_rows(dataflow, "opponent") == {theirs}
    both = traced(speakers={"opponent": "self"})  # one policy plays both sides
    assert drawn_by(both, both["actor.run_episodes"]) == {"actor"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"speakers": {"user": "reward"}, "rows_of": ()}, "got speakers=.* language models of the recipe"),
        ({"speakers": {"actor": "user"}, "rows_of": ()}, "names that the environment uses, 'actor' not among them"),
        ({"rows_of": ("user",)}, "needs rows_of, a tuple of names in speakers, got"),
        ({"rows_of": "opponent"}, "needs rows_of, a tuple of names in speakers, got 'opponent'"),
    ],
    ids=["no language model", "the role's own name", "unknown", "no tuple"],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(GraphError, match=says):
        traced(**settings)


def test_sides_of_branches_are_refused() -> None:
    class Branching(Talk):
        leaves = 2

    with pytest.raises(GraphError, match=r"keeps rows of opponent, and its episodes branch \(leaves=2\)"):
        traced(Branching())
