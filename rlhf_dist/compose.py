"""From a recipe's name and `key=value` overrides to frozen settings and a traced graph.

    conf/ model task placement ─┬─> Hydra ─> --config FILE ─> overrides ─> dataclasses ─> trace ─> Launch
    a YAML beside the recipe   ─┘   schema: RunConfig + algorithm + one section per role parameter,
                                    with all defaults, made from the recipe's signature

Two shared sections keep the files short: `model` (path, dtype), which every role's model follows unless
it is set itself, and `task` (the reward that belongs to the data). Hydra composes files and config
groups; it writes no folders and sets up no logging. Types are applied by `rlhf_dist/typed.py`, since
Hydra's own structured configs cannot be frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_dist import typed
from rlhf_dist.addresses import is_address, is_hub_name, local_data, local_model
from rlhf_dist.auto_settings import settle
from rlhf_dist.config import (
    MISSING,
    PathText,
    RewardConfig,
    RunConfig,
    SourceConfig,
)
from rlhf_dist.dataflow.evaluation_graph import EvaluationGraph
from rlhf_dist.dataflow.graph import Dataflow
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.held_out import evaluation_graphs
from rlhf_dist.machine import Machine, local_machine
from rlhf_dist.machine_settings import Choice
from rlhf_dist.overrides import apply_setting, check_key, first_line, read_overrides
from rlhf_dist.placement.file import AUTO, apply_placement, asked_placement, read_placement
from rlhf_dist.placement.roles import pool_of_roles
from rlhf_dist.recipe_files import (
    family_of,
    file_of,
    list_recipes,
    load_recipe,
    parse_spec,
    split_variant,
    variant_settings,
)
from rlhf_dist.role_kinds import RoleConfig, kind_of
from rlhf_dist.roles import Reward, base_of
from rlhf_dist.secret_settings import check_addresses
from rlhf_dist.settings_file import (
    USERS_GROUPS,
    groups_of_ours,
    read_layers,
    read_primary,
    read_settings,
    unless_followed,
    without,
)
from rlhf_dist.typed import ConfigError

PRIMARY = "rlhf_dist_primary"
"""Name under which Hydra finds the recipe's own YAML."""


@dataclass(frozen=True, kw_only=True)
class SharedModel:
    """The model every role starts from, unless its own section says otherwise."""

    path: PathText = MISSING
    """Folder with config.json, weights and tokenizer."""
    dtype: str = "auto"
    """`float32` or `bfloat16`, for training engines and generation; `auto`: what the machine is fast in."""


@dataclass(frozen=True, kw_only=True)
class SharedTask:
    """What belongs to the data."""

    reward: str | None = None
    """Function that scores a response: `package.module:name`, `file.py:name` or a name in the recipe's file."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """All that a run is made of."""

    recipe: Recipe
    run: RunConfig
    algorithm: Any
    """Instance of the recipe's own dataclass; None if it has none."""
    roles: Mapping[str, RoleConfig]
    dataflow: Dataflow
    yaml: str
    """The resolved settings, for people and for the run's folder."""
    epoch_rows: int = 0
    """Rows of an epoch, where `data.epochs` has set the steps (`data/of_launch.py`); else 0."""
    machine: Machine | None = None
    """What it runs on, as far as that is known."""
    auto: frozenset[str] = frozenset()
    """Settings that were left to the machine and have its values here (`auto_settings.py`)."""
    choices: tuple[Choice, ...] = ()
    """What those that matter became, and why."""

    def source(self, name: str) -> SourceConfig:
        """Where the rows of a source parameter come from, and of which kind they are."""
        config = self.run.data.sources.get(name, self.run.data.train)
        kind: Any = self.recipe.sources[name]
        return replace(config, rows=kind.rows_kind) if hasattr(kind, "rows_kind") else config

    def source_key(self, name: str) -> str:
        """The section of that in the settings."""
        return f"data.sources.{name}" if name in self.run.data.sources else "data.train"

    def source_rows(self, name: str) -> int:
        """Rows of a step (pairs, for preferences)."""
        return self.source(name).rows_per_step or self.run.data.prompts_per_step

    @property
    def used_roles(self) -> dict[str, RoleConfig]:
        """Roles that the dataflow uses, with their settings; only these are started and need a model."""
        return {role: settings for role, settings in self.roles.items() if role in self.dataflow.used_roles}

    @property
    def learning_roles(self) -> list[str]:
        """Roles whose weights some node of the graph writes or keeps: those of a checkpoint."""
        written = {state.split(".")[0] for node in self.dataflow for state in node.weights_written}
        return [role for role in self.used_roles if role in written]

    @property
    def placed(self) -> dict[str, str]:
        """Role -> pool, and `ROLE.rollout` where that is another one. Raises ConfigError as `pool_of_roles`."""
        return pool_of_roles(self.run.placement, self.roles, self.recipe.roles, self.dataflow.facts)


