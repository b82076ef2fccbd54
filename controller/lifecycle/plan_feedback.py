"""Predicted against measured: what a run teaches the planner.

    run ends -> medians of node seconds -> plan_report.json (predicted, measured, ratio by node)
                                        -> calibration.yaml (efficiencies refined by it)

The prediction is for the placement the run had, on the hardware it ran on, with the lengths it saw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from controller.lifecycle.session import pools_of_roles
from rlhf_dist.compose import Launch
from rlhf_dist.hardware import Cluster
from rlhf_dist.placement.roles import pool_size, rollout_of
from rlhf_dist.planner.calibration import calibration_text, refined
from rlhf_dist.planner.explain import as_json
from rlhf_dist.planner.launch import hardware_of, problem_of
from rlhf_dist.planner.machine import cpu_node, this_machine, usual_efficiency
from rlhf_dist.planner.plan import Question, Request, make_plan
from rlhf_dist.planner.work import Problem
from rlhf_dist.planner.workload import Lengths
from rlhf_dist.role_kinds import generation_of
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
    """Write the report and the refined calibration into the run's folder; returns the report. node_seconds: node -> of
    each step that was run.

    A run whose placement the planner cannot price (models of an unknown kind, a cluster it cannot see) gets a
    report that says why, and no calibration: feedback never fails a run.
    """
    measured = {name: median(_settled(every)) for name, every in node_seconds.items()}
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
        _, _, gpu = hardware_of(launch)  # Scales are over what was predicted with these, so they go together.
        text = calibration_text(efficiency, source, gpu, usual_efficiency(question.cluster))
        (folder / CALIBRATION).write_text(text)
    (folder / REPORT).write_text(json.dumps(report, indent=2))
    return report


def question_of_run(launch: Launch, metrics: Mapping[str, float]) -> Question:
    """The placement a run had as a question: only what its settings leave open is searched."""
    cluster, efficiency, _ = hardware_of(launch)
    problem = problem_of(launch, *_lengths(launch, metrics))
    placement = launch.run.placement
    devices = {pool.device for pool in placement.pools.values()}
    if devices == {"cpu"} and cluster == this_machine():
        cluster = cpu_node()
        efficiency = usual_efficiency(cluster)
    pools = _pools(launch, problem)
    slots = sum(size for _, size in pools.values())
    if slots > cluster.gpus and cluster.gpu.name == "CPU":
        # More processes than cores is how tests run; each then has a smaller share.
        share = cluster.gpus / slots
        gpu = replace(cluster.gpu, flops=cluster.gpu.flops * share, memory_bytes=cluster.gpu.memory_bytes * share)
        cluster = replace(cluster, gpus_per_node=slots, gpu=gpu)
    if slots > cluster.gpus:
        raise ConfigError(f"the placement has {slots} slots, but {cluster.text} has {cluster.gpus}")
    request = Request(kind="pools", pools=pools, wanted=_wanted(launch, problem, cluster))
    return Question(name=launch.recipe.name, problem=problem, cluster=cluster, efficiency=efficiency, request=request)


def _pools(launch: Launch, problem: Problem) -> dict[str, tuple[tuple[str, ...], int]]:
    placement, order = launch.run.placement, [*problem.roles, *map(rollout_of, problem.roles)]
    placed: dict[str, list[str]] = {}
    for unit, name in pools_of_roles(launch).items():
        if unit in order:
            placed.setdefault(name, []).append(unit)
    return {name: (tuple(sorted(units, key=order.index)), pool_size(placement, name)) for name, units in placed.items()}


def _wanted(launch: Launch, problem: Problem, cluster: Cluster) -> dict[str, dict[str, Any]]:
    """What the settings fix of each node's strategy."""
    wanted: dict[str, dict[str, Any]] = {}
    for work in problem.nodes:
        settings = launch.used_roles.get(work.role)
        if settings is None:
            continue
        rollout = generation_of(launch, work.role)
        if work.phase == "generate" and rollout is not None:
            wanted[work.name] = {"tp": rollout.tensor_parallel, "pp": 1}
        elif work.phase in ("train", "infer"):
            engine = settings.engine
            wanted[work.name] = {
                "tp": engine.tensor_parallel,
                "sp": engine.sequence_parallel if work.role in problem.trained else 1,
                "pp": 1,
                "offload": engine.offload != "none" and cluster.gpu.name != "CPU",
            }
            if work.role in problem.trained:
                wanted[work.name]["zero"] = engine.zero_stage
            else:
                wanted[work.name]["zero"] = 0 if engine.replicas > 1 else 3
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


def _settled(seconds: Sequence[float]) -> Sequence[float]:
    """Seconds without the first step's, which warms up."""
    return seconds[1:] if len(seconds) > 1 else seconds
