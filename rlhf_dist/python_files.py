"""A user's own Python files as modules: each executed once, and pickled by value.

    mine.py  --load_file-->  module mine_1a2b3c4d  --cloudpickle-->  losses, rewards, host ops on workers
    |- import sibling  --->  module sibling        --cloudpickle-->  by value too

The recipe, its reward and its generator may lie in one file; all get the same module, so a class in it
is one class. Workers cannot import the file: what it defines has to travel whole, and so do the modules
beside it that it imports. A file that has changed is executed again, with what lies beside it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cloudpickle

OURS = ("rlhf_dist", "workers", "controller", "recipes")


_Stamp = tuple[int, int]
"""Time of a file's last change, ns, and its size."""
_loaded: dict[Path, tuple[ModuleType, _Stamp]] = {}
_siblings: dict[Path, tuple[ModuleType, _Stamp, Path]] = {}
"""File -> a module that a user's file imports from its own folder, and that folder."""
_by_value: list[Callable[[ModuleType], object]] = [cloudpickle.register_pickle_by_value]


def load_file(path: str | Path) -> ModuleType:
    """The Python file as a module, executed once per process however often it is asked for, until it changes.

    It may import what lies beside it. Relative paths are taken from the current directory. Raises ValueError if there
    is no such file, or if its folder has a module of a name that is taken; what the file itself raises passes through.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"no Python file {str(path)!r} (looked for {file})")
    _forget_what_changed(file.parent)
    if file in _loaded:
        return _loaded[file][0]
    _check_names(file.parent)
    # Dataclasses and pickle look modules up by name, so the name must be unique and registered.
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"{file} ends in .py, so it has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))  # as `python mine.py` does; it stays, for imports inside functions
    importlib.invalidate_caches()
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        del sys.modules[name]
        raise ValueError(
            f"{file} ends its process when it is imported (sys.exit({error.code!r})); guard that with "
            "if __name__ == '__main__'"
        ) from error
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        _keep_siblings(file.parent)
    _loaded[file] = module, _stamp(file)
    _register(module)
    return module


def user_folders() -> list[str]:
    """Folders of the files loaded so far."""
    return list(dict.fromkeys(str(file.parent) for file in _loaded))


def files_with(path: Path) -> list[Path]:
    """A Python file and what was imported from its folder by users' files, as far as it is loaded."""
    file = path.expanduser().resolve()
    beside = sorted(other for other, (_, _, home) in _siblings.items() if home == file.parent and other != file)
    return [file, *(beside if file in _loaded else ())]


def pickle_by_value_with(register: Callable[[ModuleType], object]) -> None:
    """Have `register` called for every file, those loaded before and after.

    For picklers with a registry of their own: Ray's cloudpickle is a copy that knows nothing of the original's.
    """
    if register in _by_value:
        return
    _by_value.append(register)
    for module in (*(loaded[0] for loaded in _loaded.values()), *(sibling[0] for sibling in _siblings.values())):
        register(module)


def _register(module: ModuleType) -> None:
    for register in _by_value:
        register(module)


def _stamp(file: Path) -> _Stamp:
    try:
        found = file.stat()
    except OSError:  # Deleted since: what was loaded stays as it was.
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _forget_what_changed(folder: Path) -> None:
    """Have a changed file executed again; where a module beside it changed, all files of the folder."""
    stale = [file for file, (_, stamp) in _loaded.items() if file.parent == folder and _stamp(file) != stamp]
    beside = [file for file, (_, _, home) in _siblings.items() if home == folder]
    if any(_stamp(file) != _siblings[file][1] for file in beside):
        stale = [file for file in _loaded if file.parent == folder]
        for file in beside:
            sys.modules.pop(_siblings.pop(file)[0].__name__, None)
    for file in stale:
        del _loaded[file]


def _keep_siblings(folder: Path) -> None:
    """Pickle by value what was imported from the folder; an environment inside it is no part of it."""
    installed = [Path(place).resolve() for place in (sys.prefix, sys.base_prefix)]
    for module in list(sys.modules.values()):
        source = getattr(module, "__file__", None)
        if not source or not source.startswith(f"{folder}/") or module.__name__.split(".")[0] in (*OURS, "__main__"):
            continue
        file = Path(source)
        if file in _loaded or file in _siblings or any(place in file.resolve().parents for place in installed):
            continue
        if sys.modules.get(module.__name__) is module and "site-packages" not in file.parts:
            _siblings[file] = module, _stamp(file), folder
            _register(module)


def _check_names(folder: Path) -> None:
    """Raise ValueError where an import would find another module than the one in the folder."""
    taken = {name: Path(__file__).parents[1] for name in OURS}
    taken |= {module.__name__: home for module, _, home in _siblings.values() if "." not in module.__name__}
    for name, home in taken.items():
        for file in (folder / f"{name}.py", folder / name / "__init__.py"):
            if file.is_file() and home != folder:
                raise ValueError(
                    f"{file} and the module {name!r} in {home} have one name, and a process has one module of a name; "
                    f"rename one of them"
                )