def compose(
    spec: str,
    overrides: Sequence[str] = (),
    config: str | Sequence[Mapping[str, Any]] | None = None,
    plan: Mapping[str, Any] | None = None,
) -> Launch:
    """Settings and graph of recipe `spec` (a name, or `path/to/mine.py[:name]`) with `key=value` overrides.

    config: a YAML file of settings that come before the overrides, such as the config.yaml of an earlier run; or
    mappings of settings, each of which decides over those before it.
    plan: sections of settings that a planner found; `placement=FILE.yaml` takes them from a file (`rlhf-dist plan
    --format yaml`), `placement=auto` is for `compose_planned` (`planner/launch.py`).
    What is left to the machine is what this one has.
    Raises ConfigError for a setting that cannot be right, GraphError for a recipe that cannot run.
    """
    asked, overrides = asked_placement(overrides)
    if asked == AUTO:
        raise ConfigError("placement=auto is planned before settings are composed: call planner.launch.compose_planned")
    return _launch(spec, overrides, (plan or {}) if asked is None else read_placement(asked), config)


def _launch(
    spec: str,
    overrides: Sequence[str],
    planned: Mapping[str, Any],
    config: str | Sequence[Mapping[str, Any]] | None,
) -> Launch:
    recipe = load_recipe(spec)
    root = _root(recipe)
    composed = _compose(spec, recipe, root, overrides, planned, config)
    algorithm = _algorithm(recipe, composed)
    if OmegaConf.select(composed, "data.heldout") is None:  # then nobody needs what only its evaluation asks
        recipe = replace(recipe, evaluation=None)
    dataflow = trace(recipe, algorithm)
    settings = _build(root, composed, recipe.roles.keys() - dataflow.used_roles)
    _check_rows(recipe, settings)
    recipe = replace(recipe, reads=_reward_columns(recipe, settings))
    dataflow = trace(recipe, algorithm) if recipe.reads else dataflow
    run = RunConfig(**{item.name: getattr(settings, item.name) for item in fields(RunConfig)})
    launch = Launch(
        recipe=recipe,
        run=run,
        algorithm=algorithm,
        roles={name: getattr(settings, name) for name in recipe.roles},
        dataflow=replace(dataflow, staleness=max(run.placement.max_staleness, 0)),
        yaml=OmegaConf.to_yaml(composed, resolve=True),
    )
    return settle(launch, local_machine())


def compose_dataflow(spec: str, overrides: Sequence[str] = (), config: str | None = None) -> Dataflow:
    """The graph of a step alone: only the algorithm section is built, so no model and no data need to be chosen.

    Raises as `compose` does.
    """
    return compose_graphs(spec, overrides, config)[0]


