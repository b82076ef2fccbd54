"""The search is exact: equal to brute force wherever that can be enumerated; its certificate counts what it saw."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from recipes.constrained.safe_rlhf import safe_rlhf
from recipes.policy_gradient.grpo import grpo
from recipes.policy_gradient.ppo import ppo
from recipes.policy_gradient.remax import remax
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.hardware import parse_cluster
from rlhf_dist.model_specs import BUILT_IN, ModelSpec
from rlhf_dist.planner.boxes import partitions, pool_sizes
from rlhf_dist.planner.catalogue import Catalogue
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.planner.generation import generation_cost, generation_floor_s
from rlhf_dist.planner.holdings import Holding
from rlhf_dist.planner.plan import make_plan, searcher
from rlhf_dist.planner.rates import Machine
from rlhf_dist.planner.search import INFINITE, NEAR, Search
from rlhf_dist.planner.strategy import Space, generation_strategies
from rlhf_dist.planner.work import NodeWork, make_problem
from rlhf_dist.planner.workload import Lengths, Workload, parse_lengths
from tests.planner.enumeration import TooLarge, least_step
from tests.planner.questions import paper

FLOWS = {flow.name: flow for flow in (trace(one) for one in (ppo, grpo, remax))}


@pytest.mark.parametrize(("roles", "count"), [(1, 1), (2, 2), (3, 5), (4, 15), (5, 52)])
def test_partitions_are_as_many_as_bell_numbers_and_all_different(roles: int, count: int) -> None:
    found = [frozenset(map(frozenset, one)) for one in partitions([str(n) for n in range(roles)])]
    assert len(found) == len(set(found)) == count
    assert all(sorted(unit for block in one for unit in block) == [str(n) for n in range(roles)] for one in found)


def small_model(data: st.DataObject) -> ModelSpec:
    hidden, heads = data.draw(st.sampled_from([2048, 4096])), data.draw(st.sampled_from([8, 16, 32]))
    experts = data.draw(st.sampled_from([0, 0, 8, 128]))
    return ModelSpec(
        name="small",
        layers=data.draw(st.sampled_from([8, 24, 40])),
        hidden=hidden,
        intermediate=3 * hidden,
        heads=heads,
        kv_heads=data.draw(st.sampled_from([1, 2, heads])),
        head_dim=128,
        vocabulary=32000,
        experts=experts,
        experts_per_token=min(experts // 4, 8),
        expert_intermediate=hidden // 2 if experts else 0,
    )


def lengths(data: st.DataObject) -> Lengths:
    mean = data.draw(st.sampled_from([10, 100, 1000]))
    if data.draw(st.booleans()):
        return parse_lengths({"mean": mean, "max": mean * data.draw(st.sampled_from([2, 8, 30]))}, "lengths")
    few = [mean * data.draw(st.sampled_from([10, 300]))] * data.draw(st.sampled_from([0, 1, 3]))
    return parse_lengths([mean] * 30 + few, "lengths")


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(st.data())
def test_the_search_finds_what_enumeration_finds(data: st.DataObject) -> None:
    """Mixtures, heavy tails, little memory, idle GPUs, staleness, nodes that run every k-th step: gap 0 is gap 0."""
    flow = FLOWS[data.draw(st.sampled_from(sorted(FLOWS)))]
    staleness = data.draw(st.sampled_from([0, 0, 1, 2]))
    every = data.draw(st.sampled_from([1, 1, 2, 3]))
    nodes = tuple(replace(one, every=every) if one.name.endswith("update_critic") else one for one in flow.nodes)
    flow = replace(flow, staleness=staleness, nodes=nodes)
    roles = [role for role, kind in flow.roles.items() if kind != "Prompts" and role in flow.used_roles]
    models: dict[str, ModelSpec | None] = {role: small_model(data) for role in roles}
    if "reward" in models and data.draw(st.booleans()):
        models["reward"] = None
    load = Workload(
        prompts=data.draw(st.sampled_from([1, 16, 48, 256])),
        prompt=lengths(data),
        response=lengths(data),
        mini_batches=1,
    )
    cluster = parse_cluster(
        data.draw(st.sampled_from(["2x2xA100-80G", "1x4xH200", "3x1xB200", "4x1xA100-80G@5Gbps", "3x2xH200"]))
    )
    memory, host = data.draw(st.sampled_from([20, 40, 80])), data.draw(st.sampled_from([8, 128]))
    gpu = replace(cluster.gpu, memory_bytes=memory * 2.0**30, host_memory_bytes=host * 2.0**30)
    space = Space(
        offload=data.draw(st.booleans()),
        zero=data.draw(st.sampled_from([(1, 3), (3,), (1, 2, 3)])),
        sequence=data.draw(st.booleans()),
        generation_pipeline=data.draw(st.booleans()),
        pipeline=data.draw(st.sampled_from([(1,), (1, 2)])),
        reallocate=data.draw(st.booleans()),
    )
    problem = make_problem(flow, models, load)
    separate = problem.generating if staleness or data.draw(st.booleans()) else frozenset[str]()
    overlap, idle = bool(staleness) or data.draw(st.booleans()), data.draw(st.booleans())

    def fresh() -> Search:
        machine = Machine.of(replace(cluster, gpu=gpu), Efficiency())
        sizes = pool_sizes(cluster.gpus, cluster.gpus_per_node)[-3:]
        return Search(Catalogue(problem, machine, space, separate), sizes, overlap=overlap, idle=idle)

    try:
        least = least_step(fresh())
    except TooLarge:
        assume(False)
    result = fresh().run()
    best = result.plans[0].step_s if result.plans else INFINITE
    assert best == pytest.approx(least, rel=1e-9)
    assert result.certificate.gap == 0.0 and result.certificate.explored > 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_generation_is_never_below_its_floor_nor_slower_in_more_memory(data: st.DataObject) -> None:
    model, gpus = small_model(data), 8
    machine = Machine.of(parse_cluster("1x8xA100-80G"), Efficiency())
    rows = data.draw(st.sampled_from([1, 16, 512]))
    load = Workload(prompts=rows, prompt=lengths(data), response=lengths(data))
    work = NodeWork(name="g", phase="generate", role="a", rows=rows, prompts=rows)
    floor = generation_floor_s(model, work, load, gpus, machine)
    for way in generation_strategies(model, gpus, 8, Space()):
        found = [generation_cost(model, work, load, way, machine, budget * 1e9) for budget in (5, 10, 20, 35, 60, 500)]
        seconds = [cost.seconds for cost in found if cost is not None]
        assert all(floor <= one * (1 + 1e-9) for one in seconds)
        assert seconds == sorted(seconds, reverse=True)


def test_separate_generation_is_searched_exactly_too() -> None:
    problem = make_problem(
        replace(FLOWS["grpo"], staleness=1),
        {"actor": BUILT_IN["llama3-8b"], "reference": BUILT_IN["llama3-8b"], "reward": None},
        Workload(prompts=64, prompt=Lengths.fixed(256), response=Lengths.fixed(512)),
    )
    cluster, space = parse_cluster("4x2xA100-80G"), Space(sequence=False, zero=(1, 3), offload=False)

    def fresh() -> Search:
        catalogue = Catalogue(problem, Machine.of(cluster, Efficiency()), space, frozenset({"actor"}))
        return Search(catalogue, (2, 4, 6))

    result = fresh().run()
    assert result.plans[0].step_s == pytest.approx(least_step(fresh(), 60_000), rel=1e-9)
    assert not any({"actor", "actor.rollout"} <= set(block) for block in result.plans[0].partition)


def test_runners_up_are_near_the_best_of_their_partitions_and_never_faster_than_the_best() -> None:
    question = paper(4, "llama2-7b")
    plan = make_plan(question, runners_up=3)
    assert len(plan.runners_up) == 3
    assert all(found.step_s >= plan.best.step_s for found in plan.runners_up)
    for found in plan.runners_up[:2]:
        pools = {str(n): {"gpus": pool.gpus, "roles": list(pool.units)} for n, pool in enumerate(found.pools)}
        alone = make_plan(paper(4, "llama2-7b", placement={"pools": pools}), 0)
        assert alone.best.step_s <= found.step_s <= alone.best.step_s * (1 + NEAR)


@pytest.mark.parametrize("looks", [16, 40, 200])
def test_a_search_that_is_cut_short_has_a_plan_and_says_the_gap(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    question = paper(32, "llama2-70b")
    best = searcher(question).run().plans[0].step_s
    monkeypatch.setattr("rlhf_dist.planner.search.MOST_EXPLORED", looks)
    result = searcher(question).run()
    found = result.plans[0].step_s
    assert found >= best and found * (1.0 - result.certificate.gap) <= best * (1 + 1e-9)
    assert 0 < result.certificate.gap < 1


def test_a_holding_is_dominated_only_by_one_that_is_better_in_any_memory() -> None:
    question = paper(2, "llama2-7b")
    catalogue = searcher(question).catalogue
    holdings = [*catalogue.least_holdings("critic", 16)]
    kept = set(map(id, catalogue.candidates("critic", 16).holdings))
    assert 0 < len(kept) <= len(holdings)
    for one, other in product(holdings[:12], repeat=2):
        if one is not other and one.dominates(other):
            assert one.rest <= other.rest
            for budget in (1e9, 5e9, 2e10, 6e10):
                for node in other.variants:
                    mine, theirs = (_at(holding, node, budget + other.rest - holding.rest) for holding in (one, other))
                    assert mine <= theirs


def _at(holding: Holding, node: str, budget: float) -> float:
    fits = [cost.seconds for need, cost in holding.variants[node] if need <= budget]
    return min(fits, default=INFINITE)


@pytest.mark.slow
def test_recipes_of_six_roles_are_planned() -> None:
    flow = trace(safe_rlhf)
    models = {role: BUILT_IN["llama2-7b"] for role in flow.roles if role not in ("prompts", "lagrange")}
    load = Workload(prompts=512, prompt=Lengths.fixed(512), response=Lengths.fixed(512), mini_batches=4)
    problem = make_problem(flow, models, load)
    question = replace(paper(4, "llama2-7b"), problem=problem)
    plan = make_plan(question, 0)
    assert plan.certificate.partitions == 203, "Bell(6)"
    assert {work.name for work in problem.nodes if work.role} == set(plan.best.costs)
