"""What a recipe's graph knows of episodes, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
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


def test_tensor_parallel_generation_is_refused(tmp_path: Path, model: Path) -> None:
    from rlhf_dist.checks import check_launch
    from rlhf_dist.compose import compose
    from rlhf_dist.typed import ConfigError

    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    settings = [f"model.path={model}", f"data.train.path={tmp_path}/sums.jsonl", "task=none", "data.prompts_per_step=1"]
    (pool,) = compose("tool_grpo", settings).run.placement.pools
    launch = compose("tool_grpo", [*settings, "actor.rollout.tensor_parallel=2", f"placement.pools.{pool}.slots=2"])
    with pytest.raises(ConfigError, match=r"tool_grpo.py:\d+: episodes need actor.rollout.tensor_parallel=1, got 2"):
        check_launch(launch)


def test_the_planner_asks_for_no_generation_that_is_refused() -> None:
    from rlhf_dist.compose import compose
    from rlhf_dist.hardware import parse_cluster
    from rlhf_dist.planner.launch import planned_settings

    settings = ["model.path=llama3-8b", "task=addition", "placement.cluster=1x8xA100-80G"]
    assert parse_cluster("1x8xA100-80G").gpus == 8
    found = planned_settings(compose("tool_grpo", settings), settings)
    assert found["actor"]["rollout"].get("tensor_parallel", 1) == 1
