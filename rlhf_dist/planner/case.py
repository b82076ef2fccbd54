"""A case file: the whole question in one YAML, no model files needed.

    recipe: ppo
    cluster: 16x8xA100-80G
    models: {actor: llama2-13b, critic: llama2-13b, reference: llama2-13b, reward: llama2-13b}
    workload: {prompts: 1024, samples_per_prompt: 1, prompt_tokens: 1024, response_tokens: 1024,
               mini_batches: 8, epochs: 1}
    placement: auto

`placement` is `auto`, a preset (colocate, split, standalone, async), or pools, which are then priced:

    placement:
      pools:
        policy: {gpus: 64, roles: [actor, reference]}
        values: {gpus: 64, roles: [critic, reward]}
      strategies:                                # of a node, a role's phase or a role; what is left out is searched
        actor.update_actor: {tp: 8, pp: 1, zero: 1}
        actor.generate: {tp: 4}
        critic: {tp: 8}

Further keys, none needed: `staleness` (with `async` or a pool of `actor.rollout`), `overlap` (whether a step may
start before the one before has ended; false, because published step times are of one step at a time),
`pipeline` (pp sizes the search may use), `gpus` (kinds of your own), `calibration` (a file of `rlhf-dist profile`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rlhf_dist.dataflow.graph import Dataflow
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.hardware import parse_cluster
from rlhf_dist.model_specs import ModelSpec, model_spec
from rlhf_dist.planner.calibration import apply_gpu, load_calibration
from rlhf_dist.planner.plan import PRESETS, Question, Request
from rlhf_dist.planner.strategy import Space
from rlhf_dist.planner.work import RULES, Problem, make_problem
from rlhf_dist.planner.workload import Workload, parse_workload
from rlhf_dist.recipe_files import load_recipe
from rlhf_dist.typed import ConfigError, unknown

NEEDED = ("recipe", "cluster", "models", "workload")
KEYS = (*NEEDED, "placement", "staleness", "overlap", "pipeline", "gpus", "calibration", "name")
FIELDS = {
    "tp": "tp", "tensor_parallel": "tp", "sp": "sp", "sequence_parallel": "sp", "pp": "pp", "pipeline_parallel": "pp",
    "dp": "dp", "data_parallel": "dp", "replicas": "dp", "zero": "zero", "zero_stage": "zero", "offload": "offload",
    "recompute": "recompute", "activation_checkpointing": "recompute",
}  # fmt: skip
"""Names of a strategy's fields, ours and those of the engines' settings."""
PHASES = {
    "train": "train", "training": "train", "update": "train", "infer": "infer", "inference": "infer",
    "generate": "generate", "generation": "generate", "rollout": "generate",
}  # fmt: skip


def read_case(path: str | Path) -> Question:
    """The question in a case file. Raises ConfigError for a file that cannot be read or a case that cannot be."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"--case: no file {str(path)!r} (looked for {file.resolve()})")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--case: {file} is not YAML: {' '.join(str(error).split())}") from error
    return parse_case(content)


