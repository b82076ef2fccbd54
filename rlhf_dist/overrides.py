"""What a person gives for a run, one setting each: `key=value` on the command line, or a leaf of a settings file.

    data.train.system=Answer (A), (B).    text: all that follows the first `=`, as it stands
    actor.optimizer.betas=[0.8,0.9]       anything else: Hydra's grammar, with `${other.key}`
    model=smollm2   actor.engine=fsdp     an option of a config group; short for actor.engine.name
    ~placement.pools.main                 removes an entry

What a key is follows from its type (`rlhf_dist/config.py`, a recipe's dataclass), so a quote, a comma, `$5` or a
regular expression needs no second layer of quoting behind the shell's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_dist import typed
from rlhf_dist.addresses import is_address, is_hub_name
from rlhf_dist.placement.file import AUTO
from rlhf_dist.typed import ConfigError

GROUPS = ("model", "task", "placement")
"""Config groups: an option of one is a file in the folder of that name."""

Options = Callable[[str], list[str]]
"""Config group -> the options it has."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key and what it is set to."""

    key: str
    value: Any = None
    literal: bool = False
    """The value is text to be kept as it stands: `${` in it is no reference to another key."""
    replaces: bool = False
    """A mapping takes the place of the one that was there, instead of being merged into it."""
    removes: bool = False
    """The key is removed."""


def read_overrides(
    overrides: Sequence[str], keys: Mapping[str, Any], options: Options
) -> tuple[dict[str, str], list[Setting]]:
    """(config group -> option, settings in order) of `key=value` texts. Raises ConfigError for one that cannot be."""
    groups: dict[str, str] = {}
    settings: list[Setting] = []
    for text in overrides:
        found = re.fullmatch(r"\+{0,2}([A-Za-z_][\w.]*)=(.*)", text, re.DOTALL)
        if found is None:
            settings.append(_read_by_grammar(text, keys))
            continue
        key, value = found.groups()
        if f"{key}.name" in keys and not value.startswith("{"):
            key = f"{key}.name"  # `actor.engine=deepspeed` leaves the engine's other settings as they are.
        if key in GROUPS and not value.startswith("{"):
            groups[key] = check_option(key, value, options)
            continue
        kind = check_key(key, keys)
        if typed.is_text(kind, value):
            none = value == "null" and typed.is_optional(kind)
            settings.append(Setting(key=key, value=None if none else value, literal=True))
        else:
            settings.append(_read_by_grammar(f"{key}={value}", keys))
    return groups, settings


def check_key(key: str, keys: Mapping[str, Any]) -> Any:
    """The type of the setting `key`. Raises ConfigError, with the nearest key, where there is none."""
    kind = typed.kind_of(key, keys)
    if kind is None:
        raise ConfigError(typed.unknown(key, keys, "key"))
    return kind


def check_option(group: str, value: str, options: Options) -> str:
    """`value` if the config group has such an option. Raises ConfigError with what was probably meant."""
    there = options(group) + ([AUTO] if group == "placement" else [])
    if value in there:
        return value
    hint = ""
    if group == "model" and (is_hub_name(value) or is_address(value)):
        hint = f"; a model of a hub, or at an address, is given as model.path={value}"
    elif group == "model" and ("/" in value or Path(value).is_dir()):
        hint = f"; a folder is given as model.path={value}"
    elif group == "task" and Path(value).suffix:
        hint = f"; a file is given as task=none data.train.path={value}"
    raise ConfigError(f"{group}={value} does not exist; there is {', '.join(there)}{hint}")


def apply_setting(composed: DictConfig, setting: Setting) -> None:
    """Put a setting into composed settings. Raises ConfigError if it cannot be removed or set."""
    key, value = setting.key, setting.value
    parent, _, last = key.rpartition(".")
    if setting.removes:
        section = OmegaConf.select(composed, parent) if parent else composed
        if not isinstance(section, DictConfig) or last not in section:
            raise ConfigError(f"cannot remove {key}: it is not set")
        del section[last]
        return
    if setting.literal and isinstance(value, str):
        value = _escaped(value)
    try:
        OmegaConf.update(composed, key, value, merge=not setting.replaces, force_add=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"cannot set {key}={value}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    return str(error).strip().splitlines()[0]


def _read_by_grammar(text: str, keys: Mapping[str, Any]) -> Setting:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        where = f" ({first_line(error)})" if "=" in text else ""
        raise ConfigError(f"cannot read the override {text!r}; write key=value{where}") from error
    if override.is_sweep_override():
        raise ConfigError(f"{text!r} is a sweep; a run has one value for each key (quote a value with commas)")
    key = override.key_or_group
    check_key(key, keys)
    if override.is_delete():
        return Setting(key=key, removes=True)
    return Setting(key=key, value=override.value())


def _escaped(text: str) -> str:
    """Text that OmegaConf reads as `text`: every `${`, and the backslashes right before it, escaped."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
