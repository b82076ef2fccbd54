"""Settings in YAML: the file beside a recipe, and the one that `--config` names.

    name: mine                      the same keys as on the command line, nested or dotted
    model: smollm2                  a word for a config group chooses its option
    actor:
      engine: deepspeed             short for engine: {name: deepspeed}
      optimizer: {lr: 1e-5}

A file beside a recipe is composed by Hydra and may have a `defaults` list and `${other.key}`; what is left out of the
list is put in. A `--config` file is a list of overrides: what a run keeps as config.yaml runs again from it. There text
is text, as on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_dist import typed
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.overrides import GROUPS, Options, Setting, check_key, check_option
from rlhf_dist.placement.file import AUTO
from rlhf_dist.typed import ConfigError

USERS_GROUPS = {"model": "none", "task": "none", "placement": "colocate"}
"""Options of config groups for a user's recipe where its YAML chooses none."""

DECIDED_BY = {
    "model": ("model",),
    "task": ("task", "data.train", "data.heldout", "data.max_prompt_tokens", "data.max_response_tokens"),
    "placement": ("placement.pools", "placement.roles", "placement.rollout"),
}
"""Config group -> what of a settings file an option chosen on the command line takes the place of."""


def groups_of_ours(recipe: Recipe) -> dict[str, str]:
    """Options of config groups for one of our recipes where its YAML chooses none: it can be tried as it is.

    The demonstration's task has prompts; a recipe that takes anything else is given its rows.
    """
    prompts_only = all(getattr(kind, "rows_kind", "prompts") == "prompts" for kind in recipe.sources.values())
    return {"model": "demo", "task": "addition" if prompts_only else "none", "placement": "colocate"}


def read_primary(path: Path, keys: Mapping[str, Any], groups: Mapping[str, str]) -> dict[str, Any]:
    """A recipe's YAML, which may be missing, with a whole `defaults` list. Raises ConfigError for what is no mapping.

    groups: config group -> option where the file chooses none.
    """
    content = load_mapping(path) if path.is_file() else {}
    try:
        return with_defaults(content, keys, groups)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def with_defaults(content: Mapping[str, Any], keys: Mapping[str, Any], groups: Mapping[str, str]) -> dict[str, Any]:
    """Settings with the `defaults` list Hydra wants: schema first, an option of each group, the file last."""
    node = _nested(content, keys)
    given = list(node.pop("defaults", []))
    chosen = {group: node.pop(group) for group in GROUPS if isinstance(node.get(group), str)}
    listed = {name for entry in given if isinstance(entry, Mapping) for name in entry}
    missing = [{group: chosen.get(group, groups[group])} for group in GROUPS if group not in listed]
    schema = [] if "schema" in given else ["schema"]
    last = [] if "_self_" in given else ["_self_"]
    return {"defaults": [*schema, *missing, *given, *last], **node}


def read_settings(path: str, keys: Mapping[str, Any], options: Options) -> tuple[dict[str, str], list[Setting]]:
    """(config group -> option, settings) of the file that `--config` names. Raises ConfigError."""
    file = Path(typed.expanded(path, "--config"))
    if not file.is_file():
        raise ConfigError(f"--config {path}: no such file (looked for {file.resolve()})")
    content = load_mapping(file)
    try:
        return _settings(content, keys, options)
    except ConfigError as error:
        # A run's config.yaml begins with the command that it belongs to.
        written_for = re.match(r"# rlhf-dist run (\S+) ", file.read_text(encoding="utf-8"))
        of = f" (of recipe {written_for[1]})" if written_for else ""
        raise ConfigError(f"{path}{of}: {error}") from error


def read_layers(
    layers: Sequence[Mapping[str, Any]], keys: Mapping[str, Any], options: Options
) -> tuple[dict[str, str], list[Setting]]:
    """The same of mappings, each of which decides over those before it. Raises ConfigError."""
    groups: dict[str, str] = {}
    settings: list[Setting] = []
    for layer in layers:
        chosen, own = _settings(layer, keys, options)
        groups |= chosen
        settings = [*without(settings, chosen), *own]
    return groups, settings


def _settings(
    content: Mapping[str, Any], keys: Mapping[str, Any], options: Options
) -> tuple[dict[str, str], list[Setting]]:
    content = _nested(content, keys)
    if content.get("placement") == AUTO:
        raise ConfigError("a plan is asked for on the command line, as placement=auto")
    groups = {
        group: check_option(group, content.pop(group), options)
        for group in GROUPS
        if isinstance(content.get(group), str)
    }
    return groups, list(_leaves(content, "", keys))


def without(settings: list[Setting], groups: Mapping[str, str]) -> list[Setting]:
    """Settings of a file less those that options chosen on the command line decide."""
    decided = [key for group in groups for key in DECIDED_BY[group]]
    return [one for one in settings if not any(f"{one.key}.".startswith(f"{key}.") for key in decided)]


def unless_followed(settings: list[Setting], composed: Mapping[str, Any]) -> list[Setting]:
    """Settings less those that would say again what they follow: `${model.path}` where the file's model.path is equal.

    A run's config.yaml has every reference resolved; so model.path=... on the command line still moves every role.
    """
    values = {one.key: one.value for one in settings}

    def repeats(one: Setting) -> bool:
        raw: Any = composed
        for name in one.key.split("."):
            raw = raw.get(name) if isinstance(raw, Mapping) else None
        followed = re.fullmatch(r"\$\{([\w.]+)\}", raw) if isinstance(raw, str) else None
        return followed is not None and followed[1] in values and values[followed[1]] == one.value

    return [one for one in settings if not repeats(one)]


def _leaves(content: Mapping[str, Any], prefix: str, keys: Mapping[str, Any]) -> Iterator[Setting]:
    for name, value in content.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        kind = check_key(key, keys)
        if isinstance(value, Mapping) and not typed.is_open(kind) and value:
            yield from _leaves(value, key, keys)
        else:
            literal = isinstance(value, str) and typed.is_text(kind, value)
            yield Setting(key=key, value=value, literal=literal, replaces=typed.is_open(kind))


def _nested(content: Mapping[str, Any], keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys as sections, and a word where a section with a `name` is as that name."""
    out: dict[str, Any] = {}
    for name, value in content.items():
        first, _, rest = str(name).partition(".")
        key = f"{prefix}{first}"
        if rest:
            value = {rest: value}
        if isinstance(value, Mapping) and not typed.is_open(keys.get(key)):
            value = _nested(value, keys, f"{key}.")
        elif isinstance(value, str) and f"{key}.name" in keys:
            value = {"name": value}
        out[first] = _joined(out[first], value, key) if first in out else value
    return out


def _joined(one: Any, other: Any, key: str) -> Any:
    """Two values of one key, given dotted and nested: sections are put together, anything else is there twice."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        raise ConfigError(f"{key} is there twice")
    both = one.keys() & other.keys()
    return {**one, **other, **{name: _joined(one[name], other[name], f"{key}.{name}") for name in both}}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two differences: 1e-5 is a number, and a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConfigError(f"line {node.start_mark.line + 1}: {', '.join(map(str, twice))} is there twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, which may be empty. Raises ConfigError for anything else, or a key given twice."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold settings as key: value, got {type(content).__name__}")
    return content