def parse_case(content: Any) -> Question:
    """The question in a case's content. Raises ConfigError naming the key that is wrong or missing."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"a case is a mapping with {', '.join(NEEDED)} and placement, got {content!r}")
    for key in content:
        if key not in KEYS:
            raise ConfigError(unknown(str(key), KEYS, "key of a case:"))
    for key in NEEDED:
        if content.get(key) is None:
            raise ConfigError(f"a case needs {key!r}; it must have {', '.join(NEEDED)}")
    for key, kind, what in (("calibration", str, "a file's path"), ("gpus", Mapping, "kinds of GPU by name")):
        if content.get(key) is not None and not isinstance(content[key], kind):
            raise ConfigError(f"{key} must be {what}, got {content[key]!r}")
    efficiency, measured = load_calibration(content.get("calibration"))
    cluster = apply_gpu(parse_cluster(content["cluster"], content.get("gpus")), measured)
    workload = parse_workload(content["workload"])
    recipe = load_recipe(str(content["recipe"]))
    placement = content.get("placement", "auto")
    staleness = content.get("staleness", 1 if placement == "async" else 0)
    if isinstance(staleness, bool) or not isinstance(staleness, int) or staleness < 0:
        raise ConfigError(f"staleness must be a whole number of at least 0, got {staleness!r}")
    problem = _problem(recipe, content["models"], workload, staleness)
    overlap = content.get("overlap", staleness > 0)
    if not isinstance(overlap, bool):
        raise ConfigError(f"overlap must be true or false, got {overlap!r}")
    if staleness and not overlap:
        raise ConfigError("staleness above 0 lets steps overlap; set overlap: true, or staleness: 0")
    preset = placement.get("preset") if isinstance(placement, Mapping) else placement
    if staleness and preset in ("colocate", "split"):
        raise ConfigError(
            f"staleness = {staleness} needs generation in a pool of its own, and {preset} puts it with the actor; "
            f"use placement: async, standalone, auto, or pools"
        )
    return Question(
        name=recipe.name,
        problem=problem,
        cluster=cluster,
        efficiency=efficiency,
        space=Space(pipeline=_pipeline(content.get("pipeline", [1]))),
        request=parse_request(placement, problem, cluster.gpus),
        overlap=overlap,
    )


def _problem(recipe: Recipe, models: Any, workload: Workload, staleness: int) -> Problem:
    dataflow, workload = _traced(recipe, workload)
    return make_problem(replace(dataflow, staleness=staleness), parse_models(models, dataflow), workload)


def _traced(recipe: Recipe, workload: Workload) -> tuple[Dataflow, Workload]:
    """The graph with the workload's numbers where the recipe has settings for them."""
    config: Any = None
    known: set[str] = set()
    if recipe.config is not None and is_dataclass(recipe.config):
        known = {item.name for item in fields(recipe.config)}
        wanted = {
            name: getattr(workload, name) for name in ("samples_per_prompt", "mini_batches", "epochs") if name in known
        }
        try:
            config = recipe.config(**wanted)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"workload: recipe {recipe.name}: {error}") from error
    if "samples_per_prompt" not in known and workload.samples_per_prompt > 1:
        # A recipe that takes one response to a prompt sees each prompt several times instead.
        workload = replace(workload, prompts=workload.rows, samples_per_prompt=1)
    return trace(recipe, config), workload


def parse_models(models: Any, dataflow: Dataflow) -> dict[str, ModelSpec | None]:
    """Role -> shape for the roles a graph uses. `default` stands for all not named; a rule reward has none.

    Raises ConfigError for a role that does not exist or has no model.
    """
    if isinstance(models, str):
        models = {"default": models}
    if not isinstance(models, Mapping):
        raise ConfigError(f"models must map roles to models, such as {{actor: llama2-13b}}, got {models!r}")
    aside = {node.role for node in dataflow if node.kind == "source"} | {"host", "controller"}
    aside |= {name for name in dataflow.roles if any(f"{name}.state" in node.weights_read for node in dataflow)}
    roles = [role for role in dataflow.roles if role not in aside]
    for role in models:
        if role != "default" and role not in roles:
            raise ConfigError(f"models: {unknown(str(role), roles, 'role')}")
    found: dict[str, ModelSpec | None] = {}
    for role in roles:
        if role not in dataflow.used_roles:
            continue
        value = models.get(role, models.get("default"))
        if value is None and role not in models:
            if dataflow.bases.get(role) in ("Reward", "Function"):
                found[role] = None  # A rule.
                continue
            raise ConfigError(f"models.{role} has no value and needs one; set it to a model (or set models.default)")
        rule = value is None or (isinstance(value, str) and value.lower() in RULES)
        found[role] = None if rule else model_spec(value, f"models.{role}")
    return found


