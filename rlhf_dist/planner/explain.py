"""A plan for people and for programs: tables, the bottleneck in a sentence, what other hardware would bring, JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from rlhf_dist.dataflow.evaluation_graph import EvaluationGraph
from rlhf_dist.hardware import KINDS, Cluster
from rlhf_dist.planner.found import FoundPlan
from rlhf_dist.planner.memory import generation_weights, gib, resting_bytes
from rlhf_dist.planner.plan import TIE, Plan, headroom_bytes, what_if
from rlhf_dist.planner.work import NodeWork
from rlhf_dist.planner.workload import Lengths, Workload

CAUSES = {
    "compute": "matrix multiplications",
    "tp/sp": "collectives inside the layers (tensor or sequence parallel)",
    "pipeline": "pipeline bubbles and transfers",
    "zero": "gathering parameters and reducing gradients over the network",
    "optimizer": "optimizer steps",
    "offload": "loading weights from the host",
    "reallocate": "copying weights to another cut",
    "prefill": "prefill",
    "weights": "reading weights in decode steps",
    "kv": "reading keys and values in decode steps",
    "kernels": "small kernels of decode steps",
    "tp": "all-reduces of decode steps",
    "host": "the host's work between decode steps",
    "transfer": "moving weights",
    "install": "installing weights",
    "call": "starting operations",
}


BUSY = 0.995
"""Share of a step from which a pool counts as never idle."""


def memory_of(plan: Plan) -> dict[str, dict[str, float]]:
    """Node (or `POOL at rest`) -> tensor class -> bytes per GPU, everything that is on the GPU then."""
    problem, found = plan.question.problem, dict[str, dict[str, float]]()
    for name, pool in zip(plan.names, plan.best.pools, strict=True):
        rest: dict[str, float] = {"graphs": plan.question.efficiency.graphs_bytes * len(pool.generations)}
        for unit in pool.units:
            role, _, half = unit.partition(".")
            model = problem.models[role]
            if half:
                generation = pool.generations[role]
                rest["weights"] = rest.get("weights", 0.0) + generation_weights(model, generation)
                continue
            for tensors, size in resting_bytes(model, pool.holdings[role], trained=role in problem.trained).items():
                rest[tensors] = rest.get(tensors, 0.0) + size
        found[f"{name} at rest"] = {tensors: size for tensors, size in rest.items() if size}
        for work in problem.nodes:
            cost = pool.costs.get(work.name)
            if cost is None:
                continue
            active = dict(cost.memory)
            if work.phase == "generate" and f"{work.role}.rollout" in pool.units:
                active.pop("weights", None)  # They rest there.
            names = {**rest, **active}
            found[work.name] = {
                tensors: size for tensors in names if (size := rest.get(tensors, 0.0) + active.get(tensors, 0.0))
            }
    return found


def workload_text(load: Workload) -> str:
    """What a plan takes a step to be."""
    samples = f" x {load.samples_per_prompt} responses" if load.samples_per_prompt > 1 else ""
    return (
        f"{load.prompts:,} prompts{samples}, prompts of {_tokens(load.prompt)}, responses of {_tokens(load.response)}"
    )


def _tokens(lengths: Lengths) -> str:
    mean, longest = lengths.mean, lengths.longest
    return f"{mean:,.0f} tokens" if round(mean) == round(longest) else f"{mean:,.0f} tokens (at most {longest:,.0f})"


def bottleneck(plan: Plan) -> str:
    """What limits the step, in a sentence: the largest node of what is busy throughout, and what it spends its time on.

    That is a pool without a gap, where steps overlap; else the critical path of one step.
    """
    graph, _, pools = plan.timeline(1)
    on_pool: dict[int, list[str]] = {}
    loads: dict[int, float] = {}
    for name, every, where in zip(graph.names, graph.every, pools, strict=True):
        for pool in where:  # A weight sync between two pools is in both.
            on_pool.setdefault(pool, []).append(name)
            loads[pool] = loads.get(pool, 0.0) + plan.best.costs[name].seconds / every
    busiest = max(loads, key=lambda pool: loads[pool])
    if plan.question.overlap and loads[busiest] > BUSY * plan.best.step_s:
        return _largest(plan, on_pool[busiest], f"in pool {plan.names[busiest]}, which is never idle")
    return _largest(plan, _critical_path(plan), "on its critical path")


def _critical_path(plan: Plan) -> list[str]:
    """Nodes of one step that each start when the one before has ended, from the last one back."""
    graph, slots, pools = plan.timeline(1)
    by_node = {slot.node: slot for slot in slots}
    last = max(slots, key=lambda slot: slot.end_s)
    path: list[int] = []
    node: int | None = last.node
    while node is not None:
        path.append(node)
        start = by_node[node].start_s
        before = [source for source, distance in graph.before_of[node] if distance == 0]
        before += [n for n, slot in by_node.items() if n != node and set(pools[n]) & set(pools[node])]
        ready = [n for n in before if n in by_node and by_node[n].end_s <= start + 1e-12 and n not in path]
        node = max(ready, key=lambda n: by_node[n].end_s, default=None)
    return [graph.names[n] for n in path]


def _largest(plan: Plan, nodes: list[str], where: str) -> str:
    costs = {name: plan.best.costs[name] for name in nodes if name in plan.best.costs}
    name = max(costs, key=lambda one: costs[one].seconds)
    cause = max(costs[name].parts, key=lambda part: costs[name].parts[part])
    share = costs[name].parts[cause] / costs[name].seconds
    of_step = costs[name].seconds / max(plan.best.step_s, 1e-12)
    return f"{name} takes {of_step:.0%} of the step and is {where}; {share:.0%} of it is {CAUSES[cause]}"


def what_else(plan: Plan) -> list[dict[str, Any]]:
    """Seconds of the best plan with one more node, and on each other kind of GPU (same number)."""
    cluster, asked = plan.question.cluster, replace(plan.question, request=replace(plan.question.request, wanted={}))
    others: list[tuple[str, Cluster]] = [("one more node", cluster.resized(cluster.nodes + 1))]
    for kind in KINDS.values():
        if kind.name != cluster.gpu.name:
            network = kind.network_bytes_per_s * cluster.gpus_per_node / 8
            others.append((kind.name, replace(cluster, gpu=kind, network_bytes_per_s=network)))
    found = []
    for what, other in others:
        step_s = what_if(asked, other)
        found.append({"what": what, "cluster": other.text, "step_s": None if step_s is None else round(step_s, 4)})
    return found


def as_json(plan: Plan, others: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The answer as plain data; `placement` can stand in a case file as it is."""
    best, memory = plan.best, memory_of(plan)
    usable = headroom_bytes(plan.question)
    answer: dict[str, Any] = {
        "recipe": plan.question.name,
        "cluster": plan.question.cluster.text,
        "workload": _workload(plan.question.problem.workload),
        "placement": placement_of(plan, best),
        "predicted": {
            "step_s": best.step_s,
            "tokens_per_s": plan.tokens_per_s,
            "nodes": {name: cost.seconds for name, cost in _in_order(plan)},
            "node_parts": {name: {k: v for k, v in cost.parts.items() if v} for name, cost in _in_order(plan)},
            "memory_bytes_per_gpu": {name: sum(classes.values()) for name, classes in memory.items()},
            "memory_classes": memory,
            "usable_bytes_per_gpu": usable,
        },
        "evaluations": [
            {"name": one.name, "every": one.every, "when": one.when, "nodes": _asked(one)}
            for one in plan.question.evaluations
        ],
        "bottleneck": bottleneck(plan),
        "certificate": {
            "gap": plan.certificate.gap,
            "explored": plan.certificate.explored,
            "partitions": plan.certificate.partitions,
            "simulated": plan.certificate.simulated,
            "optimum_s": optimum_s(plan),
            "tie": TIE,
        },
        "search_s": plan.search_s,
        "runners_up": [
            {"placement": placement_of(plan, one), "step_s": one.step_s, "slower": one.step_s / best.step_s - 1.0}
            for one in plan.runners_up
        ],
        "ties": [{"placement": placement_of(plan, one), "step_s": one.step_s} for one in plan.ties],
    }
    if others is not None:
        answer["other_hardware"] = others
    return answer