def compose_graphs(
    spec: str, overrides: Sequence[str] = (), config: str | None = None
) -> tuple[Dataflow, tuple[EvaluationGraph, ...]]:
    """The graph of a step, and those that held-out rows are evaluated with: the recipe's own, whether there are such
    rows or not, and what is made of the recipe where there are. Needs and raises as little as `compose_dataflow`."""
    _, overrides = asked_placement(overrides)
    recipe = load_recipe(spec)
    composed = _compose(spec, recipe, _root(recipe), overrides, {}, config)
    staleness = OmegaConf.select(composed, "placement.max_staleness", default=0)
    algorithm = _algorithm(recipe, composed)
    dataflow = replace(trace(recipe, algorithm), staleness=max(int(staleness or 0), 0))
    rows = OmegaConf.select(composed, "data.heldout") is not None
    if not rows and recipe.evaluation is None:
        return dataflow, ()
    every = int(OmegaConf.select(composed, "output.evaluate_every") or 0)
    beside = bool(OmegaConf.select(composed, "output.evaluate_beside"))
    return dataflow, evaluation_graphs(recipe, dataflow, algorithm, every=every, rows=rows, beside=beside)


def root_type(recipe: Recipe) -> type:
    """The dataclass of all settings of a recipe, for showing them."""
    return _root(recipe)


def option_names(group: str, spec: str = "") -> list[str]:
    """Options of a config group: ours, and those in a folder of that name beside the user's recipe."""
    file = parse_spec(spec)
    folders = [_conf(), *([file.path.parent] if file else [])]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


# --- the schema of a recipe ------------------------------------------------------------------------------
def _root(recipe: Recipe) -> type:
    sections: list[tuple[str, Any, Any]] = [
        ("model", SharedModel | None, field(default=None)),
        ("task", SharedTask, field(default_factory=SharedTask)),
    ]
    if recipe.config:
        sections.append(("algorithm", recipe.config, field(default_factory=recipe.config)))
    taken = {item.name for item in fields(RunConfig)} | {"model", "task", "algorithm"}
    for name, interface in recipe.roles.items():
        if name in taken:
            raise ConfigError(f"recipe {recipe.name}: a role cannot be called {name!r}; settings have a section of it")
        try:
            kind_of(interface)
        except ConfigError as error:
            raise ConfigError(f"recipe {recipe.name}: role {name!r}: {error}") from error
        settings: type = cast(Any, interface).settings
        sections.append((name, settings, field(default_factory=settings)))
    return make_dataclass(f"{recipe.name}_settings", sections, bases=(RunConfig,), frozen=True, kw_only=True)


def _schema(recipe: Recipe, root: type) -> dict[str, Any]:
    """Every key with its default; roles follow the shared sections, the source gives what the recipe takes."""
    schema = typed.plain(root)
    schema["model"] = typed.plain(SharedModel)
    kinds = {kind.rows_kind for kind in recipe.sources.values() if hasattr(kind, "rows_kind")}
    if len(kinds) == 1:
        schema["data"]["train"]["rows"] = kinds.pop()
    for name in recipe.roles:
        section = schema[name]
        if "engine" in section:
            section["engine"]["dtype"] = "${model.dtype}"
        if base_of(recipe.roles[name]) is Reward:
            section["function"] = "${task.reward}"
        elif "model" in section:
            section["model"]["path"] = "${model.path}"
        if "rollout" in section:
            section["rollout"] |= {"dtype": "${model.dtype}", "max_prompt_tokens": "${data.max_prompt_tokens}"}
            section["rollout"] |= {"kv_cache_bytes": None, "gpu_memory_share": None}  # the machine says
    return schema


def _algorithm(recipe: Recipe, composed: DictConfig) -> Any:
    if recipe.config is None:
        return None
    return typed.build(recipe.config, _resolved(composed, "algorithm"), "algorithm")


def _build(root: type, composed: DictConfig, unused_roles: Set[str]) -> Any:
    unset = {MISSING, "${model.path}"} if OmegaConf.is_missing(composed.model, "path") else {MISSING}
    plain: Any = OmegaConf.to_container(composed, resolve=False)
    for role in unused_roles:
        if (plain[role].get("model") or {}).get("path") in unset:
            OmegaConf.update(composed, f"{role}.model.path", "")  # Never started: it needs no model.
    followed = "${model.path}" in _leaves(OmegaConf.to_container(composed, resolve=False))
    if followed and OmegaConf.is_missing(composed.model, "path"):
        choices = ", ".join(f"model={name}" for name in option_names("model") if name != "none")
        raise ConfigError(f"model.path has no value and needs one; set model.path=FOLDER, or choose {choices}")
    settings = _resolved(composed)
    if not followed:
        settings["model"] = None  # Every role has a model of its own, so the shared one may be missing.
    check_addresses(settings)
    _fetch(settings, composed, unused_roles)
    return typed.build(root, settings)