def _pipeline(value: Any) -> tuple[int, ...]:
    sizes = value if isinstance(value, list) else [value]
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes):
        raise ConfigError(f"pipeline must be a list of stages, such as [1, 2, 4, 8], got {value!r}")
    return tuple(sorted(set(sizes)))


# --- placements --------------------------------------------------------------------------------------------
def parse_request(value: Any, problem: Problem, gpus: int) -> Request:
    """What `placement` asks for. Raises ConfigError for a preset, pool, role or strategy that cannot be."""
    if isinstance(value, str):
        if value not in ("auto", *PRESETS):
            raise ConfigError(unknown(value, ("auto", *PRESETS), "placement"))
        return Request(kind=value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"placement must be auto, {', '.join(PRESETS)} or pools, got {value!r}")
    for key in value:
        if key not in ("pools", "roles", "strategies", "nodes", "preset", "rollout"):
            raise ConfigError(f"placement: {unknown(str(key), ('pools', 'roles', 'strategies', 'preset'), 'key')}")
    strategies = _mapping(value.get("strategies") or value.get("nodes"), "placement.strategies")
    if "pools" not in value:
        preset = value.get("preset", "auto")
        if preset not in ("auto", *PRESETS):
            raise ConfigError(f"placement.preset: {unknown(str(preset), ('auto', *PRESETS), 'placement')}")
        return Request(kind=preset, wanted=_wanted(strategies, problem))
    if "preset" in value:
        raise ConfigError("placement has a preset and pools; keep one of them")
    pools = _pools(value, problem, gpus, strategies)
    return Request(kind="pools", pools=pools, wanted=_wanted(strategies, problem))


def _pools(
    value: Mapping[str, Any], problem: Problem, gpus: int, strategies: dict[str, Any]
) -> dict[str, tuple[tuple[str, ...], int]]:
    if not isinstance(value["pools"], Mapping) or not value["pools"]:
        raise ConfigError(f"placement.pools must map pools to {{gpus, roles}}, got {value['pools']!r}")
    units = (*problem.roles, *(f"{role}.rollout" for role in problem.roles if role in problem.generating))
    of_pool: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for name, pool in value["pools"].items():
        key = f"placement.pools.{name}"
        if not isinstance(pool, Mapping):
            raise ConfigError(f"{key} must be {{gpus: N, roles: [...]}}, got {pool!r}")
        for field in pool:
            if field not in ("gpus", "slots", "roles", "strategies", "nodes"):
                raise ConfigError(f"{key}: {unknown(str(field), ('gpus', 'roles', 'strategies'), 'key')}")
        size = pool.get("gpus", pool.get("slots"))
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{key}.gpus must be a whole number of at least 1, got {size!r}")
        sizes[str(name)] = size
        roles = pool.get("roles", [])
        if not isinstance(roles, (Mapping, list, tuple)):
            raise ConfigError(f"{key}.roles must be a list of roles such as [actor, reference], got {roles!r}")
        if isinstance(roles, Mapping):  # {role: {phase or node: strategy}}
            for role, given in roles.items():
                strategies |= _nested(str(role), given, key)
        of_pool[str(name)] = [str(role) for role in roles]
        strategies |= _mapping(pool.get("strategies") or pool.get("nodes"), f"{key}.strategies")
    for role, name in {**_mapping(value.get("roles"), "placement.roles"), **_rollout(value, problem)}.items():
        if name not in of_pool:
            raise ConfigError(f"placement.roles.{role}: {unknown(str(name), of_pool, 'pool')}")
        targets = (
            [unit for unit in problem.roles if unit not in sum(of_pool.values(), [])] if role == "default" else [role]
        )
        of_pool[name] += targets
    placed = sum(of_pool.values(), [])
    for role in placed:
        if role not in units:
            if role in problem.dataflow.roles:
                raise ConfigError(f"placement: {role!r} runs no model here, so it takes no GPU; leave it out")
            raise ConfigError(f"placement.pools: {unknown(role, units, 'role')}")
        if placed.count(role) > 1:
            raise ConfigError(f"placement: role {role!r} is in more than one pool; leave it in one")
    missing = [role for role in problem.roles if role not in placed]
    if missing:
        raise ConfigError(f"placement: {', '.join(missing)} is in no pool; add it to the roles of one")
    for role in problem.roles:
        if problem.staleness and role in problem.generating & problem.trained and f"{role}.rollout" not in placed:
            raise ConfigError(
                f"staleness = {problem.staleness} needs generation in a pool of its own; put {role}.rollout in a pool"
            )
    if sum(sizes.values()) > gpus:
        each = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(f"placement.pools need {sum(sizes.values())} GPUs ({each}), but the cluster has {gpus}")
    order = [*units]
    return {name: (tuple(sorted(roles, key=order.index)), sizes[name]) for name, roles in of_pool.items() if roles}


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be a mapping, got {value!r}")
    return dict(value or {})


