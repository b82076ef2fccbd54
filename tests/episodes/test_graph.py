"""What a recipe's graph knows of episodes, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.row_facts import amounts
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.roles import Actor, Prompts


class Hinted(Environment):
    reads = ("hint",)
    rewards = False

    async def episode(self, chat: Chat, row: Row) -> None:
        await chat.generate()


class WithHint(Prompts):
    fields = {"hint": "text"}


def traced(environment: Any, source: type = Prompts) -> Any:
    def played(prompts: Any, actor: Any) -> None:
        actor.compute_log_prob(actor.run_episodes(prompts, environment=environment, n=3))

    played.__annotations__ = {"prompts": source, "actor": Actor, "return": None}
    return trace(recipe(played))


def test_an_environment_reads_and_writes_what_it_says() -> None:
    node = traced(Hinted(), WithHint)["actor.run_episodes"]
    assert "hint" in node.inputs[0].columns and not {"rewards", "token_rewards"} & set(node.writes)
    assert {"prompt_ids", "response_mask", "turn", "outcome"} <= set(node.writes)
    with pytest.raises(GraphError, match="actor.run_episodes reads column 'hint', which the batch does not have"):
        traced(Hinted())
    with pytest.raises(GraphError, match="run_episodes needs environment=, an Environment, got <class"):
        traced(Hinted)

    class Forgot(Environment):
        def episode(self, chat: Chat, row: Row) -> None: ...  # type: ignore[override]

    with pytest.raises(GraphError, match="Forgot.episode must be written with `async def`"):
        traced(Forgot())


def test_rows_may_be_lost_and_the_log_probs_know_which_tokens_were_drawn() -> None:
    dataflow = traced(Hinted(), WithHint)
    found = amounts(dataflow, {"prompts": 4})["actor.run_episodes"]
    assert (found.rows, found.groups, found.exact) == (12, 4, False)
    assert "turn" in dataflow["actor.compute_log_prob"].inputs[0].columns


def test_limits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="EpisodeLimits.turns must be > 0, got 0"):
        EpisodeLimits(turns=0)
    with pytest.raises(ValueError, match=r"EpisodeLimits.retries must be >= 0 \(0: never again\), got -1"):
        EpisodeLimits(retries=-1)
