"""The search is exact: equal to brute force wherever that can be enumerated; its certificate counts what it saw."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.grpo import grpo
from recipes.ppo import ppo
from recipes.remax import remax
from recipes.safe_rlhf import safe_rlhf
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.planner.boxes import Partition, partitions, pool_sizes
from rlhf_dist.planner.catalogue import Catalogue
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.planner.hardware import parse_cluster
from rlhf_dist.planner.layouts import Candidates, Layout
from rlhf_dist.planner.models import BUILT_IN, ModelSpec
from rlhf_dist.planner.plan import make_plan, searcher
from rlhf_dist.planner.rates import Machine
from rlhf_dist.planner.search import INFINITE, NEAR, Search, State
from rlhf_dist.planner.strategy import Space
from rlhf_dist.planner.work import make_problem
from rlhf_dist.planner.workload import Lengths, Workload
from tests.planner.questions import paper

FLOWS = {flow.name: flow for flow in (trace(one) for one in (ppo, grpo, remax))}
SIZES = [BUILT_IN[name] for name in ("llama2-7b", "llama2-13b", "codellama-34b", "qwen3-30b-a3b", "llama3-8b")]


@pytest.mark.parametrize(("roles", "count"), [(1, 1), (2, 2), (3, 5), (4, 15), (5, 52)])
def test_partitions_are_as_many_as_bell_numbers_and_all_different(roles: int, count: int) -> None:
    found = [frozenset(map(frozenset, one)) for one in partitions([str(n) for n in range(roles)])]
    assert len(found) == len(set(found)) == count
    assert all(sorted(unit for block in one for unit in block) == [str(n) for n in range(roles)] for one in found)


def every_layout(catalogue: Catalogue, unit: str, gpus: int) -> Candidates:
    """Candidates of a unit with the dominated layouts left in."""
    found = catalogue.candidates(unit, gpus)
    role, _, half = unit.partition(".")
    if half:
        return found
    layouts = list(catalogue._layouts(role, gpus, catalogue.nodes_of(unit), found.generations))
    return replace(found, layouts=tuple(layouts))


def brute_force(search: Search) -> float:
    """Least step of all partitions, sizes and strategies, each simulated."""
    catalogue, best = search.catalogue, INFINITE
    seen: dict[tuple[str, int], Candidates] = {}
    for partition in search.partitions():
        for sizes in product(search.sizes, repeat=len(partition)):
            if sum(sizes) != search.gpus:
                continue
            for block, size in zip(partition, sizes, strict=True):
                for unit in block:
                    seen.setdefault((unit, size), every_layout(catalogue, unit, size))
                    catalogue._made[unit, size] = seen[unit, size]
            best = min(best, _deepest(search, partition, tuple((size, ()) for size in sizes)))
    return best


def _deepest(search: Search, partition: Partition, state: State) -> float:
    if any(
        search.space.seconds(block, gpus, ways) is None for block, (gpus, ways) in zip(partition, state, strict=True)
    ):
        return INFINITE
    more = search.choices(partition, state)
    if more is None:
        return search.priced(partition, state).step_s
    return min((_deepest(search, partition, deeper) for deeper in more), default=INFINITE)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_search_finds_what_brute_force_finds(data: st.DataObject) -> None:
    flow = FLOWS[data.draw(st.sampled_from(sorted(FLOWS)))]
    roles = [role for role, kind in flow.roles.items() if kind != "Prompts" and role in flow.used_roles]
    models: dict[str, ModelSpec | None] = {role: data.draw(st.sampled_from(SIZES)) for role in roles}
    if "reward" in models and data.draw(st.booleans()):
        models["reward"] = None
    load = Workload(
        prompts=data.draw(st.sampled_from([16, 48, 96])),
        prompt=Lengths.fixed(data.draw(st.sampled_from([256, 1024]))),
        response=Lengths.lognormal(400, 1024) if data.draw(st.booleans()) else Lengths.fixed(512),
        mini_batches=data.draw(st.sampled_from([1, 4])),
    )
    cluster = parse_cluster(data.draw(st.sampled_from(["2x2xA100-80G", "4xH200", "3x1xB200", "2x4xA100-40G"])))
    space = Space(offload=data.draw(st.booleans()), zero=(1, 3), sequence=False, generation_pipeline=False)
    problem = make_problem(flow, models, load)
    overlap = data.draw(st.booleans())
    sizes = pool_sizes(cluster.gpus, cluster.gpus_per_node)[-3:]

    def fresh() -> Search:
        return Search(Catalogue(problem, Machine.of(cluster, Efficiency()), space), sizes, overlap=overlap)

    result = fresh().run()
    best = result.plans[0].step_s if result.plans else INFINITE
    assert best == pytest.approx(brute_force(fresh()), rel=1e-9)
    assert result.certificate.gap == 0.0 and result.certificate.explored > 0


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
    assert result.plans[0].step_s == pytest.approx(brute_force(fresh()), rel=1e-9)
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


def test_a_layout_is_dominated_only_by_one_that_is_better_in_any_memory() -> None:
    question = paper(2, "llama2-7b")
    catalogue = searcher(question).catalogue
    layouts = [*catalogue.least_layouts("critic", 16)]
    kept = set(map(id, catalogue.candidates("critic", 16).layouts))
    assert 0 < len(kept) <= len(layouts)
    for one, other in product(layouts[:12], repeat=2):
        if one is not other and one.dominates(other):
            assert one.rest <= other.rest
            for budget in (1e9, 5e9, 2e10, 6e10):
                for node in other.variants:
                    mine, theirs = (_at(layout, node, budget + other.rest - layout.rest) for layout in (one, other))
                    assert mine <= theirs


def _at(layout: Layout, node: str, budget: float) -> float:
    fits = [cost.seconds for need, cost in layout.variants[node] if need <= budget]
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
