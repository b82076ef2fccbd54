"""Finding recipes: our own by name, a user's by path.

    ppo                    the module recipes/FAMILY/ppo.py, whatever its family
    dpo/ipo                that of dpo, under the settings of the variant ipo (catalogue.py)
    tulu3                  the file of stages recipes/FAMILY/tulu3.yaml
    path/to/mine.py        a file anywhere with one @recipe
    path/to/mine.py:name   one of several

`recipes` is looked up by name at run time, so that this package never imports the floor above it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rlhf_dist.catalogue import Paper, papers_of
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.python_files import load_file
from rlhf_dist.typed import ConfigError, unknown

PACKAGE = "recipes"
STAGES = (".yaml", ".yml")
"""How a file of stages (`stages.py`) ends, which may stand where a recipe does."""


class RecipeFile(NamedTuple):
    """A user's recipe as it was named on the command line."""

    path: Path
    name: str | None


def parse_spec(spec: str) -> RecipeFile | None:
    """The file and the recipe in it, or None for the name of one of our recipes."""
    path, name = spec, ""
    if not spec.endswith(".py") and ":" in spec:
        path, _, name = spec.rpartition(":")
    return RecipeFile(Path(path).expanduser().resolve(), name or None) if path.endswith(".py") else None


def recipes_folder() -> Path:
    """Folder of our recipes, with a folder for each family."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the package `recipes` is not installed; install rlhf-dist as a whole (pip install -e .)")
    return Path(next(iter(spec.submodule_search_locations)))


def list_recipes() -> dict[str, Path]:
    """Our recipes: name -> file, in the order of the names. Raises ConfigError where two have one name."""
    found: dict[str, Path] = {}
    for path in sorted(recipes_folder().glob("*/*.py"), key=lambda path: path.stem):
        if path.stem.startswith("_"):
            continue
        if path.stem in found:
            raise ConfigError(f"{path} and {found[path.stem]} have one name, and recipes are found by it; rename one")
        found[path.stem] = path
    return found


def list_stage_files() -> dict[str, Path]:
    """Our files of stages: name -> file. A YAML beside a recipe is that recipe's, and no file of stages."""
    files = sorted(recipes_folder().glob("*/*.yaml"), key=lambda path: path.stem)
    return {path.stem: path for path in files if not path.with_suffix(".py").exists()}


def stages_of(spec: str) -> str:
    """The file of stages that `spec` names, if it is one of ours by name; else `spec` as it is."""
    return str(list_stage_files()[spec]) if "/" not in spec and spec in list_stage_files() else spec


def load_papers() -> dict[str, tuple[Paper, Path]]:
    """All that our recipes and files of stages declare: the name to launch -> paper and file."""
    found: dict[str, tuple[Paper, Path]] = {}
    for name, file in list_recipes().items():
        for key, paper in papers_of(_import_ours(file)).items():
            found[name if key == name else f"{name}/{key}"] = paper, file
    for name, file in list_stage_files().items():
        declared = papers_of(_import_ours(file.parent / "__init__.py"))
        if name in declared:
            found[name] = declared[name], file
    return found


def split_variant(spec: str) -> tuple[str, str | None]:
    """`dpo/ipo` -> (`dpo`, `ipo`); (`spec`, None) for anything that is no variant of one of our recipes."""
    name, slash, variant = spec.partition("/")
    return (name, variant) if slash and parse_spec(spec) is None and name in list_recipes() else (spec, None)


def variant_settings(spec: str) -> Mapping[str, Any]:
    """Settings of the variant that `spec` names; none for a recipe by itself. Raises ConfigError for one there is
    not."""
    name, variant = split_variant(spec)
    if variant is None:
        return {}
    papers = papers_of(_import_ours(list_recipes()[name]))
    if variant not in papers or variant == name:
        others = [f"{name}/{key}" for key in papers if key != name]
        raise ConfigError(f"{unknown(spec, others, 'variant')}; {name} has {', '.join(others) or 'none'}")
    return papers[variant].settings


