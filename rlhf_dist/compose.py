"""From a recipe's name and `key=value` overrides to frozen settings and a traced graph.

    recipes/conf/ppo.yaml ─┐   schema: RunConfig + algorithm + one section per role parameter,
    model/ task/ placement ┼─> Hydra ─> overrides ─> dataclasses ─> trace ─> Launch
    a YAML beside mine.py ─┘   with all defaults, made from the recipe's signature

Two shared sections keep the files short: `model` (path, dtype), which every role's model follows unless
it is set itself, and `task` (the reward that belongs to the data). Hydra composes files and config
groups; it writes no folders and sets up no logging. Types are applied by `rlhf_dist/typed.py`, since
Hydra's own structured configs cannot be frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_dist import typed
from rlhf_dist.config import MISSING, ActorConfig, CriticConfig, ReferenceConfig, RewardConfig, RunConfig
from rlhf_dist.dataflow.graph import Dataflow
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.placement.file import AUTO, apply_placement, asked_placement, read_placement
from rlhf_dist.recipe_files import list_recipes, load_recipe, parse_spec, recipes_folder
from rlhf_dist.roles import Actor, Critic, Reference, Reward, RewardModel
from rlhf_dist.typed import ConfigError

RoleConfig = ActorConfig | CriticConfig | ReferenceConfig | RewardConfig

CONFIG_OF: dict[type, type] = {
    Actor: ActorConfig,
    Critic: CriticConfig,
    Reference: ReferenceConfig,
    Reward: RewardConfig,
    RewardModel: CriticConfig,
}
"""Role interface -> its settings; an interface of a user's own takes those of the nearest base."""

GROUPS = ("model", "task", "placement")


@dataclass(frozen=True, kw_only=True)
class SharedModel:
    """The model every role starts from, unless its own section says otherwise."""

    path: str = MISSING
    """Folder with config.json, weights and tokenizer."""
    dtype: str = "float32"
    """`float32` or `bfloat16`, for training engines and generation."""


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

    @property
    def used_roles(self) -> dict[str, RoleConfig]:
        """Roles that the dataflow uses, with their settings; only these are started and need a model."""
        return {role: settings for role, settings in self.roles.items() if role in self.dataflow.used_roles}


def compose(spec: str, overrides: Sequence[str] = ()) -> Launch:
    """Settings and graph of recipe `spec` (a name, or `path/to/mine.py[:name]`) with `key=value` overrides.

    `placement=auto` plans, `placement=FILE.yaml` takes a plan from a file (`rlhf-dist plan --format yaml`).
    Raises ConfigError for a setting that cannot be right, GraphError for a recipe that cannot run.
    """
    asked, overrides = asked_placement(overrides)
    if asked is None:
        return _launch(spec, overrides, {})
    if asked != AUTO:
        return _launch(spec, overrides, read_placement(asked))
    from rlhf_dist.planner.launch import planned_settings

    return _launch(spec, overrides, planned_settings(_launch(spec, overrides, {}), overrides))


def _launch(spec: str, overrides: Sequence[str], planned: Mapping[str, Any]) -> Launch:
    recipe = load_recipe(spec)
    root = _root(recipe)
    composed = _compose(spec, recipe, root, overrides, planned)
    algorithm = _algorithm(recipe, composed)
    dataflow = trace(recipe, algorithm)
    settings = _build(root, composed, recipe.roles.keys() - dataflow.used_roles)
    _check_rows(recipe, settings)
    run = RunConfig(**{item.name: getattr(settings, item.name) for item in fields(RunConfig)})
    return Launch(
        recipe=recipe,
        run=run,
        algorithm=algorithm,
        roles={name: getattr(settings, name) for name in recipe.roles},
        dataflow=replace(dataflow, staleness=max(run.placement.max_staleness, 0)),
        yaml=OmegaConf.to_yaml(composed, resolve=True),
    )


def compose_dataflow(spec: str, overrides: Sequence[str] = ()) -> Dataflow:
    """The graph alone: only the algorithm section is built, so no model and no data need to be chosen.

    Raises as `compose` does.
    """
    _, overrides = asked_placement(overrides)
    recipe = load_recipe(spec)
    composed = _compose(spec, recipe, _root(recipe), overrides, {})
    return trace(recipe, _algorithm(recipe, composed))


def root_type(recipe: Recipe) -> type:
    """The dataclass of all settings of a recipe, for showing them."""
    return _root(recipe)


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
        kind = next((CONFIG_OF[base] for base in interface.__mro__ if base in CONFIG_OF), None)
        if kind is None:
            raise ConfigError(
                f"recipe {recipe.name}: role {name!r} ({interface.__name__}) must derive from "
                f"{', '.join(base.__name__ for base in CONFIG_OF)}, so that it has settings"
            )
        sections.append((name, kind, field(default_factory=kind)))
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
        section["engine"]["dtype"] = "${model.dtype}"
        if "function" in section:
            section["function"] = "${task.reward}"
        else:
            section["model"]["path"] = "${model.path}"
        if "rollout" in section:
            section["rollout"] |= {"dtype": "${model.dtype}", "max_prompt_tokens": "${data.max_prompt_tokens}"}
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
        choices = ", ".join(f"model={name}" for name in _options("model", [_conf()]) if name != "none")
        raise ConfigError(f"model.path has no value and needs one; set model.path=FOLDER, or choose {choices}")
    settings = _resolved(composed)
    if not followed:
        settings["model"] = None  # Every role has a model of its own, so the shared one may be missing.
    return typed.build(root, settings)


