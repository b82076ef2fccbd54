"""Several recipes in one launch, one after the other: what a file of stages says. Weights are handed over by name.

    name: rlhf                              the folder runs/rlhf; each stage has its own in it, runs/rlhf/sft
    model: smollm2                          settings of all stages; a stage without such a setting goes without
    stages:
      sft:
        data.train.path: chats.jsonl
        steps: 200
      rm:
        recipe: reward_model                where it is not called as the stage
        data.train.path: pairs.jsonl
      ppo:
        actor.model.path: ${stage.sft.actor}          the folder that the stage `sft` exports its `actor` to
        reward.model.path: ${stage.rm.reward}

On the command line `steps=10` is for all stages and `ppo.steps=10` for one, which goes before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_dist import typed
from rlhf_dist.compose import root_type
from rlhf_dist.overrides import GROUPS
from rlhf_dist.recipe_files import load_recipe, stages_of
from rlhf_dist.settings_file import load_mapping
from rlhf_dist.typed import ConfigError

_REFERENCE = re.compile(r"\$\{stage\.(\w+)\.(\w+)\}")
_LIKE_ONE = re.compile(r"\$\{stages?\b[^}]*\}?")
_OVERRIDE = re.compile(r"([~+]*)(\w+)\.(.+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One recipe of a launch, with its settings."""

    name: str
    recipe: str
    """A recipe's name, or `path/to/mine.py[:name]`."""
    settings: tuple[Mapping[str, Any], ...] = ()
    """Of all stages and of this one; later ones decide."""
    overrides: tuple[str, ...] = ()
    """The same of the command line."""

    @property
    def references(self) -> list[tuple[str, str]]:
        """(stage, role) of each `${stage.STAGE.ROLE}`, once."""
        return list(dict.fromkeys(pair for text in _texts([*self.settings, *self.overrides]) for pair in _found(text)))

    def with_models(self, folder_of: Callable[[str, str], str]) -> Stage:
        """The stage with `folder_of(stage, role)` in place of every reference."""

        def put_in(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: put_in(entry) for name, entry in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(put_in(entry) for entry in value)
            return _REFERENCE.sub(lambda found: folder_of(*found.groups()), value) if isinstance(value, str) else value

        return replace(self, settings=put_in(self.settings), overrides=put_in(self.overrides))

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Every setting that the stage has, with its type."""
        return typed.keys(root_type(load_recipe(self.recipe)))

    def knows(self, key: str) -> bool:
        """Whether the stage has such a setting."""
        return key in GROUPS or typed.kind_of(key, self.keys) is not None


@dataclass(frozen=True, kw_only=True)
class Stages:
    """A launch of several recipes."""

    name: str
    root: str
    """Folder of all runs, `~` and `$NAME` put in."""
    stages: tuple[Stage, ...]

    @property
    def folder(self) -> Path:
        """Of the launch; a stage's run is in the folder of its name there."""
        return Path(self.root) / self.name

    def model_of(self, stage: str, role: str) -> str:
        """The folder that a stage exports a role's model to."""
        return str(self.folder / stage / "models" / role)


def read_stages(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Stages:
    """The stages in a YAML file (or one of ours, by its name), or in a mapping with `name` and `stages`, with
    `key=value` overrides.

    Raises ConfigError for what no launch can be: an unknown recipe or setting, a reference to no earlier stage.
    """
    if isinstance(source, Mapping):
        where, content = "stages", dict(source)
    else:
        file = Path(stages_of(str(source))).expanduser()
        if not file.is_file():
            raise ConfigError(f"{source}: no such file of stages (looked for {file.resolve()})")
        where, content = str(source), {"name": file.stem, **load_mapping(file)}
    entries = content.pop("stages", None)
    if not isinstance(entries, Mapping) or not entries:
        raise ConfigError(f"{where} must have stages, as stages: {{sft: {{...}}, ppo: {{...}}}}, got {entries!r}")
    stages = [_stage(where, name, entry) for name, entry in entries.items()]
    for stage in stages:
        if any(stage.name in other.keys for other in stages):
            raise ConfigError(f"{where}: a stage cannot be called {stage.name!r}; settings have a section of that name")
    launch, content = _of_the_launch(where, content, overrides)
    stages = _with_shared(where, stages, content)
    stages = _with_overrides(stages, [text for text in overrides if _key(text) not in launch])
    _check_references(stages)
    folder = Path(launch["output.root"]) / launch["name"]
    return Stages(
        name=launch["name"],
        root=launch["output.root"],
        stages=tuple(
            replace(stage, overrides=(*stage.overrides, f"name={stage.name}", f"output.root={folder}"))
            for stage in stages
        ),
    )


def _stage(where: str, name: Any, entry: Any) -> Stage:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ConfigError(f"{where}: a stage's name is letters, digits and _, and begins with a letter, got {name!r}")
    if entry is not None and not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: stage {name} must hold settings as key: value, got {entry!r}")
    settings = dict(entry or {})
    stage = Stage(name=name, recipe=str(settings.pop("recipe", name)), settings=(settings,))
    try:
        _ = stage.keys
    except ValueError as error:
        raise ConfigError(f"{where}: stage {name}: {error}; its recipe is said by recipe: NAME") from error
    for key in ("name", "output.root"):
        if key in settings or (key == "output.root" and "root" in (settings.get("output") or {})):
            raise ConfigError(f"{where}: stage {name} sets {key}, which is the launch's: set it beside `stages`")
    return stage


def _of_the_launch(
    where: str, content: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Name and root of the launch, and the settings that are left for stages."""
    left = {name: dict(value) if isinstance(value, Mapping) else value for name, value in content.items()}
    output = left.get("output")
    nested = output.pop("root", None) if isinstance(output, dict) else None
    found = {"name": left.pop("name", None), "output.root": left.pop("output.root", nested) or "runs"}
    found |= {key: text.partition("=")[2] for text in overrides if (key := _key(text)) in found}
    name = found["name"]
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name:
        raise ConfigError(f"{where}: name must be a plain folder name, got {name!r}")
    return {"name": name, "output.root": typed.expanded(str(found["output.root"]), "output.root")}, left


def _with_shared(where: str, stages: Sequence[Stage], shared: Mapping[str, Any]) -> list[Stage]:
    """Each stage with those of the settings for all that it has. Raises ConfigError for one that no stage has."""
    for key in _keys(shared, stages):
        if any(stage.name == key.partition(".")[0] for stage in stages):
            raise ConfigError(f"{where}: settings of stage {key.partition('.')[0]} stand below `stages`, got {key}")
        if not any(stage.knows(key) for stage in stages):
            raise ConfigError(f"{where}: {typed.unknown(key, _all_keys(stages), 'key')}")
    return [replace(stage, settings=(_known(shared, stage), *stage.settings)) for stage in stages]


def _keys(content: Mapping[str, Any], stages: Sequence[Stage], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        kinds = [typed.kind_of(key, stage.keys) for stage in stages]
        if isinstance(value, Mapping) and value and not any(map(typed.is_open, kinds)):
            yield from _keys(value, stages, f"{key}.")
        else:
            yield key


def _known(content: Mapping[str, Any], stage: Stage, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not typed.is_open(typed.kind_of(key, stage.keys)):
            if below := _known(value, stage, f"{key}."):
                found[name] = below
        elif stage.knows(key):
            found[name] = value
    return found


def _with_overrides(stages: Sequence[Stage], overrides: Sequence[str]) -> list[Stage]:
    """Each stage with its overrides: those for all first. Raises ConfigError for one that fits no stage."""
    names = [stage.name for stage in stages]
    of_all: list[str] = []
    of_one: dict[str, list[str]] = {name: [] for name in names}
    for text in overrides:
        key = _key(text)
        found = _OVERRIDE.fullmatch(text)
        if found and found[2] in names:
            own = f"{found[1]}{found[3]}"
            if _key(own) in ("name", "output.root"):
                raise ConfigError(f"{text}: the folder of a stage is NAME/{found[2]}; set name or output.root for all")
            of_one[found[2]].append(own)
        elif any(stage.knows(key) for stage in stages):
            of_all.append(text)
        else:
            raise ConfigError(typed.unknown(key, [*_all_keys(stages), *_with_stage(key, names)], "key"))
    return [
        replace(stage, overrides=(*(text for text in of_all if stage.knows(_key(text))), *of_one[stage.name]))
        for stage in stages
    ]


def _with_stage(key: str, names: Sequence[str]) -> list[str]:
    """What a key with a misspelt stage may have meant."""
    _, dot, rest = key.partition(".")
    return [f"{name}{dot}{rest}" for name in names]


def _check_references(stages: Sequence[Stage]) -> None:
    earlier: list[str] = []
    for stage in stages:
        for text in _texts([*stage.settings, *stage.overrides]):
            wrong = [one for one in _LIKE_ONE.findall(text) if not _REFERENCE.fullmatch(one)]
            if wrong:
                raise ConfigError(f"stage {stage.name}: a model of a stage is ${{stage.NAME.ROLE}}, got {wrong[0]}")
        for name, role in stage.references:
            if name in earlier:
                continue
            said = f"stage {stage.name}: ${{stage.{name}.{role}}}"
            if name in [one.name for one in stages]:
                raise ConfigError(f"{said} must be of a stage before it; there is {', '.join(earlier) or 'none'}")
            raise ConfigError(f"{said}: {typed.unknown(name, earlier, 'stage')}")
        earlier.append(stage.name)


def _all_keys(stages: Sequence[Stage]) -> list[str]:
    return list(dict.fromkeys(key for stage in stages for key in stage.keys))


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("~+")


def _found(text: str) -> list[tuple[str, str]]:
    return [(found[1], found[2]) for found in _REFERENCE.finditer(text)]


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping):
        for entry in values.values():
            yield from _texts(entry)
    elif isinstance(values, list | tuple):
        for entry in values:
            yield from _texts(entry)
