"""A question to the planner and its answer: the best plan, runners-up, and why it is the best.

    Question(problem, cluster, efficiency, request)  --make_plan-->  Plan

A request is `auto` (search everything), a preset (its partition; sizes and strategies are searched) or pools
that are given (what is left open is searched). All of it is the same search over a smaller space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhf_dist.dataflow.evaluation_graph import EvaluationGraph
from rlhf_dist.hardware import Cluster
from rlhf_dist.planner.boxes import Partition, pool_sizes
from rlhf_dist.planner.catalogue import Catalogue, Wanted
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.planner.feasible import anything_fits, cannot_fit, check_holdings, what_is_missing
from rlhf_dist.planner.found import Certificate, FoundPlan, SearchResult
from rlhf_dist.planner.memory import usable_bytes
from rlhf_dist.planner.rates import Machine
from rlhf_dist.planner.search import Search
from rlhf_dist.planner.step_time import Graph, Slot, simulate_steps
from rlhf_dist.planner.strategy import Space
from rlhf_dist.planner.work import Problem
from rlhf_dist.typed import ConfigError

TIE = 0.02
"""Plans this close to the optimum are the same to the model; the planner then prefers the usual one (ADR 041). Two runs
of one configuration differ by more: 4 to 6 % at 8B, 16 to 21 % at 70B (a rerun of NeMo-RL's published table)."""
FINE_NODES = 32
"""Nodes up to which any number of them may be left idle. Above, the search for fewer nodes takes steps of several."""
KEPT = 6
"""Partitions whose best plans are found whatever is shown: among them a tie is looked for."""
PRESETS = ("colocate", "split", "standalone", "async")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which placements to consider."""

    kind: str = "auto"
    """`auto`, one of PRESETS, or `pools`."""
    pools: Mapping[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    """Pool -> (units, GPUs), for `pools`."""
    wanted: Wanted = field(default_factory=dict)
    """Node -> what is given of its strategy."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to plan."""

    name: str
    """The recipe's."""
    problem: Problem
    cluster: Cluster
    efficiency: Efficiency = field(default_factory=Efficiency)
    space: Space = field(default_factory=Space)
    request: Request = field(default_factory=Request)
    overlap: bool = True
    """Whether a step may start before the one before has ended, as the executor does unless a barrier forbids it."""
    evaluations: tuple[EvaluationGraph, ...] = ()
    """What is run on held-out rows: said, and in no step's time."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer."""

    question: Question
    best: FoundPlan
    runners_up: tuple[FoundPlan, ...]
    """The best plans of other partitions, best first; none is faster than `best`."""
    ties: tuple[FoundPlan, ...]
    """Plans faster than `best` by no more than `TIE`: the model cannot tell them apart."""
    certificate: Certificate
    search_s: float

    @property
    def tokens_per_s(self) -> float:
        """Prompt and response tokens per second of a step."""
        return self.question.problem.tokens / self.best.step_s

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the best plan's pools."""
        given = {units: name for name, (units, _) in self.question.request.pools.items()}
        return tuple(given.get(pool.units, pool_name(pool.units)) for pool in self.best.pools)

    def timeline(self, steps: int = 2) -> tuple[Graph, list[Slot], tuple[tuple[int, ...], ...]]:
        """The graph, its slots on the clock for some steps, and the pools of each node."""
        search = searcher(self.question)
        pools = search.pools_of(self.best.partition)
        seconds = search.node_seconds({name: cost.seconds for name, cost in self.best.costs.items()})
        slots, _ = simulate_steps(search.graph, pools, seconds, steps)
        return search.graph, slots, pools


def pool_name(units: tuple[str, ...]) -> str:
    """A pool's name, made of what is placed on it."""
    return "_".join(unit.replace(".", "_") for unit in units)


def searcher(question: Question, keep: int = 1) -> Search:
    """The search that a question asks for. Raises ConfigError for a placement that cannot be."""
    problem, request = question.problem, question.request
    separate = _separate(question)
    catalogue = Catalogue(
        problem, Machine.of(question.cluster, question.efficiency), question.space, separate, request.wanted
    )
    sizes = pool_sizes(question.cluster.gpus, question.cluster.gpus_per_node)
    allowed: list[Partition] | None = None
    fixed: dict[tuple[str, ...], int] = {}
    if request.kind == "pools":
        allowed = [tuple(units for units, _ in request.pools.values())]
        fixed = dict(request.pools.values())
        sizes = tuple(sorted({*sizes, *fixed.values()}))
    elif request.kind != "auto":
        allowed = [preset_partition(request.kind, problem, catalogue.units)]
        half = question.cluster.gpus // 2
        if request.kind == "split" and half in sizes and len(allowed[0]) == 2:
            fixed = dict.fromkeys(allowed[0], half)
    idle = request.kind == "pools" or question.cluster.nodes <= FINE_NODES
    return Search(catalogue, sizes, allowed, fixed, keep, question.overlap, idle)


def solve(search: Search) -> SearchResult:
    """All of a search. On more than FINE_NODES nodes: all GPUs by the node, fewer of them by larger steps."""
    result = search.run()
    if search.idle or search.fixed:
        return result
    cluster = search.catalogue.machine.cluster
    step = -(-cluster.nodes // FINE_NODES)
    sizes = pool_sizes(search.gpus, cluster.gpus_per_node, step)
    return result.joined(replace(search, sizes=sizes, idle=True).run(), search.keep)


def make_plan(question: Question, runners_up: int = 3) -> Plan:
    """Search and answer. Raises ConfigError if nothing fits: with what is to blame, and the smallest cluster."""
    search = searcher(question, keep=max(KEPT, runners_up + 2))
    result = solve(search)
    if not result.plans:
        pools = min(map(len, search.partitions()), default=1)
        if pools > search.gpus:
            raise ConfigError(f"{pools} pools need a GPU each at least, and {question.cluster.text} has {search.gpus}")
        check_holdings(search, question.request.wanted, question.request.pools)
        if question.request.wanted:
            free = replace(question, request=replace(question.request, wanted={}))
            if anything_fits(searcher(free)):
                raise ConfigError(
                    f"the models do not fit on {question.cluster.text} with the strategies asked for: "
                    f"{what_is_missing(search)}; without them they do, so leave out what need not be so"
                )
        raise ConfigError(cannot_fit(search, question.cluster, lambda cluster: _fits(question, cluster)))
    best = _preferred(question.problem, result.plans[:KEPT])
    if best is not result.plans[0]:  # Another partition than the optimum's: known to within NEAR until now.
        alone = replace(search, allowed=[best.partition], keep=1).run()
        best = min(best, *alone.plans, key=lambda plan: plan.step_s)
    ties = tuple(plan for plan in result.plans if plan.step_s < best.step_s)
    others = tuple(plan for plan in result.plans if plan.partition != best.partition and plan not in ties)
    return Plan(
        question=question,
        best=best,
        runners_up=others[:runners_up],
        ties=ties,
        certificate=result.certificate,
        search_s=result.search_s,
    )


def preset_partition(preset: str, problem: Problem, units: tuple[str, ...]) -> Partition:
    """Pools of a preset: all together; language models apart from the rest; each alone; generation apart."""
    if preset == "standalone":
        return tuple((unit,) for unit in units)
    bases = problem.dataflow.bases
    if preset == "split":
        policy = tuple(unit for unit in units if bases.get(unit.partition(".")[0]) == "LanguageModel")
        rest = tuple(unit for unit in units if unit not in policy)
        return tuple(block for block in (policy, rest) if block)
    if preset == "async":
        rollouts = tuple(unit for unit in units if unit.endswith(".rollout"))
        return (tuple(unit for unit in units if unit not in rollouts), rollouts)
    return (units,)


def what_if(question: Question, cluster: Cluster) -> float | None:
    """Seconds of a step of the best plan on another cluster; None if nothing fits there."""
    result = solve(searcher(replace(question, cluster=cluster)))
    return result.plans[0].step_s if result.plans else None


def headroom_bytes(question: Question) -> float:
    """Bytes of a GPU for tensors."""
    return usable_bytes(question.cluster, question.efficiency)


def _separate(question: Question) -> frozenset[str]:
    """Roles that generate in a pool of their own."""
    problem, request = question.problem, question.request
    if request.kind == "pools":
        placed = {unit for units, _ in request.pools.values() for unit in units}
        return frozenset(role for role in problem.generating if f"{role}.rollout" in placed)
    if problem.staleness or request.kind == "async":
        return problem.generating & problem.trained
    return frozenset()


def _preferred(problem: Problem, plans: Sequence[FoundPlan]) -> FoundPlan:
    """Of plans that the model cannot tell apart: frozen language models with one that learns, then fewer pools, then
    the fastest."""
    policies = {role for role, base in problem.dataflow.bases.items() if base == "LanguageModel"}
    near = [plan for plan in plans if plan.step_s <= plans[0].step_s * (1.0 + TIE)]

    def unusual(plan: FoundPlan) -> tuple[int, int, float]:
        alone = 0
        for block in plan.partition:
            learning = policies & problem.trained & {unit.partition(".")[0] for unit in block}
            alone += 0 if learning else sum(1 for unit in block if unit in policies - problem.trained)
        return alone, len(plan.partition), plan.step_s

    return min(near, key=unusual)


def _fits(question: Question, cluster: Cluster) -> bool:
    request = question.request
    if request.kind == "pools":
        request = replace(request, kind="auto", pools={})
    search = searcher(replace(question, cluster=cluster, request=request))
    return anything_fits(search)