def _rollout(value: Mapping[str, Any], problem: Problem) -> dict[str, Any]:
    pool = value.get("rollout")
    return {f"{role}.rollout": pool for role in problem.generating & problem.trained} if pool else {}


def _nested(role: str, given: Any, key: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key}.roles.{role} must map phases to strategies, got {given!r}")
    if all(str(name) in FIELDS for name in given):
        return {role: given} if given else {}
    return {f"{role}.{name}": strategy for name, strategy in given.items()}


def _wanted(strategies: Mapping[str, Any], problem: Problem) -> dict[str, dict[str, Any]]:
    """Strategies by node: a key may be a node, `role.phase` or a role; the more exact one wins."""
    found: dict[str, dict[str, Any]] = {}
    computing = [work for work in problem.nodes if work.phase in ("train", "infer", "generate")]
    exact: list[tuple[int, str, dict[str, Any]]] = []
    for key, given in strategies.items():
        fields_of = _fields(given, f"placement.strategies.{key}")
        role, _, phase = str(key).partition(".")
        named = [work.name for work in computing if work.name == key]
        phased = [work.name for work in computing if work.role == role and PHASES.get(phase) == work.phase]
        # A role's strategy is how it is held; how it generates is said apart.
        whole = [work.name for work in computing if work.role == key and work.phase != "generate"]
        if any(work.phase == "generate" for work in computing if work.name in (*named, *phased)):
            _check_generation(fields_of, f"placement.strategies.{key}")
        if named:
            exact += [(2, name, fields_of) for name in named]
        elif phased:
            exact += [(1, name, fields_of) for name in phased]
        elif whole:
            exact += [(0, name, fields_of) for name in whole]
        else:
            valid = [*(work.name for work in computing), *problem.roles]
            raise ConfigError(f"placement.strategies: {unknown(str(key), valid, 'node')}")
    for _, name, given in sorted(exact, key=lambda one: one[0]):
        found[name] = {**found.get(name, {}), **given}
    return found


def _check_generation(fields_of: Mapping[str, Any], key: str) -> None:
    for name, value in fields_of.items():
        if name not in ("tp", "pp", "dp") and value not in (False, 0, 1):
            raise ConfigError(f"{key}: generation has tp, pp and dp (replicas), got {name}: {value}; leave it out")


def _fields(given: Any, key: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key} must be a mapping such as {{tp: 8, zero: 1}}, got {given!r}")
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in FIELDS:
            raise ConfigError(f"{key}: {unknown(str(name), FIELDS, 'field')}")
        field = FIELDS[name]
        if field in ("offload", "recompute"):
            if not isinstance(value, bool):
                raise ConfigError(f"{key}.{name} must be true or false, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < (0 if field == "zero" else 1):
            raise ConfigError(f"{key}.{name} must be a whole number, got {value!r}")
        if field == "zero" and value > 3:
            raise ConfigError(f"{key}.{name} must be 0, 1, 2 or 3, got {value}")
        found[field] = value
    return found