def _workload(load: Workload) -> dict[str, Any]:
    """As a case file takes it, lengths by their mean and longest."""
    lengths = {"prompt_tokens": load.prompt, "response_tokens": load.response}
    return {
        "prompts": load.prompts,
        "samples_per_prompt": load.samples_per_prompt,
        **{name: {"mean": one.mean, "max": one.longest} for name, one in lengths.items()},
        "mini_batches": load.mini_batches,
        "epochs": load.epochs,
    }


def optimum_s(plan: Plan) -> float:
    """Seconds of the fastest plan, which may be a tie that was not taken."""
    return min(one.step_s for one in (plan.best, *plan.ties))


def placement_of(plan: Plan, found: FoundPlan) -> dict[str, Any]:
    """Pools and strategies of a plan, as a case file takes them."""
    from rlhf_dist.planner.plan import pool_name

    names = plan.names if found is plan.best else tuple(pool_name(pool.units) for pool in found.pools)
    strategies: dict[str, Any] = {}
    for work in plan.question.problem.nodes:
        strategy = strategy_of(found, work)
        if strategy is not None:
            strategies[work.name] = strategy
    return {
        "pools": {
            name: {"gpus": pool.gpus, "roles": list(pool.units)} for name, pool in zip(names, found.pools, strict=True)
        },
        "strategies": strategies,
    }


