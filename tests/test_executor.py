"""Scheduling, on a clock instead of machines: what waits for what, what overlaps, what a barrier holds back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.execution.critical_path import critical_path, lower_bound_s, seconds_on_path
from controller.execution.executor import Arrived, Finished, StepReport, run_steps
from controller.execution.simulation import Clock, Span, simulate
from controller.record.timeline import Timeline
from recipes.constrained.safe_rlhf import safe_rlhf
from recipes.policy_gradient.ppo import PPO, ppo
from recipes.policy_gradient.remax import remax
from recipes.preference.dpo import dpo
from rlhf_dist.dataflow.graph import Dataflow, Node
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


ROLLOUT_APART: dict[str, str | tuple[str, ...]] = {
    **APART,
    "actor.generate_sequences": "g",
    "actor.generate_sequences#2": "g",
    "actor.reshard": ("a", "g"),
}


def test_generation_runs_ahead_by_as_many_updates_as_it_may_be_stale() -> None:
    seconds = {"actor.generate_sequences": 4.0, "actor.update_actor": 4.0}
    synchronous = schedule(trace(ppo), ROLLOUT_APART, 6, seconds)
    ahead = schedule(replace(trace(ppo), staleness=1), ROLLOUT_APART, 6, seconds)
    assert at(synchronous, "actor.generate_sequences", 1).start_s >= at(synchronous, "actor.reshard", 0).end_s
    assert at(ahead, "actor.generate_sequences", 1).start_s < at(ahead, "actor.update_actor", 0).end_s
    assert at(ahead, "actor.generate_sequences", 2).start_s >= at(ahead, "actor.reshard", 0).end_s
    assert max(span.end_s for span in ahead) < 0.75 * max(span.end_s for span in synchronous)


def test_an_interrupted_generation_gives_way_to_the_sync_and_loses_no_time() -> None:
    seconds = {"actor.generate_sequences": 10.0, "actor.update_actor": 1.0}
    dataflow = replace(trace(ppo), staleness=1)
    waiting = schedule(dataflow, ROLLOUT_APART, 3, seconds)
    giving_way = schedule(dataflow, ROLLOUT_APART, 3, seconds, interrupt=True)
    assert at(waiting, "actor.reshard", 0).start_s >= at(waiting, "actor.generate_sequences", 1).end_s
    parts = [span for span in giving_way if (span.node, span.step) == ("actor.generate_sequences", 1)]
    assert len(parts) == 2 and parts[0].end_s == at(giving_way, "actor.reshard", 0).start_s
    assert sum(part.seconds for part in parts) == pytest.approx(10.0)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_staleness_is_never_exceeded_and_work_is_conserved(data: st.DataObject) -> None:
    """Whatever the durations, the bound, the first step, barriers and interruptions."""
    staleness, interrupt = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    dataflow = replace(trace(data.draw(st.sampled_from([ppo, remax]))), staleness=staleness)
    drawn = {(node.name, step): data.draw(st.floats(0.01, 9.0)) for node in dataflow for step in range(10)}
    start, steps, every = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    spans = simulate(
        dataflow,
        pool_of=ROLLOUT_APART,
        seconds=lambda node, step: drawn[node.name, step],
        start=start,
        steps=steps,
        interrupt=interrupt,
        barrier=lambda step: (step + 1) % every == 0,
    )
    _assert_pools_are_not_shared(spans)
    synced = {span.step: span.end_s for span in spans if span.node == "actor.reshard"}
    for span in (span for span in spans if span.node.startswith("actor.generate_sequences")):
        # Counting goes on from the weights a resumed run starts with: those of `start` updates.
        updates = start + sum(1 for end in synced.values() if end <= span.start_s)
        assert span.step - updates <= staleness, (span, updates)
        if span.step > start and span.step % every == 0:
            assert updates == span.step, "nothing runs ahead over a barrier"
    worked: dict[tuple[str, int, str | None], float] = {}
    for span in spans:
        worked[span.node, span.step, span.pool] = worked.get((span.node, span.step, span.pool), 0.0) + span.seconds
    assert {(node, step) for node, step, _ in worked} == {
        (node.name, step) for node in dataflow for step in range(start, start + steps)
    }
    for (node, step, _), seconds in worked.items():
        assert seconds == pytest.approx(drawn[node, step]), "each node takes its time, once"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_schedule_beats_the_lower_bound_and_colocated_ones_reach_it(data: st.DataObject) -> None:
    dataflow = replace(trace(ppo), staleness=data.draw(st.integers(0, 2)))
    seconds = {node.name: data.draw(st.floats(0.01, 9.0)) for node in dataflow}
    steps = data.draw(st.integers(1, 5))
    pools = data.draw(st.sampled_from([ROLLOUT_APART, APART, SPLIT]))
    spans = schedule(dataflow, pools, steps, seconds)
    clock = Clock(pools, lambda node, step: seconds[node.name])
    bound = lower_bound_s(dataflow, pools_of=clock.pools_of, seconds=lambda n, _: seconds[n.name], steps=steps)
    assert max(span.end_s for span in spans) >= bound - 1e-6
    together = dict.fromkeys((node.role for node in dataflow), "main")
    everything = Clock(together, lambda node, step: seconds[node.name])
    one_by_one = schedule(dataflow, together, steps, seconds)
    bound = lower_bound_s(dataflow, pools_of=everything.pools_of, seconds=lambda n, _: seconds[n.name], steps=steps)
    assert max(span.end_s for span in one_by_one) == pytest.approx(bound)


def test_the_bound_of_a_pipeline_counts_its_filling_and_draining() -> None:
    """One step ahead: four generations, the two transfers between them, the last log-probs, update and transfer."""
    pools: dict[str, str | tuple[str, ...]] = {**APART, "actor.generate_sequences": "d", "actor.reshard": ("a", "d")}
    lasts = {"actor.generate_sequences": 6.0, "actor.compute_log_prob": 1.0, "actor.update_actor": 2.0}
    dataflow, clock = replace(trace(ppo), staleness=1), Clock(pools, lambda node, step: 0.0)
    seconds = {"actor.reshard": 1.0, **lasts}
    bound = lower_bound_s(
        dataflow, pools_of=clock.pools_of, seconds=lambda node, step: seconds.get(node.name, 0.0), steps=4
    )
    assert bound == 4 * 6.0 + 2 * 1.0 + 1.0 + 2.0 + 1.0
    spans = simulate(dataflow, pool_of=pools, seconds=lambda node, step: seconds.get(node.name, 0.0), steps=4)
    assert bound <= max(span.end_s for span in spans) <= bound + 1.0


def test_the_critical_path_names_what_the_end_waited_for() -> None:
    pools_of = Clock(APART, lambda node, step: 1.0).pools_of
    reports: list[StepReport] = []
    schedule(trace(ppo), APART, 2, {"critic.update_critic": 20.0}, on_step=reports.append)
    links = critical_path(trace(ppo), [one for report in reports for one in report.nodes], pools_of)
    names = [(link.node, link.step) for link in links]
    assert names[-1] == ("critic.update_critic", 1) and ("critic.update_critic", 0) in names
    assert seconds_on_path(links)["critic.update_critic"] == 40.0
    assert sum(link.seconds + link.waited_s for link in links) == max(r.ended_s for r in reports)


def test_the_critical_path_goes_on_before_an_evaluation() -> None:
    dataflow, pools_of = trace(ppo), Clock(APART, lambda node, step: 1.0).pools_of
    timeline = Timeline(dataflow, pools_of)
    for start in (0.0, 1.0, 10.0, 11.0):  # two steps, nine seconds of evaluation, two more: each generates and learns
        for node, begin in (("actor.generate_sequences", start), ("actor.update_actor", start + 0.5)):
            timeline.finished.append(
                Finished(node=node, step=int(start), started_s=begin, ended_s=begin + 0.5, metrics={})
            )
    timeline.paused.append(("evaluation", 2.0, 9.0))
    # 4 steps of 0.5 + 0.5 s; a second of waiting from 9 to 10 is a quarter a step
    assert timeline.critical_path() == {"actor.generate_sequences": 0.5, "actor.update_actor": 0.5, "waiting": 0.25}


def test_the_critical_path_counts_each_piece() -> None:
    """Pieces of what makes rows and of what takes them, one pool each: the taker is at work from 2 to 9 but for one."""
    dataflow, pools_of = trace(ppo), Clock(APART, lambda node, step: 1.0).pools_of
    ran = [
        ("actor.generate_sequences", 0.0, 4.0),
        ("reference.compute_ref_log_prob", 2.0, 4.5),
        ("reference.compute_ref_log_prob", 4.5, 6.0),
        ("reference.compute_ref_log_prob", 7.0, 9.0),
    ]
    finished = [Finished(node=node, step=0, started_s=a, ended_s=b, metrics={}) for node, a, b in ran]
    links = critical_path(dataflow, finished, pools_of)
    assert [(link.seconds, link.waited_s) for link in links] == [(2.0, 0.0), (2.5, 0.0), (1.5, 0.0), (2.0, 1.0)]
    assert seconds_on_path(links) == {
        "reference.compute_ref_log_prob": 6.0,
        "actor.generate_sequences": 2.0,
        "waiting": 1.0,
    }


def test_a_streamed_node_starts_with_its_source_and_is_launched_once() -> None:
    class Streaming(Clock):
        launched: list[tuple[str, int]]

        def streams(self, source: Node, target: Node) -> bool:
            return (source.name, target.name) == ("actor.generate_sequences", "reward.compute_reward")

        def launch(self, node: Node, step: int) -> None:
            self.launched.append((node.name, step))
            super().launch(node, step)

    clock = Streaming(APART, lambda node, step: 5.0 if node.name == "reward.compute_reward" else 1.0)
    clock.launched = []
    run_steps(trace(ppo), clock, start=0, stop=3, on_step=lambda report: None)
    started = {(one.node, one.step): one.started_s for one in clock.history}
    for step in range(3):
        assert started["reward.compute_reward", step] == started["actor.generate_sequences", step]
        assert started["gae", step] >= started["reward.compute_reward", step] + 5.0
    assert len(clock.launched) == len(set(clock.launched))


def test_a_node_that_follows_has_its_pools_for_a_piece_at_a_time() -> None:
    """The reference shares the pool of the critic's update, which is older and comes between two of its pieces."""

    class Pieces(Clock):
        left: dict[int, int]
        followed: list[int]

        def streams(self, source: Node, target: Node) -> bool:
            return (source.name, target.name) == ("actor.generate_sequences", "reference.compute_ref_log_prob")

        def follows(self, source: Node, target: Node) -> bool:
            return self.streams(source, target)

        def follow(self, node: Node, step: int) -> None:
            self.followed.append(step)
            self.left[step] = 2  # a piece now, and one when all rows are made
            self.arrived = [Arrived(node=node.name, step=step)]

        def wait(self) -> list[Any]:
            arrived, self.arrived = self.arrived, []
            if arrived:
                return arrived
            (one,) = super().wait()
            if one.node == "actor.generate_sequences" and self.left.get(one.step):
                return [one, Arrived(node="reference.compute_ref_log_prob", step=one.step)]
            if one.node == "reference.compute_ref_log_prob":
                self.left[one.step] -= 1
                return [replace(one, waits=self.left[one.step] > 0)]
            return [one]

    pools: dict[str, str | tuple[str, ...]] = {
        **APART,
        "reference": "b",
        "actor.generate_sequences": "d",
        "actor.reshard": ("a", "d"),
    }
    seconds = {"actor.generate_sequences": 8.0, "critic.update_critic": 3.0, "reference.compute_ref_log_prob": 1.0}
    clock = Pieces(pools, lambda node, step: seconds.get(node.name, 0.5))
    clock.left, clock.followed, clock.arrived = {}, [], []
    reports: list[StepReport] = []
    run_steps(replace(trace(ppo), staleness=1), clock, start=0, stop=3, on_step=reports.append)
    spans = {
        name: [(one.step, one.started_s, one.ended_s) for one in clock.history if one.node == name] for name in seconds
    }
    generated = {step: (start, end) for step, start, end in spans["actor.generate_sequences"]}
    assert clock.followed == [0, 1, 2]
    for step in range(3):
        first, last = [one for one in spans["reference.compute_ref_log_prob"] if one[0] == step]
        assert first[1] < generated[step][1] <= last[1], "a piece while others are made, the last when all are"
        assert [one.node for one in reports[step].nodes].count("reference.compute_ref_log_prob") == 2
    _, started, ended = spans["critic.update_critic"][0]
    assert generated[1][0] <= started < ended < generated[1][1], "older work has the pool while pieces are awaited"
    shared = spans["critic.update_critic"] + spans["reference.compute_ref_log_prob"]
    busy = sorted((start, end) for _, start, end in shared)
    assert all(end <= start for (_, end), (start, _) in zip(busy, busy[1:], strict=False))


def _assert_pools_are_not_shared(spans: list[Span]) -> None:
    for pool in {span.pool for span in spans} - {None}:
        busy = sorted((span.start_s, span.end_s) for span in spans if span.pool == pool)
        assert all(end <= start for (_, end), (start, _) in zip(busy, busy[1:], strict=False))
