"""Plain settings to frozen dataclasses: every type checked, every key known, every message one line.

    {"optimizer": {"lr": "fast"}}  ->  actor.optimizer.lr must be a number, got 'fast'
    {"optimizer": {"l": 1e-5}}     ->  unknown key actor.optimizer.l; did you mean actor.optimizer.lr?

Hydra composes plain data; the types live in the dataclasses and are applied here, once.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from rlhf_dist import config

ALLOWED: dict[tuple[type, str], tuple[str | None, ...]] = {
    (config.ModelConfig, "init"): ("pretrained", "random"),
    (config.OptimizerConfig, "schedule"): ("constant", "linear", "cosine"),
    (config.OptimizerConfig, "nonfinite"): ("stop", "skip"),
    (config.EngineConfig, "name"): ("fsdp", "deepspeed"),
    (config.EngineConfig, "offload"): ("none", "optimizer", "all"),
    (config.EngineConfig, "dtype"): ("auto", "float32", "bfloat16"),
    (config.EngineConfig, "export_dtype"): (None, "float32", "bfloat16"),
    (config.RolloutConfig, "engine"): ("vllm", "transformers"),
    (config.RolloutConfig, "dtype"): ("auto", "float32", "bfloat16"),
    (config.SourceConfig, "rows"): ("prompts", "examples", "preferences"),
    (config.SourceConfig, "turns"): ("all", "last"),
    (config.PoolConfig, "device"): ("auto", "cuda", "cpu"),
    (config.OutputConfig, "tracker"): ("none", "wandb", "mlflow", "trackio", "swanlab"),
    (config.RunConfig, "resume"): ("never", "auto", "overwrite"),
}
"""Fields that are one of a few words."""
NUMBERED: dict[tuple[type, str], str] = {(config.RunConfig, "resume"): "step_"}
"""Fields that may be this word with a number behind it as well."""


class ConfigError(ValueError):
    """A setting that cannot be right; the message is for the person who wrote it."""


def build(cls: type, data: Mapping[str, Any], key: str = "") -> Any:
    """An instance of the dataclass `cls` from plain data; `key` is where it sits, for messages.

    Raises ConfigError for an unknown key, a value of another type, a word that is not allowed, and a
    mandatory value (`???`) that nobody gave.
    """
    hints = _hints(cls)
    given: dict[str, Any] = {}
    for name in data:
        if name not in hints:
            raise ConfigError(unknown(_join(key, str(name)), (_join(key, known) for known in hints), "key"))
    for item in fields(cls):
        if item.name not in data:
            if item.default is NO_DEFAULT and item.default_factory is NO_DEFAULT:
                raise ConfigError(_missing(_join(key, item.name)))
            given[item.name] = _default(item, hints[item.name], _join(key, item.name))
            continue
        given[item.name] = convert(hints[item.name], data[item.name], _join(key, item.name))
        _check_allowed(cls, item.name, given[item.name], _join(key, item.name))
    try:
        return cls(**given)
    except (ValueError, TypeError) as error:  # a recipe's own __post_init__ check
        raise ConfigError(f"{key or cls.__name__}: {error}") from error


def convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as `kind`: a dataclass, number, string, bool, Literal, list, tuple, dict, or any of these or None."""
    if value == config.MISSING and isinstance(value, str):
        raise ConfigError(_missing(key))
    if kind == config.PathText:
        return expanded(convert(str, value, key), key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return convert(arguments[0], value, key)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{key} must be one of {_list(arguments)}, got {value!r}")
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is a section with {_list(_hints(kind))}; set one of these, got {value!r}")
        return build(kind, value, key)
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a mapping, got {value!r}")
        element = arguments[1] if arguments else Any
        return {str(name): convert(element, entry, _join(key, str(name))) for name, entry in value.items()}
    if origin in (tuple, list) or kind in (tuple, list):
        return _convert_sequence(origin or kind, arguments, value, key)
    return _convert_scalar(kind, value, key)


def _convert_union(arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    kinds = [kind for kind in arguments if kind is not type(None)]
    for kind in kinds[:-1]:
        try:
            return convert(kind, value, key)
        except ConfigError:
            continue
    return convert(kinds[-1], value, key)


def _convert_sequence(kind: Any, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise ConfigError(f"{key} must be a list such as [a,b], got {value!r}")
    if kind is list or (arguments and arguments[-1] is ...):
        elements = [arguments[0] if arguments else Any] * len(value)
    else:
        elements = list(arguments) or [Any] * len(value)
    if len(elements) != len(value):
        raise ConfigError(f"{key} must have {len(elements)} entries, got {len(value)}: {list(value)}")
    return kind(
        convert(element, entry, f"{key}[{i}]") for i, (element, entry) in enumerate(zip(elements, value, strict=True))
    )


def _convert_scalar(kind: Any, value: Any, key: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number and value == value:  # not NaN
        return float(value)
    if kind is int and number and math.isfinite(value) and value == int(value):
        return int(value)
    if kind is str and number:
        return str(value)
    if (
        kind is not float
        and isinstance(kind, type)
        and isinstance(value, kind)
        and (kind is bool or not isinstance(value, bool))
    ):
        return value
    raise ConfigError(f"{key} must be {type_name(kind)}, got {value!r}")


def plain(cls: type) -> dict[str, Any]:
    """The defaults of a dataclass as nested plain data; a field without default is `???`."""
    out: dict[str, Any] = {}
    for item in fields(cls):
        if item.default_factory in (NO_DEFAULT, _hints(cls)[item.name]) and is_dataclass(_hints(cls)[item.name]):
            out[item.name] = plain(_hints(cls)[item.name])
        elif item.default_factory is not NO_DEFAULT:
            out[item.name] = _plain_value(item.default_factory())
        else:
            out[item.name] = config.MISSING if item.default is NO_DEFAULT else _plain_value(item.default)
    return out


def keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every key there is, dotted, with its type. Sections that may be None are included with their keys."""
    out: dict[str, Any] = {}
    for name, kind in _hints(cls).items():
        out[_join(prefix, name)] = kind
        inner = next((k for k in (kind, *typing.get_args(kind)) if isinstance(k, type) and is_dataclass(k)), None)
        if inner is not None and typing.get_origin(kind) is not dict:
            out |= keys(inner, _join(prefix, name))
    return out


def kind_of(key: str, known: Mapping[str, Any]) -> Any:
    """The type of a dotted key among `known` (from `keys`), entries of mappings included; None where there is none."""
    if key in known:
        return known[key]
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        kind = known.get(".".join(parts[:length]))
        if kind is None:
            continue
        if not is_open(kind):
            return None
        element = (*typing.get_args(_mapping_in(kind)), Any, Any)[1]
        inner = parts[length + 1 :]
        if not inner or not (isinstance(element, type) and is_dataclass(element)):
            return element
        # An unknown name in an entry is found where it is built, with the names that the entry has.
        return kind_of(".".join(inner), keys(element)) or Any
    return None


def is_text(kind: Any, value: str) -> bool:
    """Whether `value`, typed for a setting of type `kind`, is text as it stands; a list is one where it may be one."""
    parts = [kind] if typing.get_origin(kind) not in (typing.Union, types.UnionType) else list(typing.get_args(kind))
    parts = [part for part in parts if part is not type(None)]
    texts = [part for part in parts if part in (str, config.PathText) or _is_words(part)]
    lists = [part for part in parts if (typing.get_origin(part) or part) in (list, tuple)]
    if not texts or len(texts) + len(lists) < len(parts):
        return False
    return not (lists and value.startswith("["))


def is_optional(kind: Any) -> bool:
    """Whether a setting may be null."""
    return type(None) in typing.get_args(kind)


def expanded(path: str, key: str) -> str:
    """A path with `~` and `$NAME` put in. Raises ConfigError for a variable that is not set."""
    found = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})", found)
    if unset and not os.path.lexists(found):
        raise ConfigError(f"{key}: {unset[0]} is not set in the environment, got {path!r}")
    return found


def _is_words(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal and all(isinstance(word, str) for word in typing.get_args(kind))


def allowed_words(cls: type, key: str) -> list[str]:
    """The words that the text setting `key` of a tree of dataclasses may be; none where any text will do."""
    first, _, rest = key.partition(".")
    kind = _hints(cls).get(first)
    if not rest:
        found = (ALLOWED[base, first] for base in cls.__mro__ if (base, first) in ALLOWED)
        return [str(word) for words in found for word in words if word is not None]
    inner = next((k for k in (kind, *typing.get_args(kind)) if isinstance(k, type) and is_dataclass(k)), None)
    return allowed_words(inner, rest) if inner else []


def is_open(kind: Any) -> bool:
    """Whether the setting is a mapping with keys of the user's choice, or may be one."""
    return _mapping_in(kind) is not None


def _mapping_in(kind: Any) -> Any:
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return next((part for part in parts if part is dict or typing.get_origin(part) is dict), None)


def unknown(name: str, valid: Iterable[str], what: str) -> str:
    """The message for a name that does not exist: the nearest one, else what there is."""
    choices = list(valid)
    last = name.rsplit(".", 1)[-1]
    # `actor.lr` means actor.optimizer.lr: the same last word below the same first one comes before look-alikes.
    same = [
        c for c in choices if "." in name and c.rsplit(".", 1)[-1] == last and c.split(".")[0] == name.split(".")[0]
    ]
    near = (
        same
        or [choice for choice in choices if choice.lower() == name.lower()]
        or difflib.get_close_matches(name, choices, n=1, cutoff=0.7)
        or [choice for choice in choices if choice.rsplit(".", 1)[-1] == last]
        or difflib.get_close_matches(name, choices, n=1, cutoff=0.55)
    )
    if near:
        return f"unknown {what} {name}; did you mean {near[0]}?"
    top = [choice for choice in choices if "." not in choice] or choices
    return f"unknown {what} {name}; there is {', '.join(top) or 'none'}"


def type_name(kind: Any) -> str:
    """What a type is called in a message."""
    names = {int: "a whole number", float: "a number", str: "text", config.PathText: "text", bool: "true or false"}
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in typing.get_args(kind))
    return "null" if kind is type(None) else names.get(kind, getattr(kind, "__name__", str(kind)))


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in fields(cls) if item.init}


def _default(item: Any, kind: Any, key: str) -> Any:
    value = item.default if item.default is not NO_DEFAULT else item.default_factory()
    if is_dataclass(value) and not isinstance(value, type):
        return build(type(value), {}, key)  # finds mandatory values inside
    if value == config.MISSING and isinstance(value, str):
        raise ConfigError(_missing(key))
    return value


def _plain_value(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain_value(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain_value(entry) for name, entry in value.items()}
    return [_plain_value(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _check_allowed(cls: type, name: str, value: Any, key: str) -> None:
    for base in cls.__mro__:
        allowed, word = ALLOWED.get((base, name)), NUMBERED.get((base, name))
        if not allowed or value in allowed or (word and re.fullmatch(rf"{word}\d+", value)):
            continue
        raise ConfigError(f"{key} must be one of {_list([*allowed, *([f'{word}N'] if word else [])])}, got {value!r}")


def _missing(key: str) -> str:
    return f"{key} has no value and needs one; set {key}=..."


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _list(words: Iterable[Any]) -> str:
    return ", ".join(str(word) for word in words)
