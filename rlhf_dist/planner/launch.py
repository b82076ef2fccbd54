"""Planning a launch: the question in its settings, and the answer as settings.

rlhf-dist plan ppo --cluster 16x8xH100 model.path=llama3-8b      settings -> question -> plan
rlhf-dist run ppo placement=auto                                 ... -> settings of the run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_dist.compose import Launch, compose
from rlhf_dist.config import DataConfig, RolloutConfig
from rlhf_dist.hardware import Cluster, parse_cluster
from rlhf_dist.model_specs import ModelSpec, model_spec
from rlhf_dist.placement.file import AUTO, asked_placement
from rlhf_dist.planner.asked import asked_strategies
from rlhf_dist.planner.calibration import apply_gpu, load_calibration
from rlhf_dist.planner.case import parse_request
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.planner.emit import settings_of
from rlhf_dist.planner.machine import this_machine, usual_efficiency
from rlhf_dist.planner.plan import Question, make_plan
from rlhf_dist.planner.strategy import Space
from rlhf_dist.planner.work import Problem, make_problem
from rlhf_dist.planner.workload import Lengths, Workload
from rlhf_dist.role_kinds import generation_of
from rlhf_dist.typed import ConfigError


def problem_of(launch: Launch, prompt: Lengths | None = None, response: Lengths | None = None) -> Problem:
    """What a launch computes. Lengths that are not given are taken at their limits: the plan then always fits."""
    run = launch.run
    rollouts = [generation_of(launch, role) for role in launch.dataflow.generating]
    generation = [one for one in rollouts if one is not None]
    limits: RolloutConfig | DataConfig = max(generation, key=_most_tokens, default=run.data)
    workload = Workload(
        prompts=run.data.prompts_per_step,
        samples_per_prompt=_samples(launch),
        prompt=prompt or Lengths.fixed(limits.max_prompt_tokens),
        response=response or Lengths.fixed(limits.max_response_tokens),
    )
    models: dict[str, ModelSpec | None] = {}
    for role, settings in launch.used_roles.items():
        rule = getattr(settings, "function", None) is not None or settings.model is None
        models[role] = None if rule or settings.model is None else model_spec(settings.model.path, f"{role}.model.path")
    if not any(models.values()):
        raise ConfigError("no role has a model, so there is nothing to plan")
    return make_problem(launch.dataflow, models, workload, cuts_of_graph=True)


def hardware_of(launch: Launch, cluster: Cluster | None = None) -> tuple[Cluster, Efficiency, dict[str, float]]:
    """The cluster a launch plans for (or the one given), its efficiencies, and what was measured of its GPU.

    Raises ConfigError where it cannot be known: on a cluster elsewhere that `placement.cluster` does not describe.
    """
    placement = launch.run.placement
    if cluster is None and placement.cluster is None and launch.run.ray.address is not None:
        raise ConfigError(
            f"placement=auto cannot see the GPUs of ray.address={launch.run.ray.address}; "
            f"set placement.cluster=NODESxGPUSxKIND, such as 2x8xH100"
        )
    if cluster is None:
        cluster = parse_cluster(placement.cluster, key="placement.cluster") if placement.cluster else this_machine()
    efficiency, measured = load_calibration(placement.calibration, usual_efficiency(cluster))
    return apply_gpu(cluster, measured), efficiency, measured


def compose_planned(
    spec: str, overrides: Sequence[str] = (), config: str | Sequence[Mapping[str, Any]] | None = None
) -> Launch:
    """`compose`, with `placement=auto` planned for the settings as they are without it. Raises as `compose` does, and
    ConfigError if nothing fits.
    """
    asked, left = asked_placement(overrides)
    if asked != AUTO:
        return compose(spec, overrides, config)
    return compose(spec, left, config, planned_settings(compose(spec, left, config), left))


def planned_settings(launch: Launch, overrides: Sequence[str]) -> dict[str, Any]:
    """Settings by section for `placement=auto`, keeping to what `overrides` set by hand.

    Raises ConfigError if nothing fits.
    """
    cluster, efficiency, _ = hardware_of(launch)
    problem = problem_of(launch)
    space = runnable_space(cluster)
    strategies, _ = asked_strategies(launch, overrides)
    question = Question(
        name=launch.recipe.name,
        problem=problem,
        cluster=cluster,
        efficiency=efficiency,
        space=space,
        request=parse_request({"strategies": strategies}, problem, cluster.gpus),
    )
    sections, _ = settings_of(make_plan(question, runners_up=0))
    if any(text.lstrip("+").startswith("model.dtype=") for text in overrides):  # Said by hand: it comes last.
        for section in sections.values():
            for part in ("engine", "rollout"):
                section.get(part, {}).pop("dtype", None)
    return sections


def runnable_space(cluster: Cluster) -> Space:
    """Strategies that the engines of this system have: any other would make the prediction one of another run.

    A host that is the device has nowhere to offload to.
    """
    return Space(
        offload=cluster.gpu.name != "CPU",
        plain_zero=True,
        reallocate=False,
        generation_pipeline=False,
    )


def _most_tokens(rollout: RolloutConfig) -> int:
    return rollout.max_prompt_tokens + rollout.max_response_tokens


def _samples(launch: Launch) -> int:
    counts = [int(node.kwargs.get("n", 1)) for node in launch.dataflow if node.rows == "expand"]
    return max(counts, default=1)
