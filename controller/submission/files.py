"""What travels with a job: the folders of the Python files it names, and every file named by a relative path.

    here (where the command runs)          the job's working folder on the cluster
      project/mine.py  sibling.py    -->     project/mine.py  sibling.py       as `rlhf-dist run project/mine.py`
      prompts.jsonl  (data.train.path) -->   prompts.jsonl                     found under the same relative path
      /data/big.parquet              ...     /data/big.parquet                 absolute: the cluster has it

Left out of a folder: what its .gitignore and .rayignore files name, hidden files, environments and caches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pathspec
import yaml

from rlhf_dist.recipe_files import parse_spec
from rlhf_dist.typed import ConfigError

MOST_BYTES = 100 << 20
"""What a job may bring along; more belongs on storage that the cluster sees."""
MOST_FILES = 10_000
IGNORE_FILES = (".gitignore", ".rayignore")
ALWAYS_LEFT_OUT = ("__pycache__", "node_modules")
PATH_KEYS = ("path", "function", "reward", "generator", "calibration", "placement")
"""Settings (by the last part of their key) that name a file."""
LARGEST = 3


@dataclass(frozen=True)
class JobFiles:
    """The files of a job."""

    files: Mapping[Path, Path]
    """Path in the job's folder -> file here."""
    spec: str
    """The recipe, as it is named there."""
    left_out: int
    """Files and folders that an ignore file, or their name, kept here."""

    def __str__(self) -> str:
        names = sorted(map(str, self.files))
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        size = _size(sum(file.stat().st_size for file in self.files.values()))
        left = f"; {self.left_out} left out (hidden, or named in {' or '.join(IGNORE_FILES)})" if self.left_out else ""
        return f"{len(names)} files, {size}: {shown}{left}"


def job_files(spec: str, settings: str, overrides: Sequence[str], here: Path) -> JobFiles:
    """What the launch of `spec` with `settings` (YAML) takes along from `here`, an absolute folder.

    Raises ConfigError where that is too much, naming the largest files, and for a relative path out of `here`.
    """
    files, left_out, walked = dict[Path, Path](), 0, set[Path]()
    named = [Path(text) for text in _named_paths(settings, overrides, here)]
    recipe = parse_spec(spec)
    if recipe is not None:
        inside = recipe.path.is_relative_to(here)
        where = recipe.path.relative_to(here) if inside else Path(recipe.path.parent.name) / recipe.path.name
        spec = str(where) + (f":{recipe.name}" if recipe.name else "")
        left_out += _add_folder(files, recipe.path.parent, where.parent)
        walked.add(recipe.path.parent)
        for source in (recipe.path, recipe.path.with_suffix(".yaml")):
            if source.is_file():
                files[where.with_name(source.name)] = source
    for path in named:
        source = here / path
        if not source.exists():
            continue  # The job says so, if it needs it.
        if not source.resolve().is_relative_to(here.resolve()):
            raise ConfigError(
                f"{path} lies outside of {here}, so it has no place in the job's folder; run the command from a folder "
                f"above it, or give an absolute path that the cluster sees"
            )
        if path.suffix == ".py" and source.parent not in walked:
            left_out += _add_folder(files, source.parent, path.parent)
            walked.add(source.parent)
        found = [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]
        files |= {Path(os.path.normpath(file.relative_to(here))): file for file in found}
    _check_size(files)
    return JobFiles(files, spec, left_out)


def _named_paths(settings: str, overrides: Sequence[str], here: Path) -> Iterator[str]:
    """Relative paths in the settings; of `file.py:name` the file, of a pattern its matches."""
    placements = [("placement", text.partition("=")[2]) for text in overrides if text.startswith("placement=")]
    for key, value in [*_leaves("", yaml.safe_load(settings)), *placements]:
        if key not in PATH_KEYS or not isinstance(value, str):
            continue
        for text in [value, *value.split(",")]:
            path = text.strip()
            path = path.rpartition(":")[0] if ".py:" in path else path
            if not path or path.startswith(("/", "~")):
                continue
            if any(sign in path for sign in "*?["):
                yield from (str(match.relative_to(here)) for match in sorted(here.glob(path)))
            else:
                yield path


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _leaves(str(name), entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _leaves(key, entry)
    else:
        yield key, value


def _add_folder(files: dict[Path, Path], folder: Path, where: Path) -> int:
    """Add what is in `folder`, as `where`; returns how many entries were left out."""
    specs: dict[Path, pathspec.GitIgnoreSpec] = {}
    left_out = 0
    for root, folders, names in os.walk(folder):
        here = Path(root)
        lines = [line for name in IGNORE_FILES if name in names for line in _lines(here / name)]
        specs[here] = pathspec.GitIgnoreSpec.from_lines(lines)

        def ignored(path: Path, suffix: str = "") -> bool:
            above = [folder, *(folder / part for part in reversed(path.relative_to(folder).parents) if part != Path())]
            return any(
                parent in specs and specs[parent].match_file(str(path.relative_to(parent)) + suffix) for parent in above
            )

        for name in list(folders):
            path = here / name
            environment = (path / "pyvenv.cfg").is_file() or name in ALWAYS_LEFT_OUT
            if name.startswith(".") or environment or ignored(path, "/"):
                folders.remove(name)
                left_out += not environment
        for name in names:
            if name.startswith(".") or name.endswith(".pyc") or ignored(here / name):
                left_out += name not in IGNORE_FILES
            elif (here / name).is_file():
                files[Path(os.path.normpath(where / (here / name).relative_to(folder)))] = here / name
        if len(files) > MOST_FILES:
            raise ConfigError(
                f"{folder} has more than {MOST_FILES} files, too many for a job; name what it does not need in a "
                f".rayignore file, or give the recipe a folder of its own"
            )
    return left_out


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines()


def _check_size(files: Mapping[Path, Path]) -> None:
    sizes = {path: file.stat().st_size for path, file in files.items()}
    if sum(sizes.values()) <= MOST_BYTES:
        return
    largest = sorted(sizes, key=lambda path: -sizes[path])[:LARGEST]
    each = ", ".join(f"{path} ({_size(sizes[path])})" for path in largest)
    raise ConfigError(
        f"a job brings at most {_size(MOST_BYTES)}, this one has {_size(sum(sizes.values()))}; the largest: {each}. "
        f"Name what it does not need in a .rayignore file, and give large data and models by absolute paths that the "
        f"cluster sees"
    )


def _size(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB" if count >= 1 << 20 else f"{count / 1024:.1f} KiB"