def _resolved(composed: DictConfig, section: str = "") -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(composed[section] if section else composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'settings'}: {_first(error)}") from error
    assert isinstance(plain, dict), f"{section or 'the root'} is a mapping in the schema"
    return {str(name): value for name, value in plain.items()}


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in _leaves(entry)]
    return [value]


def _check_rows(recipe: Recipe, settings: Any) -> None:
    for name, kind in recipe.sources.items():
        wanted, got = getattr(kind, "rows_kind", settings.data.train.rows), settings.data.train.rows
        if wanted != got:
            raise ConfigError(
                f"data.train.rows must be {wanted}, because recipe {recipe.name} takes {kind.__name__} as {name!r}; "
                f"got {got!r}; leave it unset"
            )


# --- Hydra -----------------------------------------------------------------------------------------------
def _compose(spec: str, recipe: Recipe, root: type, overrides: Sequence[str], planned: Mapping[str, Any]) -> DictConfig:
    """Files, groups, a plan and overrides put together, in this order; interpolations not yet resolved."""
    file = parse_spec(spec)
    groups, values = _parse(overrides, typed.keys(root), [_conf(), *([file.path.parent] if file else [])])
    composed = _compose_files(spec, _schema(recipe, root), groups)
    apply_placement(composed, planned, lambda key: _check_key(key, typed.keys(root)))
    for override in values:
        _apply(composed, override)
    return composed


def _conf() -> Path:
    return recipes_folder() / "conf"


def _compose_files(spec: str, schema: dict[str, Any], groups: list[str]) -> DictConfig:
    """The primary config of the recipe with its groups, not yet resolved."""
    ours = _conf()
    file = parse_spec(spec)
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    folder, name, search = ours, spec, list[str]()
    if file is not None:
        name = file.path.stem
        if file.path.with_suffix(".yaml").is_file():
            folder, search = file.path.parent, [f"hydra.searchpath=[file://{ours}]"]
        else:
            name = "recipe_without_yaml"
            store.store(name=name, node=_default_primary(file.path.stem))
    with ExitStack() as stack:
        GlobalHydra.instance().clear()
        stack.enter_context(initialize_config_dir(str(folder), version_base="1.3"))
        stack.callback(GlobalHydra.instance().clear)
        try:
            composed = hydra_compose(name, overrides=[*search, *groups])
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_hydra_message(error)) from error
    OmegaConf.set_struct(composed, False)
    return composed


def _default_primary(stem: str) -> dict[str, Any]:
    defaults: list[Any] = ["schema", {"model": "none"}, {"task": "none"}, {"placement": "colocate"}, "_self_"]
    return {"defaults": defaults, "name": stem}


def _hydra_message(error: Exception) -> str:
    cause: BaseException = error
    while isinstance(cause, ConfigCompositionException) and cause.__cause__ is not None:
        cause = cause.__cause__
    key = getattr(cause, "full_key", None)
    first = str(cause).strip().splitlines()[0]
    return f"{key}: {first}" if key else first


def _options(group: str, folders: Sequence[Path]) -> list[str]:
    """Options of a config group: ours, and those in a folder of that name beside the user's recipe."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


# --- overrides -------------------------------------------------------------------------------------------
def _parse(
    overrides: Sequence[str], keys: Mapping[str, Any], folders: Sequence[Path]
) -> tuple[list[str], list[Override]]:
    """Overrides that choose an option of a config group, and those that set a value."""
    groups: list[str] = []
    values: list[Override] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(f"cannot read the override {text!r}; write key=value, got {_first(error)}") from error
        if override.is_sweep_override():
            raise ConfigError(f"{text!r} is a sweep; a run has one value for each key (quote a value with commas)")
        key = override.key_or_group
        if f"{key}.name" in keys and not override.is_delete() and isinstance(override.value(), str):
            # `actor.engine=deepspeed` names the engine and leaves its other settings as they are.
            override = OverridesParser.create().parse_override(text.replace(key, f"{key}.name", 1))
            key = override.key_or_group
        if key in GROUPS and not override.is_delete() and isinstance(override.value(), str):
            options = _options(key, folders) + ([AUTO] if key == "placement" else [])
            if override.value() not in options:
                raise ConfigError(f"{key}={override.value()} does not exist; there is {', '.join(options)}")
            groups.append(f"{key}={override.value()}")
            continue
        _check_key(key, keys)
        values.append(override)
    return groups, values


def _check_key(key: str, keys: Mapping[str, Any]) -> None:
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        kind = keys.get(".".join(parts[:length]))
        if kind is not None:
            if length == len(parts) or typed.is_open(kind):
                return
            break
    raise ConfigError(typed.unknown(key, keys, "key"))


def _apply(composed: DictConfig, override: Override) -> None:
    key = override.key_or_group
    if override.is_delete():
        parent, _, last = key.rpartition(".")
        section = OmegaConf.select(composed, parent) if parent else composed
        if not isinstance(section, DictConfig) or last not in section:
            raise ConfigError(f"cannot remove {key}: it is not set")
        del section[last]
        return
    try:
        OmegaConf.update(composed, key, override.value(), merge=True, force_add=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"cannot set {key}={override.value()}: {_first(error)}") from error


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


__all__ = ["ConfigError", "Launch", "compose", "compose_dataflow", "list_recipes", "load_recipe", "root_type"]