def list_families() -> dict[str, str]:
    """Families of our recipes: name -> what it holds, the first line of its package."""
    packages = sorted(recipes_folder().glob("*/__init__.py"))
    return {path.parent.name: (ast.get_docstring(ast.parse(path.read_text())) or "") for path in packages}


def file_of(spec: str) -> Path:
    """The file of the recipe `spec`, which is one of ours or a user's."""
    file = parse_spec(spec)
    return list_recipes()[split_variant(spec)[0]] if file is None else file.path


def family_of(file: Path) -> str | None:
    """The family of one of our recipes; None for a user's file."""
    folder = file.resolve().parent
    return folder.name if folder.parent == recipes_folder().resolve() else None


def load_recipe(spec: str) -> Recipe:
    """The recipe `spec` names. Raises ConfigError if there is none, or if its file cannot be loaded."""
    file = parse_spec(spec)
    where, found = _recipes_in(spec)
    return _choose(found, where, file.name) if file else _choose(found, where, None, prefer=split_variant(spec)[0])


def load_recipes(spec: str) -> list[Recipe]:
    """All recipes of the file that `spec` names, or the one it names in it. Raises as `load_recipe`."""
    file = parse_spec(spec)
    where, found = _recipes_in(spec)
    return [_choose(found, where, file.name)] if file and file.name else list(found.values())


def _recipes_in(spec: str) -> tuple[str, dict[str, Recipe]]:
    """What errors call the file of `spec`, and its recipes by name; at least one."""
    if spec.endswith(STAGES):
        raise ConfigError(f"{spec} is a file of stages, which `rlhf-dist run` and `check` take; name one recipe here")
    file = parse_spec(spec)
    if file is not None:
        where, module = str(file.path), _load_users(file.path)
    else:
        names, (name, _) = list_recipes(), split_variant(spec)
        if name not in names:
            variants = [one for one in load_papers() if one.endswith(f"/{name}")]
            if variants:
                raise ConfigError(f"unknown recipe {name}; did you mean {' or '.join(variants)}?")
            message = unknown(name, names, "recipe")  # where nothing is like it, all names: a screenful
            message = message if "did you mean" in message else f"unknown recipe {name}."
            raise ConfigError(
                f"{message} `rlhf-dist recipes --search TEXT` lists those there are ({len(names)}); one of your own is "
                "named by its file, path/to/mine.py"
            )
        where, module = f"recipe {name}", _import_ours(names[name])
    found = {
        value.name: value
        for value in vars(module).values()
        if isinstance(value, Recipe) and value.function.__module__ == module.__name__
    }
    if not found:
        raise ConfigError(f"{where} has no function marked @recipe (from rlhf_dist.dataflow.recipe import recipe)")
    return where, found


def _import_ours(file: Path) -> ModuleType:
    """The module of one of our files, by its name below `recipes`."""
    inside = file.relative_to(recipes_folder()).with_suffix("")
    parts = inside.parts[:-1] if inside.name == "__init__" else inside.parts
    return importlib.import_module(".".join((PACKAGE, *parts)))


def _load_users(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"recipe file {path} does not exist")
    try:
        return load_file(path)
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except GraphError:
        raise
    except Exception as error:
        raise ConfigError(f"{_place(error, path)}: {type(error).__name__}: {error}") from error


def _choose(found: dict[str, Recipe], where: str, name: str | None, prefer: str = "") -> Recipe:
    if name is not None and name not in found:
        raise ConfigError(f"{where} has no recipe {name}; it has {', '.join(found)}")
    if name is None and len(found) > 1 and prefer not in found:
        raise ConfigError(f"{where} has {len(found)} recipes ({', '.join(found)}); say which, as {where}:NAME")
    return found[name or (prefer if prefer in found else next(iter(found)))]


def _place(error: Exception, path: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)
