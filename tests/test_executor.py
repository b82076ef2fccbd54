"""Scheduling, on a clock instead of machines: what waits for what, what overlaps, what a barrier holds back."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.executor import Finished, StepReport, run_steps
from recipes.dpo import dpo
from recipes.ppo import PPO, ppo
from recipes.remax import remax
from recipes.safe_rlhf import safe_rlhf
from rlhf_dist.dataflow.graph import Dataflow, Node
from rlhf_dist.dataflow.trace import trace


@dataclass
class Clock:
    """A runner whose nodes take the time they are given."""

    pools: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    now: float = 0.0
    running: list[Finished] = field(default_factory=list)
    history: list[Finished] = field(default_factory=list)

    def pool_of(self, node: Node) -> str | None:
        return self.pools.get(node.role)

    def launch(self, node: Node, step: int) -> None:
        ends = self.now + self.seconds.get(node.name, 1.0)
        self.running.append(Finished(node=node.name, step=step, started_s=self.now, ended_s=ends, metrics={}))

    def wait(self) -> list[Finished]:
        first = min(self.running, key=lambda one: one.ended_s)
        self.running.remove(first)
        self.now = first.ended_s
        self.history.append(first)
        return [first]

    def end_step(self, step: int) -> None:
        pass

    def span(self, name: str, step: int = 0) -> Finished:
        return next(one for one in self.history if (one.node, one.step) == (name, step))


def run(dataflow: Dataflow, clock: Clock, steps: int = 1, **options: object) -> list[StepReport]:
    reports: list[StepReport] = []
    run_steps(dataflow, clock, start=0, stop=steps, on_step=reports.append, **options)  # type: ignore[arg-type]
    return reports


COLOCATED = dict.fromkeys(("actor", "critic", "reference"), "main")
SPLIT = {"actor": "a", "reference": "a", "critic": "b"}


def test_roles_of_one_pool_take_turns_in_recipe_order() -> None:
    clock = Clock(COLOCATED)
    run(trace(ppo), clock)
    spans = sorted((one for one in clock.history if one.node.split(".")[0] in COLOCATED), key=lambda one: one.started_s)
    assert all(before.ended_s <= after.started_s for before, after in zip(spans, spans[1:], strict=False))
    assert [one.node for one in spans][:4] == [
        "actor.generate_sequences",
        "actor.compute_log_prob",
        "critic.compute_values",
        "reference.compute_ref_log_prob",
    ]


def test_siblings_on_different_pools_overlap() -> None:
    clock = Clock({"actor": "a", "critic": "b", "reference": "c"})
    run(trace(ppo), clock)
    spans = [clock.span(name) for name in ("actor.compute_log_prob", "critic.compute_values")]
    spans.append(clock.span("reference.compute_ref_log_prob"))
    assert len({one.started_s for one in spans}) == 1, "all three wait for generation only"


def test_generation_of_the_next_step_waits_for_the_reshard_of_this_one() -> None:
    clock = Clock({"actor": "a", "critic": "b", "reference": "c"}, {"critic.update_critic": 50.0})
    run(trace(ppo), clock, steps=2)
    assert clock.span("actor.generate_sequences", 1).started_s >= clock.span("actor.reshard", 0).ended_s
    assert clock.span("prompts", 1).started_s < clock.span("actor.update_actor", 0).started_s, "prompts are prefetched"
    # The slow critic does not hold the actor back, only its own next use.
    assert clock.span("actor.generate_sequences", 1).started_s < clock.span("critic.update_critic", 0).ended_s
    assert clock.span("critic.compute_values", 1).started_s >= clock.span("critic.update_critic", 0).ended_s


def test_nothing_of_the_next_step_starts_before_a_barrier_is_passed() -> None:
    clock = Clock(SPLIT)
    run(trace(ppo), clock, steps=4, barrier=lambda step: step == 1)
    end_of_1 = max(one.ended_s for one in clock.history if one.step == 1)
    assert all(one.started_s >= end_of_1 for one in clock.history if one.step >= 2)
    assert clock.span("prompts", 1).started_s < max(one.ended_s for one in clock.history if one.step == 0)


def test_a_warm_up_skips_the_actors_update_and_nothing_waits_for_it() -> None:
    clock = Clock(COLOCATED)
    reports = run(trace(ppo, PPO(critic_warmup=2)), clock, steps=3)
    updates = [one.step for one in clock.history if one.node == "actor.update_actor"]
    assert updates == [2] and [report.step for report in reports] == [0, 1, 2]


def test_a_failing_node_ends_the_run() -> None:
    class Failing(Clock):
        def wait(self) -> list[Finished]:
            raise RuntimeError("rank 1 is gone")

    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        run(trace(dpo), Failing({"actor": "a", "reference": "a"}))


RECIPES = {recipe.name: trace(recipe) for recipe in (ppo, remax, safe_rlhf, dpo)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_schedule_ends_keeps_every_edge_and_never_shares_a_pool(data: st.DataObject) -> None:
    dataflow = RECIPES[data.draw(st.sampled_from(sorted(RECIPES)))]
    roles = sorted({node.role for node in dataflow} - {"host", "controller"})
    pools = {role: data.draw(st.sampled_from(["p", "q", "r"])) for role in roles}
    seconds = {node.name: data.draw(st.floats(0.01, 9.0)) for node in dataflow}
    steps, barrier = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    clock = Clock(pools, seconds)
    reports = run(
        dataflow, clock, steps, open_steps=data.draw(st.integers(1, 3)), barrier=lambda step: step % barrier == 0
    )
    assert [report.step for report in reports] == list(range(steps))
    spans = {(one.node, one.step): one for one in clock.history}
    assert len(spans) == len(clock.history) == steps * len(dataflow.nodes), "every node runs once a step"
    for edge in dataflow.edges:
        for step in range(steps - edge.distance):
            before, after = spans[edge.source, step], spans[edge.target, step + edge.distance]
            assert before.ended_s <= after.started_s, edge
    for pool in set(pools.values()):
        names = {node.name for node in dataflow if pools.get(node.role) == pool}
        busy = sorted((one.started_s, one.ended_s) for one in clock.history if one.node in names)
        assert all(end <= start for (_, end), (start, _) in zip(busy, busy[1:], strict=False))
