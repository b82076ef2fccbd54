"""The planner's schedule is the executor's: same spans, same step time; its bound is one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.execution.simulation import simulate
from recipes.constrained.safe_rlhf import safe_rlhf
from recipes.policy_gradient.grpo import grpo
from recipes.policy_gradient.ppo import PPO, ppo
from recipes.policy_gradient.remax import remax
from recipes.preference.dpo import dpo
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.model_specs import BUILT_IN
from rlhf_dist.planner.plan import make_plan, searcher
from rlhf_dist.planner.step_time import Graph, bound, simulate_steps, step_seconds
from rlhf_dist.planner.work import make_problem
from rlhf_dist.planner.workload import Lengths, Workload
from tests.planner.questions import paper

FLOWS = {flow.name: flow for flow in (trace(one) for one in (ppo, grpo, remax, safe_rlhf, dpo))}
FLOWS["warm"] = trace(ppo, PPO(critic_warmup=2))
LOAD = Workload(prompts=4, prompt=Lengths.fixed(8), response=Lengths.fixed(8))


def graph_of(name: str, overlap: bool) -> Graph:
    flow = FLOWS[name]
    models = {
        role: BUILT_IN["llama2-7b"] for role, kind in flow.roles.items() if kind not in ("Prompts", "Preferences")
    }
    models = {role: model for role, model in models.items() if role in flow.used_roles and role != "lagrange"}
    return Graph.of(make_problem(flow, models, LOAD), overlap=overlap)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_slots_and_steps_are_those_of_the_executor(data: st.DataObject) -> None:
    name, overlap = data.draw(st.sampled_from(sorted(FLOWS))), data.draw(st.booleans())
    flow, graph = FLOWS[name], graph_of(name, overlap)
    pool_of: dict[str, str | tuple[str, ...]] = {role: data.draw(st.sampled_from("pqr")) for role in sorted(flow.roles)}
    # Weight syncs between pools need both.
    pool_of |= {node.name: ("p", "q") for node in flow if node.kind == "reshard" and data.draw(st.booleans())}
    where = [pool_of.get(node.name, pool_of.get(node.role, ())) for node in flow]
    pools = [tuple(map(ord, pool)) for pool in where]
    # Whole seconds make ties, where the order of launches decides.
    seconds = [data.draw(st.integers(0, 5).map(float)) for _ in flow.nodes]
    of_node = dict(zip(graph.names, seconds, strict=True))
    steps = data.draw(st.integers(1, 5))
    ends: list[float] = []
    spans = simulate(
        flow,
        pool_of=pool_of,
        seconds=lambda node, step: of_node[node.name],
        steps=steps,
        open_steps=2 if overlap else 1,
        on_step=lambda report: ends.append(report.step),
    )
    slots, closed = simulate_steps(graph, pools, seconds, steps)
    assert [(graph.names[s.node], s.step, s.start_s, s.end_s) for s in slots] == [
        (s.node, s.step, s.start_s, s.end_s) for s in spans if s.pool != "q" or pool_of.get(s.node) != ("p", "q")
    ]
    assert len(closed) == len(ends) == steps and closed[-1] == spans[-1].end_s


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_no_schedule_is_faster_than_the_bound(data: st.DataObject) -> None:
    name, overlap = data.draw(st.sampled_from(sorted(FLOWS))), data.draw(st.booleans())
    flow, graph = FLOWS[name], graph_of(name, overlap)
    where = {role: data.draw(st.integers(0, 3)) for role in sorted(flow.roles)}
    pools = [(where[node.role],) if node.role in where else () for node in flow]
    seconds = [data.draw(st.floats(0.0, 9.0)) for _ in flow.nodes]
    least = bound(graph, pools, seconds)
    # Over a long run the average step cannot be below it: what overlaps at its ends is spread over the steps.
    steps = 40
    _, closed = simulate_steps(graph, pools, seconds, steps)
    assert closed[-1] >= least * (steps - 3) * (1 - 1e-9) - 1e-9 or max(graph.after) > 0
    assert step_seconds(graph, pools, seconds) >= least * (1 - 1e-12)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_steady_step_is_that_of_a_long_run(data: st.DataObject) -> None:
    staleness = data.draw(st.sampled_from([0, 1]))
    every, overlap = data.draw(st.sampled_from([1, 2, 3, 5])), bool(staleness) or data.draw(st.booleans())
    flow = replace(FLOWS[data.draw(st.sampled_from(["ppo", "grpo", "remax"]))], staleness=staleness)
    nodes = tuple(replace(node, every=every) if node.op == "update_critic" else node for node in flow.nodes)
    models = {role: BUILT_IN["llama2-7b"] for role, kind in flow.roles.items() if kind != "Prompts"}
    models = {role: model for role, model in models.items() if role in flow.used_roles}
    graph = Graph.of(make_problem(replace(flow, nodes=nodes), models, LOAD), overlap=overlap)
    where = {role: data.draw(st.integers(0, 2)) for role in sorted(flow.roles)}
    pools = [
        (3,) if staleness and node.op == "generate_sequences" else (where[node.role],) if node.role in models else ()
        for node in flow
    ]
    seconds = [data.draw(st.integers(0, 9).map(float)) if pool else 0.0 for pool in pools]
    _, closed = simulate_steps(graph.warm, pools, seconds, 320)
    assert step_seconds(graph, pools, seconds) == pytest.approx((closed[299] - closed[59]) / 240, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("preset", ["colocate", "split", "standalone"])
@pytest.mark.parametrize("overlap", [True, False])
def test_the_predicted_step_is_what_the_executor_takes(preset: str, overlap: bool) -> None:
    question = paper(8, "llama2-7b", placement=preset, overlap=overlap)
    plan = make_plan(question, runners_up=0)
    pool_of = {unit: str(n) for n, pool in enumerate(plan.best.pools) for unit in pool.units}
    search = searcher(question)
    seconds = dict(
        zip(search.graph.names, search.node_seconds({n: c.seconds for n, c in plan.best.costs.items()}), strict=True)
    )
    ends: dict[int, float] = {}
    simulate(
        question.problem.dataflow,
        pool_of=pool_of,
        seconds=lambda node, step: seconds[node.name],
        steps=12,
        open_steps=2 if overlap else 1,
        on_step=lambda report: ends.update({report.step: report.ended_s}),
    )
    measured = [after - before for before, after in pairwise(ends.values())][-6:]
    assert sum(measured) / len(measured) == pytest.approx(plan.best.step_s, rel=1e-6)


def test_a_slow_critic_is_hidden_behind_the_next_generation() -> None:
    pools = {"a": {"gpus": 48, "roles": ["actor", "reference", "reward"]}, "c": {"gpus": 16, "roles": ["critic"]}}
    slow, fast = (
        make_plan(paper(8, "llama2-7b", placement={"pools": pools}, overlap=overlap), 0).best.step_s
        for overlap in (False, True)
    )
    assert fast < slow, "the critic's update runs beside the next generation"


def test_what_runs_once_in_very_many_steps_costs_next_to_nothing_and_no_simulation_waits_for_it() -> None:
    graph = graph_of("ppo", overlap=False)
    critic = graph.names.index("critic.update_critic")
    seconds = [1.0] * len(graph.names)

    def step(every: int) -> float:
        cadences = tuple(every if node == critic else 1 for node in range(len(graph.names)))
        return step_seconds(replace(graph, every=cadences), [(0,)] * len(graph.names), seconds)

    assert step(1) == len(graph.names) and step(1 << 40) == pytest.approx(len(graph.names) - 1)
    assert step(50) == pytest.approx(len(graph.names) - 1 + 1 / 50)
    assert step(500) == pytest.approx(len(graph.names) - 1 + 1 / 500)
