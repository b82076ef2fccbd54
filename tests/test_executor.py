"""Scheduling, on a clock instead of machines: what waits for what, what overlaps, what a barrier holds back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.executor import Finished, StepReport, run_steps
from controller.simulation import Clock, Span, simulate
from recipes.dpo import dpo
from recipes.ppo import PPO, ppo
from recipes.remax import remax
from recipes.safe_rlhf import safe_rlhf
from rlhf_dist.dataflow.graph import Dataflow
from rlhf_dist.dataflow.trace import trace

COLOCATED = dict.fromkeys(("actor", "critic", "reference"), "main")
SPLIT = {"actor": "a", "reference": "a", "critic": "b"}
APART = {"actor": "a", "critic": "b", "reference": "c"}


def at(spans: list[Span], name: str, step: int = 0) -> Span:
    return next(span for span in spans if (span.node, span.step) == (name, step))


def schedule(
    dataflow: Dataflow,
    pool_of: Mapping[str, str | tuple[str, ...]],
    steps: int = 1,
    seconds: Mapping[str, float] | None = None,
    **options: object,
) -> list[Span]:
    given_seconds = seconds or {}
    return simulate(
        dataflow,
        pool_of=pool_of,
        seconds=lambda node, step: given_seconds.get(node.name, 1.0),
        steps=steps,
        **options,  # type: ignore[arg-type]
    )


def test_roles_of_one_pool_take_turns_in_recipe_order() -> None:
    spans = [span for span in schedule(trace(ppo), COLOCATED) if span.pool]
    assert all(before.end_s <= after.start_s for before, after in zip(spans, spans[1:], strict=False))
    assert [span.node for span in spans][:4] == [
        "actor.generate_sequences",
        "actor.compute_log_prob",
        "critic.compute_values",
        "reference.compute_ref_log_prob",
    ]


def test_siblings_on_different_pools_overlap() -> None:
    spans = schedule(trace(ppo), APART)
    names = ("actor.compute_log_prob", "critic.compute_values", "reference.compute_ref_log_prob")
    assert len({at(spans, name).start_s for name in names}) == 1, "all three wait for generation only"


def test_generation_of_the_next_step_waits_for_the_reshard_of_this_one() -> None:
    spans = schedule(trace(ppo), APART, 2, {"critic.update_critic": 50.0})
    assert at(spans, "actor.generate_sequences", 1).start_s >= at(spans, "actor.reshard", 0).end_s
    assert at(spans, "prompts", 1).start_s < at(spans, "actor.update_actor", 0).start_s, "prompts are prefetched"
    # The slow critic does not hold the actor back, only its own next use.
    assert at(spans, "actor.generate_sequences", 1).start_s < at(spans, "critic.update_critic", 0).end_s
    assert at(spans, "critic.compute_values", 1).start_s >= at(spans, "critic.update_critic", 0).end_s


def test_nothing_of_the_next_step_starts_before_a_barrier_is_passed() -> None:
    spans = schedule(trace(ppo), SPLIT, 4, barrier=lambda step: step == 1)
    end_of_1 = max(span.end_s for span in spans if span.step == 1)
    assert all(span.start_s >= end_of_1 for span in spans if span.step >= 2)
    assert at(spans, "prompts", 1).start_s < max(span.end_s for span in spans if span.step == 0)


def test_a_warm_up_skips_the_actors_update_and_nothing_waits_for_it() -> None:
    reports: list[StepReport] = []
    spans = schedule(trace(ppo, PPO(critic_warmup=2)), COLOCATED, 3, on_step=reports.append)
    updates = [span.step for span in spans if span.node == "actor.update_actor"]
    assert updates == [2] and [report.step for report in reports] == [0, 1, 2]


def test_a_node_on_two_pools_waits_for_both_and_is_not_overtaken() -> None:
    pools = {**SPLIT, "actor.reshard": ("a", "b")}
    spans = schedule(trace(ppo), pools, 3, {"critic.update_critic": 5.0})
    for step in range(2):
        reshard = [span for span in spans if (span.node, span.step) == ("actor.reshard", step)]
        assert [span.pool for span in reshard] == ["a", "b"] and reshard[0].start_s == reshard[1].start_s
        assert reshard[0].start_s >= at(spans, "critic.update_critic", step).end_s, "it shares the critic's pool"
        assert at(spans, "actor.generate_sequences", step + 1).start_s >= reshard[0].end_s


def test_a_failing_node_ends_the_run() -> None:
    class Failing(Clock):
        def wait(self) -> list[Finished]:
            raise RuntimeError("rank 1 is gone")

    clock = Failing({"actor": "a", "reference": "a"}, lambda node, step: 1.0)
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        run_steps(trace(dpo), clock, start=0, stop=1, on_step=lambda report: None)


RECIPES = {recipe.name: trace(recipe) for recipe in (ppo, remax, safe_rlhf, dpo)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_schedule_ends_keeps_every_edge_and_never_shares_a_pool(data: st.DataObject) -> None:
    dataflow = RECIPES[data.draw(st.sampled_from(sorted(RECIPES)))]
    roles = sorted({node.role for node in dataflow} - {"host", "controller"})
    names = st.sampled_from(["p", "q", "r"])
    pools: dict[str, str | tuple[str, ...]] = {role: data.draw(names) for role in roles}
    pools |= {node.name: ("p", "q", "r")[: data.draw(st.integers(1, 3))] for node in dataflow if node.kind == "reshard"}
    seconds = {node.name: data.draw(st.floats(0.01, 9.0)) for node in dataflow}
    steps, barrier = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    reports: list[StepReport] = []
    spans = schedule(
        dataflow,
        pools,
        steps,
        seconds,
        open_steps=data.draw(st.integers(1, 3)),
        barrier=lambda step: step % barrier == 0,
        on_step=reports.append,
    )
    assert [report.step for report in reports] == list(range(steps))
    when = {(span.node, span.step): span for span in spans}
    assert sum(len(report.nodes) for report in reports) == len(when) == steps * len(dataflow.nodes), "every node once"
    for edge in dataflow.edges:
        for step in range(steps - edge.distance):
            before, after = when[edge.source, step], when[edge.target, step + edge.distance]
            assert before.end_s <= after.start_s, edge
    _assert_pools_are_not_shared(spans)


def _assert_pools_are_not_shared(spans: list[Span]) -> None:
    for pool in {span.pool for span in spans} - {None}:
        busy = sorted((span.start_s, span.end_s) for span in spans if span.pool == pool)
        assert all(end <= start for (_, end), (start, _) in zip(busy, busy[1:], strict=False))