def _fetch(settings: dict[str, Any], composed: DictConfig, unused_roles: Set[str]) -> None:
    """Put paths of this machine in place of models and data of a hub, or of another file system; and into what is kept
    of the settings which revision that was."""
    pinned: dict[str, str] = {}
    for role, section in settings.items():
        model: Any = section.get("model") if isinstance(section, dict) else None
        path = model.get("path") if isinstance(model, dict) and role not in unused_roles else None
        if not isinstance(path, str) or not (is_address(path) or is_hub_name(path)):
            continue
        model["path"], pinned[path] = local_model(path, f"{role}.model.path")
        OmegaConf.update(composed, f"{role}.model.path", pinned[path])
    shared = settings.get("model")
    if isinstance(shared, dict) and shared.get("path") in pinned:
        OmegaConf.update(composed, "model.path", pinned[shared["path"]])
        shared["path"] = local_model(pinned[shared["path"]], "model.path")[0]
    data = settings["data"]  # what is of another form here, `typed.build` says
    for key, source in _sources(data) if isinstance(data, dict) else ():
        if isinstance(source.get("path"), str) and is_address(source["path"]):
            source["path"], pinned_rows = local_data(source["path"], f"{key}.path")
            OmegaConf.update(composed, f"{key}.path", pinned_rows)


