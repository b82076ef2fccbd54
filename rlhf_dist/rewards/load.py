"""Finding a function named in the config: `package.module:name`, `file.py:name`, or `name` in the recipe's file."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from rlhf_dist.python_files import load_file, user_folders
from rlhf_dist.rewards.signature import Signature, signature_of


@dataclass(frozen=True)
class LoadedReward:
    """A reward function, ready to travel."""

    payload: bytes
    """Pickled, by value where it comes from a user's file."""
    signature: Signature
    folders: tuple[str, ...] = ()
    """Folders of user files, for what they import when they are called."""


def load_reward(spec: str, default_file: str | Path | None = None) -> LoadedReward:
    """The reward function that `spec` names: a function, a class, an instance, or what `adapt` made of one.

    Raises ValueError as `load_function`, where its parameters do not say what it takes, and where it cannot travel.
    """
    function = load_function(spec, default_file)
    signature = signature_of(function)
    try:
        return LoadedReward(cloudpickle.dumps(function), signature, tuple(user_folders()))
    except Exception as error:  # an object of the user's may raise anything
        raise ValueError(
            f"{spec!r} cannot be sent to the process that computes rewards ({type(error).__name__}: {error}); "
            f"a class is made there: name the class, and open files, locks and connections in its __init__"
        ) from error


def load_function(spec: str, default_file: str | Path | None = None) -> Callable[..., Any]:
    """The function that `spec` names; a bare `name` is looked up in `default_file`.

    Raises ValueError naming what is missing (the module, the file, the name with its nearest match), and
    when what is there cannot be called.
    """
    where, _, name = spec.rpartition(":")
    if not name:
        raise ValueError(f"a function is given as module:name, file.py:name or name, got {spec!r}")
    if where.endswith(".py"):
        module = load_file(where)
    elif where:
        module = _import(where, spec)
    elif default_file is not None:
        module = load_file(default_file)
    else:
        raise ValueError(f"{spec!r} needs a place to look in: write package.module:{name} or file.py:{name}")
    function = getattr(module, name, None)
    if function is None:
        raise ValueError(f"{where or default_file} has no {name!r}{_nearest(name, module)}")
    if not callable(function):
        raise ValueError(f"{spec!r} must be a function, got a {type(function).__name__}")
    found: Callable[..., Any] = function
    return found


def _import(module: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Only the module that was asked for: an import that fails inside it is the file's own error.
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise ValueError(f"no module {error.name!r}, wanted by {spec!r}; is its folder on PYTHONPATH?") from error


def _nearest(name: str, module: ModuleType) -> str:
    there = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    own = [key for key, value in there.items() if getattr(value, "__module__", None) == module.__name__]
    names = own or list(there)  # what it only imports is rarely meant
    close = difflib.get_close_matches(name, there, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(names[:10]) or 'no functions'}"
