"""A user's own Python files as modules: each executed once, and pickled by value.

    mine.py  --load_file-->  module mine_1a2b3c4d  --cloudpickle-->  losses, rewards, host ops on workers

The recipe, its reward and its generator may lie in one file; all get the same module, so a class in it
is one class. Workers cannot import the file: what it defines has to travel whole.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cloudpickle

_loaded: dict[Path, ModuleType] = {}
_by_value: list[Callable[[ModuleType], object]] = [cloudpickle.register_pickle_by_value]


def load_file(path: str | Path) -> ModuleType:
    """The Python file as a module, executed once per process however often it is asked for.

    Relative paths are taken from the current directory. Raises ValueError if there is no such file; what
    the file itself raises passes through.
    """
    file = Path(path).expanduser().resolve()
    if file in _loaded:
        return _loaded[file]
    if not file.is_file():
        raise ValueError(f"no Python file {str(path)!r} (looked for {file})")
    # Dataclasses and pickle look modules up by name, so the name must be unique and registered.
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"{file} ends in .py, so it has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _loaded[file] = module
    for register in _by_value:
        register(module)
    return module


def pickle_by_value_with(register: Callable[[ModuleType], object]) -> None:
    """Have `register` called for every file, those loaded before and after.

    For picklers with a registry of their own: Ray's cloudpickle is a copy that knows nothing of the original's.
    """
    if register in _by_value:
        return
    _by_value.append(register)
    for module in _loaded.values():
        register(module)
