"""What tracing records: an edge per column, siblings, renames, joins, loop-carried weights, the reshard node."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from rlhf_dist.batch import Batch
from rlhf_dist.dataflow import Dataflow, GraphError, host_op
from rlhf_dist.dataflow.recipe import Recipe, recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.roles import Actor, Critic, Examples, Prompts, Reference, Reward, State, state_op


@dataclass(frozen=True)
class Reads:
    """A loss as the tracer sees it: what it reads."""

    reads: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    average: str = "tokens"

    def __call__(self, model: Any, rows: Any) -> Any:
        raise AssertionError


@host_op(reads=("rewards", "values"), writes=("advantages", "returns"), scope="groups")
def estimate(batch: Batch, *, gamma: float = 1.0) -> Batch:
    """An advantage."""
    raise AssertionError("tracing must not run a host op")


@host_op(reads=("rewards",), rows="drop")
def keep_some(batch: Batch) -> Batch:
    """A filter."""
    raise AssertionError("tracing must not run a host op")


@recipe
def ppo(prompts: Prompts, actor: Actor, critic: Critic, reference: Reference, reward: Reward) -> None:
    batch = actor.generate_sequences(prompts)
    batch = critic.compute_values(batch)
    batch = reference.compute_ref_log_prob(batch)
    batch = reward.compute_reward(batch)
    batch = estimate(batch, gamma=0.9)
    critic.update_critic(batch, loss=Reads(("returns",)))
    actor.update_actor(batch, loss=Reads(("advantages", "rollout_log_probs")))


def columns(dataflow: Dataflow, target: str) -> dict[str, str]:
    """Column -> the node `target` gets it from."""
    return {edge.column: edge.source for edge in dataflow.edges if edge.target == target and edge.column}


def weights(dataflow: Dataflow) -> set[tuple[str, str, str, int]]:
    """Weight edges that carry weights (write, then read) as (source, target, state, distance)."""
    return {
        (edge.source, edge.target, edge.weights, edge.distance)
        for edge in dataflow.edges
        if edge.weights and edge.reason == "write-then-read"
    }


def failure(function: Any) -> str:
    with pytest.raises(GraphError) as caught:
        trace(recipe(function))
    return str(caught.value)


def test_values_reference_and_reward_depend_on_generation_alone() -> None:
    dataflow = trace(ppo)
    for name in ("critic.compute_values", "reference.compute_ref_log_prob", "reward.compute_reward"):
        assert dataflow.predecessors(name) == {"actor.generate_sequences"}


def test_every_column_has_the_edge_of_the_node_that_wrote_it() -> None:
    dataflow = trace(ppo)
    assert columns(dataflow, "estimate") == {"rewards": "reward.compute_reward", "values": "critic.compute_values"}
    assert columns(dataflow, "actor.update_actor")["advantages"] == "estimate"
    assert columns(dataflow, "actor.update_actor")["rollout_log_probs"] == "actor.generate_sequences"
    assert "values" not in columns(dataflow, "actor.update_actor")


def test_the_reshard_node_closes_the_loop_of_the_policy() -> None:
    dataflow = trace(ppo)
    names = [node.name for node in dataflow]
    assert names.index("actor.reshard") == names.index("actor.update_actor") + 1
    assert weights(dataflow) == {
        ("actor.update_actor", "actor.reshard", "actor.train", 0),
        ("actor.reshard", "actor.generate_sequences", "actor.rollout", 1),
        ("critic.update_critic", "critic.compute_values", "critic.train", 1),
    }


def test_every_generation_reads_what_the_last_update_before_it_wrote() -> None:
    @recipe
    def half_steps(prompts: Prompts, actor: Actor) -> None:
        for _ in range(2):
            actor.update_actor(actor.generate_sequences(prompts), loss=Reads(()))

    @recipe
    def trains_first(examples: Examples, actor: Actor) -> None:
        actor.update_actor(examples, loss=Reads(()))
        actor.update_actor(examples, loss=Reads(()))
        actor.generate_sequences(examples)

    both = trace(half_steps)
    assert [node.name for node in both if node.role == "actor"] == [
        *("actor.generate_sequences", "actor.update_actor", "actor.reshard"),
        *("actor.generate_sequences#2", "actor.update_actor#2", "actor.reshard#2"),
    ]
    reads = {edge for edge in weights(replace(both, staleness=1)) if edge[2] == "actor.rollout"}
    assert reads == {
        ("actor.reshard#2", "actor.generate_sequences", "actor.rollout", 2),
        ("actor.reshard", "actor.generate_sequences#2", "actor.rollout", 0),
    }
    assert [node.op for node in trace(trains_first)][1:] == ["update_actor"] * 2 + ["reshard", "generate_sequences"]


def test_an_update_waits_for_readers_of_the_weights_it_overwrites() -> None:
    orders = {
        (edge.source, edge.target, edge.distance) for edge in trace(ppo).edges if edge.reason == "read-then-write"
    }
    assert ("critic.compute_values", "critic.update_critic", 0) in orders
    assert ("actor.generate_sequences", "actor.reshard", 0) in orders
    assert ("actor.reshard", "actor.update_actor", 1) in orders


def test_no_reshard_without_generation_and_none_without_training() -> None:
    @recipe
    def only_generates(prompts: Prompts, actor: Actor) -> None:
        actor.generate_sequences(prompts)

    @recipe
    def only_critic(prompts: Prompts, actor: Actor, critic: Critic) -> None:
        batch = critic.compute_values(actor.generate_sequences(prompts))
        critic.update_critic(batch, loss=Reads(("values",)))

    assert not any(
        node.kind == "reshard" for dataflow in map(trace, (only_generates, only_critic)) for node in dataflow
    )


def test_the_order_of_the_text_does_not_matter_for_independent_ops() -> None:
    @recipe
    def turned(prompts: Prompts, actor: Actor, critic: Critic, reward: Reward) -> None:
        batch = actor.generate_sequences(prompts)
        batch = reward.compute_reward(batch)
        batch = critic.compute_values(batch)
        estimate(batch)

    assert trace(turned).predecessors("critic.compute_values") == {"actor.generate_sequences"}


def test_rename_moves_no_data_and_keeps_the_writer() -> None:
    @recipe
    def renames(prompts: Prompts, actor: Actor, reward: Reward, cost: Reward, critic: Critic) -> None:
        batch = actor.generate_sequences(prompts)
        batch = reward.compute_reward(batch)
        batch = cost.compute_reward(batch, out="costs")
        batch = critic.compute_values(batch)
        estimate(batch.rename(rewards="costs"))

    dataflow = trace(renames)
    assert dataflow["cost.compute_reward"].writes == ("costs",)
    read = dataflow["estimate"].inputs[0].columns["rewards"]
    assert (read.node, read.column) == ("cost.compute_reward", "costs")


def test_a_second_generation_gets_a_name_of_its_own_and_joins_by_group() -> None:
    @recipe
    def remax(prompts: Prompts, actor: Actor, reward: Reward, critic: Critic) -> None:
        batch = reward.compute_reward(actor.generate_sequences(prompts))
        greedy = reward.compute_reward(actor.generate_sequences(prompts, greedy=True))
        batch = batch.join(greedy, values="rewards")
        estimate(batch)

    dataflow = trace(remax)
    assert dataflow.predecessors("actor.generate_sequences#2") == {"prompts"}
    assert dataflow["estimate"].inputs[0].columns["values"].node == "join"
    assert dataflow.predecessors("join") == {"reward.compute_reward#2"}


def test_a_filter_owns_the_rows_that_stay() -> None:
    @recipe
    def filters(prompts: Prompts, actor: Actor, reward: Reward) -> None:
        batch = keep_some(reward.compute_reward(actor.generate_sequences(prompts)))
        actor.update_actor(batch, loss=Reads(("rewards",)))

    dataflow = trace(filters)
    assert set(columns(dataflow, "actor.update_actor").values()) == {"keep_some"}
    assert columns(dataflow, "keep_some") == {"rewards": "reward.compute_reward"}
    assert dataflow["keep_some"].inputs[0].carried["response_ids"].node == "actor.generate_sequences"


def test_a_state_is_read_and_written_around_the_step() -> None:
    class Multiplier(State):
        """One number."""

        def initial(self, cfg: Any) -> dict[str, float]:
            return {"value": 1.0}

        @state_op(reads=("rewards",))
        def update(self, numbers: dict[str, float], batch: Batch) -> tuple[dict[str, float], dict[str, float]]:
            """Not called while tracing."""
            raise AssertionError

    @host_op(reads=("rewards",), writes=("advantages",))
    def scaled(batch: Batch, *, by: float) -> Batch:
        raise AssertionError

    def lagrangian(prompts: Prompts, actor: Actor, reward: Reward, multiplier: Any) -> None:
        batch = reward.compute_reward(actor.generate_sequences(prompts))
        scaled(batch, by=multiplier.value("value"))
        multiplier.update(batch)

    lagrangian.__annotations__ |= {"prompts": Prompts, "actor": Actor, "reward": Reward, "multiplier": Multiplier}
    dataflow = trace(recipe(lagrangian))
    assert ("multiplier.update", "scaled", "multiplier.state", 1) in weights(dataflow)
    assert dataflow["multiplier.update"].kind == "state"


def test_cadence_is_an_attribute_of_the_node() -> None:
    @recipe
    def seldom(prompts: Prompts, actor: Actor, critic: Critic) -> None:
        batch = critic.compute_values(actor.generate_sequences(prompts))
        critic.update_critic(batch, loss=Reads(("values",)), every=5)

    assert trace(seldom)["critic.update_critic"].every == 5


def test_a_missing_column_names_op_line_what_is_there_and_who_would_write_it() -> None:
    def forgets(prompts: Prompts, actor: Actor, critic: Critic, reward: Reward) -> None:
        batch = reward.compute_reward(actor.generate_sequences(prompts))
        estimate(batch)

    text = failure(forgets)
    line = forgets.__code__.co_firstlineno + 2
    assert text.startswith(f"test_trace.py:{line}: estimate reads column 'values'")
    assert "response_ids" in text and "critic.compute_values would write it" in text


def test_what_a_traced_batch_cannot_do_says_what_to_do_instead() -> None:
    def condition(prompts: Prompts, actor: Actor) -> None:
        if actor.generate_sequences(prompts):
            pass

    def loop(prompts: Prompts) -> None:
        for _ in prompts:  # the parameter is a traced batch
            pass

    def number(prompts: Prompts) -> None:
        prompts["prompt_ids"].item()  # type: ignore[attr-defined]

    def count(prompts: Prompts) -> None:
        len(prompts)

    def rows(prompts: Prompts) -> None:
        assert prompts.num_rows

    def typo(prompts: Prompts) -> None:
        prompts.renam(x="prompt")  # type: ignore[attr-defined]

    assert "batch.num_rows needs the batch's data" in failure(rows) and "write a host op" in failure(rows)
    assert "did you mean rename()?" in failure(typo)
    assert "drop rows in a host op" in failure(condition)
    assert "write a host op" in failure(loop)
    assert "write a host op" in failure(number)
    assert "batch.num_rows" in failure(count)


def test_unknown_ops_and_settings_name_the_nearest() -> None:
    def wrong_op(prompts: Prompts, actor: Actor) -> None:
        actor.generate(prompts)  # type: ignore[attr-defined]

    def wrong_setting(prompts: Prompts, actor: Actor) -> None:
        actor.generate_sequences(prompts, gredy=True)  # type: ignore[call-arg]

    def no_loss(prompts: Prompts, actor: Actor) -> None:
        actor.update_actor(actor.generate_sequences(prompts))  # type: ignore[call-arg]

    assert "did you mean 'generate_sequences'?" in failure(wrong_op)
    assert "did you mean 'greedy'?" in failure(wrong_setting)
    assert "loss" in failure(no_loss)


@host_op(reads=("rewards",), writes=("advantages",))
def smooth(batch: Batch, *, every: int = 2) -> Batch:
    """Its every would be taken for when it runs."""
    raise AssertionError


class Spaced(State):
    def initial(self, cfg: Any) -> dict[str, float]:
        return {"count": 0.0}

    @state_op(reads=("rewards",))
    def see(self, batch: Batch, *, after: int) -> None:
        """Its after would be taken for when it runs."""


def test_settings_that_all_ops_have_are_none_of_an_op_s_own() -> None:
    def of_host(prompts: Prompts, actor: Actor, reward: Reward) -> None:
        smooth(reward.compute_reward(actor.generate_sequences(prompts)), every=3)

    def of_state(prompts: Prompts, actor: Actor, reward: Reward, spaced: Spaced) -> None:
        spaced.see(reward.compute_reward(actor.generate_sequences(prompts)), after=3)

    assert "smooth has a setting 'every' of its own" in failure(of_host)
    assert "spaced.see has a setting 'after' of its own" in failure(of_state)


def test_a_parameter_without_meaning_is_refused() -> None:
    with pytest.raises(GraphError, match="'number' must be annotated"):
        recipe(_with_number)


def _with_number(prompts: Prompts, number: int) -> None:
    pass


def test_tracing_twice_gives_equal_graphs() -> None:
    assert isinstance(ppo, Recipe) and trace(ppo).edges == trace(ppo).edges
