"""Predicted against measured: what a run teaches the planner.

    run ends -> medians of node seconds -> plan_report.json (predicted, measured, ratio by node)
                                        -> calibration.yaml (efficiencies refined by it)

The prediction is for the placement the run had, on the hardware it ran on, with the lengths it saw.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rlhf_dist.compose import Launch
from rlhf_dist.config import ActorConfig, PlacementConfig
from rlhf_dist.planner.calibration import calibration_text, refined
from rlhf_dist.planner.explain import as_json
from rlhf_dist.planner.launch import hardware_of, problem_of
from rlhf_dist.planner.machine import cpu_node, this_machine, usual_efficiency
from rlhf_dist.planner.plan import Question, Request, make_plan
from rlhf_dist.planner.work import Problem
from rlhf_dist.planner.workload import Lengths
from rlhf_dist.typed import ConfigError

REPORT = "plan_report.json"
CALIBRATION = "calibration.yaml"


def write_feedback(
    launch: Launch,
    folder: Path,
    node_seconds: Mapping[str, Sequence[float]],
    step_s: float,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """Write the report and the refined calibration into the run's folder; returns the report.

    A run whose placement the planner cannot price (models of an unknown kind, a cluster it cannot see) gets a
    report that says why, and no calibration: feedback never fails a run.
    """
    measured = {name: median(_settled(seconds)) for name, seconds in node_seconds.items() if seconds}
    report: dict[str, Any]
    try:
        question = question_of_run(launch, metrics)
        plan = make_plan(question, runners_up=0)
    except ConfigError as error:
        report = {"measured": {"step_s": step_s, "nodes": measured}, "not_predicted": str(error)}
    else:
        answer = as_json(plan)
        predicted = {name: cost.seconds for name, cost in plan.best.costs.items()}
        report = {
            "cluster": answer["cluster"],
            "placement": answer["placement"],
            "predicted": {"step_s": plan.best.step_s, "nodes": predicted},
            "measured": {"step_s": step_s, "nodes": measured},
            "ratio": {name: measured[name] / predicted[name] for name in predicted if name in measured},
        }
        efficiency = refined(question.efficiency, question.problem.nodes, predicted, measured)
        source = f"run {launch.run.name} of {launch.recipe.name} on {question.cluster.text}"
        text = calibration_text(efficiency, source, usual=usual_efficiency(question.cluster))
        (folder / CALIBRATION).write_text(text)
    (folder / REPORT).write_text(json.dumps(report, indent=2))
    return report


def question_of_run(launch: Launch, metrics: Mapping[str, float]) -> Question:
    """The placement a run had as a question: only what its settings leave open is searched."""
    cluster, efficiency = hardware_of(launch)
    problem = problem_of(launch, *_lengths(launch, metrics))
    placement = launch.run.placement
    devices = {pool.device for pool in placement.pools.values()}
    if devices == {"cpu"} and cluster == this_machine():
        cluster = cpu_node()
        efficiency = usual_efficiency(cluster)
    pools = _pools(placement, problem)
    slots = sum(size for _, size in pools.values())
    if slots > cluster.gpus and cluster.gpu.name == "CPU":
        # More processes than cores is how tests run; each then has a smaller share.
        share = cluster.gpus / slots
        gpu = replace(cluster.gpu, flops=cluster.gpu.flops * share, memory_bytes=cluster.gpu.memory_bytes * share)
        cluster = replace(cluster, gpus_per_node=slots, gpu=gpu)
    if slots > cluster.gpus:
        raise ConfigError(f"the placement has {slots} slots, but {cluster.text} has {cluster.gpus}")
    request = Request(kind="pools", pools=pools, wanted=_wanted(launch, problem))
    return Question(name=launch.recipe.name, problem=problem, cluster=cluster, efficiency=efficiency, request=request)


def _pools(placement: PlacementConfig, problem: Problem) -> dict[str, tuple[tuple[str, ...], int]]:
    kinds = problem.dataflow.roles
    placed: dict[str, list[str]] = {}
    for role in problem.roles:
        keys = (role, kinds[role], "default")
        name = next((placement.roles[key] for key in keys if key in placement.roles), None)
        if name is None:
            raise ConfigError(f"role {role!r} has no pool")
        placed.setdefault(name, []).append(role)
    rollout = getattr(placement, "rollout", None)
    for role in problem.roles:
        if rollout is not None and role in problem.generating & problem.trained and role not in placed.get(rollout, []):
            placed.setdefault(rollout, []).append(f"{role}.rollout")
    order = [*problem.roles, *(f"{role}.rollout" for role in problem.roles)]
    sizes = {name: pool.slots * max(getattr(pool, "nodes", 0), 1) for name, pool in placement.pools.items()}
    return {name: (tuple(sorted(units, key=order.index)), sizes[name]) for name, units in placed.items()}


def _wanted(launch: Launch, problem: Problem) -> dict[str, dict[str, Any]]:
    """What the settings fix of each node's strategy."""
    wanted: dict[str, dict[str, Any]] = {}
    for work in problem.nodes:
        settings = launch.used_roles.get(work.role)
        if settings is None:
            continue
        if work.phase == "generate" and isinstance(settings, ActorConfig):
            wanted[work.name] = {"tp": settings.rollout.tensor_parallel, "pp": 1}
        elif work.phase in ("train", "infer"):
            engine = settings.engine
            deepspeed = engine.name == "deepspeed"
            wanted[work.name] = {
                "tp": getattr(engine, "tensor_parallel", 1),
                "sp": getattr(engine, "sequence_parallel", 1) if work.role in problem.trained else 1,
                "pp": 1,
                "offload": getattr(engine, "offload", "none") != "none",
            }
            if work.role in problem.trained:
                wanted[work.name]["zero"] = getattr(engine, "zero_stage", 3) if deepspeed else 3
            if work.phase == "train":
                wanted[work.name]["recompute"] = engine.activation_checkpointing
    return wanted


def _lengths(launch: Launch, metrics: Mapping[str, float]) -> tuple[Lengths | None, Lengths | None]:
    """Mean prompt and response of the run, from its last step's metrics; None where it did not say."""
    response = next((value for name, value in metrics.items() if name.endswith("/response_tokens")), None)
    whole = next(
        (value for name, value in metrics.items()
         if name.endswith("/sequence_tokens") and name.split("/")[0] not in launch.recipe.sources),
        None,
    )  # fmt: skip
    if not response or not whole:
        return None, None
    rows = launch.run.data.prompts_per_step * max(
        (int(node.kwargs.get("n", 1)) for node in launch.dataflow if node.rows == "expand"), default=1
    )
    prompt = whole / rows - response
    return (Lengths.fixed(prompt), Lengths.fixed(response)) if prompt > 0 else (None, None)


def _settled(seconds: Iterable[float]) -> list[float]:
    """Seconds without the first step's, which warms up."""
    every = list(seconds)
    return every[1:] if len(every) > 1 else every