def strategy_of(found: FoundPlan, work: NodeWork) -> dict[str, Any] | None:
    """Fields of the strategy of a node that runs a model; None for weight syncs and host work."""
    for pool in found.pools:
        if work.name not in pool.costs or work.phase == "reshard":
            continue
        if work.phase == "generate":
            one = pool.generations[work.role]
            return {"tp": one.tp, "pp": one.pp, "dp": one.replicas}
        cost = pool.costs[work.name]
        held = cost.holding or pool.holdings[work.role]
        fields: dict[str, Any] = {"tp": held.tp, "sp": held.sp, "pp": held.pp, "dp": held.dp, "zero": held.zero}
        fields["offload"] = held.offload
        if work.phase == "train":
            fields["recompute"] = cost.recompute
        return fields
    return None


def _asked(one: EvaluationGraph) -> list[str]:
    """Nodes of an evaluation that run on roles."""
    return [node.name for node in one.dataflow if node.kind == "op"]


def as_table(plan: Plan, others: list[dict[str, Any]] | None = None) -> str:
    """The answer for people."""
    question, best = plan.question, plan.best
    problem, usable = question.problem, headroom_bytes(question)
    load = problem.workload
    lines = [
        f"{question.name} on {question.cluster.text} ({question.cluster.gpus} GPUs): {problem.rows:,} rows of "
        f"{load.prompt.mean:,.0f} + {load.response.mean:,.0f} tokens, {problem.tokens:,.0f} tokens a step",
        f"planned   for {workload_text(load)}; weights and activations in bfloat16",
        f"step      {_s(best.step_s)}, {plan.tokens_per_s:,.0f} tokens/s"
        + ("" if question.overlap else " (one step at a time)"),
        f"certain   gap {plan.certificate.gap:g}: {plan.certificate.partitions} partition"
        f"{'s' if plan.certificate.partitions != 1 else ''}, {plan.certificate.explored} parts of the space looked at, "
        f"{plan.certificate.simulated} plans simulated in {plan.search_s:.2f} s" + _tied(plan),
        f"limit     {bottleneck(plan)}",
        *_idle(plan),
        "",
    ]
    rows: list[tuple[str, ...]] = [("pool", "GPUs", "role", "held as", "generates as")]
    for name, pool in zip(plan.names, best.pools, strict=True):
        for unit in pool.units:
            role = unit.partition(".")[0]
            held = pool.holdings[role].text if unit in pool.holdings else ""
            generates = pool.generations[role].text if role in pool.generations else ""
            rows.append((name, str(pool.gpus), unit, held, generates))
            name = ""
    lines += [*_table(rows), ""]
    memory = memory_of(plan)
    rows = [("node", "seconds", "memory per GPU", "free", "most of it", "mostly", "how")]
    for node, cost in _in_order(plan):
        used = memory.get(node, {})
        total = sum(used.values())
        most = max(used, key=lambda tensors: used[tensors]) if used else ""
        cause = max(cost.parts, key=lambda part: cost.parts[part])
        columns = (gib(total), gib(usable - total), most) if used else ("", "", "")
        rows.append((node, _s(cost.seconds), *columns, cause, cost.note))
    lines += [*_table(rows), ""]
    if question.evaluations:
        rows = [("evaluation", "nodes, whose time is not in the step's")]
        rows += [(f"{one.name}, {one.when}", ", ".join(_asked(one))) for one in question.evaluations]
        lines += [*_table(rows), ""]
    if plan.runners_up or plan.ties:
        rows = [("other placements", "step", "slower")]
        for one in (*plan.ties, *plan.runners_up):
            what = " | ".join(f"{'+'.join(pool.units)}: {pool.gpus}" for pool in one.pools)
            rows.append((what, _s(one.step_s), _slower(one.step_s / best.step_s - 1)))
        lines += [*_table(rows), ""]
    if others:
        rows = [("other hardware", "step", "faster")]
        for other in others:
            step_s = other["step_s"]
            shown = ("does not fit", "") if step_s is None else (_s(step_s), f"{optimum_s(plan) / step_s:.2f}x")
            rows.append((f"{other['what']} ({other['cluster']})", *shown))
        lines += [*_table(rows), ""]
    return "\n".join(lines).rstrip()


def _in_order(plan: Plan) -> Iterable[tuple[str, Any]]:
    return ((w.name, plan.best.costs[w.name]) for w in plan.question.problem.nodes if w.name in plan.best.costs)


def _idle(plan: Plan) -> list[str]:
    left = plan.question.cluster.gpus - sum(pool.gpus for pool in plan.best.pools)
    return [f"idle      {left} of {plan.question.cluster.gpus} GPUs: using them would be slower"] if left else []


def _tied(plan: Plan) -> str:
    if not plan.ties:
        return ""
    most = 1.0 - min(one.step_s for one in plan.ties) / plan.best.step_s
    return f"; {len(plan.ties)} up to {most:.1%} faster, which the model cannot tell apart: this one is the usual"


def _slower(share: float) -> str:
    return f"{share:+.1%}" + (" (a tie)" if abs(share) <= TIE else "")


def _s(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.3g} s"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