def _sources(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every section that says where rows come from, by its key."""
    sources = data.get("sources")
    named = {f"data.sources.{name}": one for name, one in sources.items()} if isinstance(sources, dict) else {}
    for key, source in {"data.train": data.get("train"), "data.heldout": data.get("heldout"), **named}.items():
        if isinstance(source, dict):
            yield key, source
            mix = source.get("mix")
            parts = mix.items() if isinstance(mix, dict) else ()
            yield from ((f"{key}.mix.{name}", part) for name, part in parts if isinstance(part, dict))


def _resolved(composed: DictConfig, section: str = "") -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(composed[section] if section else composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'settings'}: {first_line(error)}") from error
    assert isinstance(plain, dict), f"{section or 'the root'} is a mapping in the schema"
    return {str(name): value for name, value in plain.items()}


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in _leaves(entry)]
    return [value]


def _check_rows(recipe: Recipe, settings: Any) -> None:
    """Raise ConfigError unless every source parameter has rows of its kind."""
    data = settings.data
    for name in data.sources:
        if name not in recipe.sources:
            raise ConfigError(
                typed.unknown(f"data.sources.{name}", [f"data.sources.{n}" for n in recipe.sources], "key")
            )
    kinds = {name: getattr(kind, "rows_kind", data.train.rows) for name, kind in recipe.sources.items()}
    sharing = [name for name in kinds if name not in data.sources]
    if len({kinds[name] for name in sharing}) > 1:
        listed = " and ".join(f"{recipe.sources[name].__name__} as {name!r}" for name in sharing)
        raise ConfigError(
            f"recipe {recipe.name} takes {listed}, which data.train cannot both be; give all but one a section, e.g. "
            f"data.sources.{sharing[-1]}.path=FILE"
        )
    for name, wanted in kinds.items():
        key = f"data.sources.{name}" if name in data.sources else "data.train"
        section = data.sources.get(name, data.train)
        if section.rows_per_step < 0:
            raise ConfigError(f"{key}.rows_per_step must be >= 0, got {section.rows_per_step}")
        got = section.rows
        # A section that says nothing has the usual kind, unless the recipe takes one kind only (`_schema`).
        said = got != SourceConfig().rows or (name in sharing and len(set(kinds.values())) == 1)
        if said and got != wanted:
            raise ConfigError(
                f"{key}.rows must be {wanted}, because recipe {recipe.name} takes {recipe.sources[name].__name__} as "
                f"{name!r}; got {got!r}; leave it unset"
            )


def _reward_columns(recipe: Recipe, settings: Any) -> dict[str, tuple[str, ...]]:
    """Role -> columns its reward function names; nothing where it cannot be loaded, which `check_launch` explains."""
    from rlhf_dist.rewards.load import load_function
    from rlhf_dist.rewards.signature import signature_of

    found = {}
    for role in recipe.roles:
        section = getattr(settings, role)
        spec = section.function if isinstance(section, RewardConfig) else None
        if spec is not None:
            with suppress(Exception):
                found[role] = signature_of(load_function(spec, recipe.file)).named
    return found


# --- Hydra -----------------------------------------------------------------------------------------------
def _compose(
    spec: str,
    recipe: Recipe,
    root: type,
    overrides: Sequence[str],
    planned: Mapping[str, Any],
    config: str | Sequence[Mapping[str, Any]] | None,
) -> DictConfig:
    """Files, groups, a variant's settings, the --config file or mappings, a plan and overrides, in this order; `${...}`
    not yet resolved."""
    keys = typed.keys(root)

    def options(group: str) -> list[str]:
        return option_names(group, spec)

    usual, varied = read_layers([variant_settings(spec)], keys, options)
    groups, values = read_overrides(overrides, keys, options)
    if isinstance(config, str):
        chosen, settings = read_settings(config, keys, options)
    else:
        chosen, settings = read_layers(config or (), keys, options)
    groups_there = {**usual, **chosen, **groups}
    composed = _compose_files(spec, recipe, _schema(recipe, root), keys, groups_there)
    for setting in without(varied, {**chosen, **groups}):
        apply_setting(composed, setting)
    raw: Any = OmegaConf.to_container(composed, resolve=False)
    # First what only repeats what it follows, then what the command line decides: the first needs what is followed.
    settings = unless_followed(settings, raw)
    for setting in without(settings, {**groups, **({"placement": "planned"} if planned else {})}):
        apply_setting(composed, setting)
    apply_placement(composed, planned, lambda key: check_key(key, keys))
    for setting in values:
        apply_setting(composed, setting)
    return composed


def _conf() -> Path:
    return Path(__file__).parent / "conf"


def _compose_files(
    spec: str, recipe: Recipe, schema: dict[str, Any], keys: Mapping[str, Any], groups: Mapping[str, str]
) -> DictConfig:
    """The primary config of the recipe `spec` with its groups, not yet resolved."""
    file = file_of(spec)
    usual = USERS_GROUPS if family_of(file) is None else groups_of_ours(recipe)
    primary = read_primary(file.with_suffix(".yaml"), keys, usual)
    primary.setdefault("name", file.stem)
    if (variant := split_variant(spec)[1]) is not None:
        primary["name"] = f"{primary['name']}_{variant}"
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    store.store(name=PRIMARY, node=primary)
    chosen = [f"{group}={option}" for group, option in groups.items()]
    with ExitStack() as stack:
        GlobalHydra.instance().clear()
        stack.enter_context(initialize_config_dir(str(file.parent), version_base="1.3"))
        stack.callback(GlobalHydra.instance().clear)
        try:
            composed = hydra_compose(PRIMARY, overrides=[f"hydra.searchpath=[file://{_conf()}]", *chosen])
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_hydra_message(error)) from error
    OmegaConf.set_struct(composed, False)
    return composed


def _hydra_message(error: Exception) -> str:
    cause: BaseException = error
    while isinstance(cause, ConfigCompositionException) and cause.__cause__ is not None:
        cause = cause.__cause__
    key = getattr(cause, "full_key", None)
    first = str(cause).strip().splitlines()[0]
    return f"{key}: {first}" if key else first


__all__ = [
    "ConfigError",
    "Launch",
    "compose",
    "compose_dataflow",
    "compose_graphs",
    "list_recipes",
    "load_recipe",
    "root_type",
]
