"""Placements that are planned, or kept in a file of their own.

placement=auto           planned at launch
placement=plan.yaml      what `rlhf-dist plan --format yaml` wrote: a `placement` section and role sections,
                         or pools and roles alone
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from rlhf_dist.typed import ConfigError

AUTO = "auto"


def asked_placement(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """(`auto` or the file that the last `placement=` names, the other overrides); None for a preset or nothing."""
    asked: str | None = None
    left: list[str] = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key != "placement":
            left.append(text)
        elif value == AUTO or value.endswith((".yaml", ".yml")):
            asked = value
        else:
            asked = None
            left.append(text)
    return asked, left


def read_placement(path: str) -> dict[str, Any]:
    """Settings by section in a placement file. Raises ConfigError if there is no such file or it is not one."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"placement={path}: no such file (looked for {file.resolve()})")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"placement={path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"placement={path} must hold pools and roles, or a placement section, got {content!r}")
    return dict(content) if "placement" in content else {"placement": dict(content)}


def apply_placement(composed: DictConfig, sections: Mapping[str, Any], check_key: Callable[[str], None]) -> None:
    """Put the sections of a plan into composed settings. Pools and roles replace those that were there."""
    for name, values in sections.items():
        for key in _keys(name, values):
            check_key(key)
        if name == "placement" and isinstance(values, Mapping):
            for field, value in values.items():
                OmegaConf.update(composed, f"placement.{field}", value, merge=False, force_add=True)
        else:
            OmegaConf.update(composed, name, values, merge=True, force_add=True)


def _keys(prefix: str, values: Any) -> list[str]:
    if not isinstance(values, Mapping) or prefix in ("placement.pools", "placement.roles", "placement.rollout"):
        return [prefix]
    return [key for name, value in values.items() for key in _keys(f"{prefix}.{name}", value)]
