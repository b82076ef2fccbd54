"""Rows of data files, each with the place it was read from: Parquet, JSON lines, JSON lists and Arrow.

data/train.parquet            a file
data                          a folder: its data files, in the order of their names
data/train-*.parquet          a pattern
a.jsonl,more/*.jsonl.gz       several of these
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".arrow")
SPLITS = {"train": "train", "test": "test", "eval": "test", "validation": "test", "valid": "test", "val": "test"}
"""First word of a file's name -> what people keep apart."""
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json")
"""What the library `datasets` writes beside its files."""
CHUNK = 1000
"""Rows of a Parquet file read at once."""

RawRow = dict[str, Any]


class Placed(NamedTuple):
    """A raw row and where it is, for messages: `data.jsonl, line 3`."""

    place: str
    row: RawRow


def data_files(path: str) -> list[Path]:
    """The files that `path` names, each once. Raises ValueError for what is not there or cannot be meant."""
    whole = Path(path).expanduser()
    names = [path] if whole.exists() else [name.strip() for name in path.split(",") if name.strip()]
    found = [file for name in names for file in _files_of(name)]
    if not found:
        raise ValueError(f"no data file {path!r}")
    return list(dict.fromkeys(found))


def read_files(files: list[Path]) -> Iterator[Placed]:
    """All rows, file after file. Raises ValueError naming file and line (or row) of what cannot be read."""
    for file in files:
        try:
            yield from _reader(file)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error


def _files_of(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _files_in(path)
    if not path.is_file():
        matching = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matching:
            raise ValueError(f"no data file {name!r} (looked for {path.resolve()})")
        return [file for match in matching for file in (_files_in(match) if match.is_dir() else [_known(match)])]
    return [_known(path)]


def _files_in(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if _suffix(file) and file.name not in NOT_DATA]
    if not files:
        raise ValueError(f"folder {str(folder)!r} has no data files ({', '.join(SUFFIXES)})")
    if len(kinds := sorted({_suffix(file) for file in files})) > 1:
        raise ValueError(
            f"folder {str(folder)!r} holds {' and '.join(kinds)} files, perhaps the same rows twice; "
            f"give a pattern such as {str(folder / ('*' + kinds[0]))!r}"
        )
    words = {split for file in files if (split := SPLITS.get(re.split(r"[-_.]", file.name.lower())[0]))}
    if len(words) > 1:
        raise ValueError(
            f"folder {str(folder)!r} holds training and test files ({files[0].name}, ...); "
            f"give a pattern such as {str(folder / 'train*')!r}"
        )
    return files


def _suffix(file: Path) -> str:
    """The ending we read it by; "" for another kind of file."""
    return max((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), key=len, default="")


def _known(file: Path) -> Path:
    if not _suffix(file):
        raise ValueError(f"a data file is one of {', '.join(SUFFIXES)}, got {str(file)!r}")
    return file


def _reader(file: Path) -> Iterator[Placed]:
    suffix = _suffix(file)
    if suffix in (".parquet", ".arrow"):
        return _read_table(file)
    if suffix == ".json" and _begins_list(file):
        return _read_list(file)
    return _read_lines(file, compressed=suffix.endswith(".gz"))


def _read_table(file: Path) -> Iterator[Placed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        if _suffix(file) == ".parquet":
            batches = pq.ParquetFile(file).iter_batches(batch_size=CHUNK)
        else:
            batches = pa.ipc.open_stream(pa.memory_map(str(file)))
        for batch in batches:
            for row in batch.to_pylist():
                yield Placed(f"{file}, row {number}", row)
                number += 1
    except (pa.ArrowException, OSError) as error:
        kind = "Parquet" if _suffix(file) == ".parquet" else "an Arrow stream"
        raise ValueError(f"{file} cannot be read as {kind} (after {number} rows): {error}") from error


def _read_lines(file: Path, *, compressed: bool) -> Iterator[Placed]:
    with gzip.open(file) if compressed else file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{place} is not UTF-8 ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{place} is not JSON ({error.msg} at column {error.colno})") from error
            yield _checked(place, row)


def _begins_list(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(1 << 12).lstrip()[:1] == b"["


def _read_list(file: Path) -> Iterator[Placed]:
    """One JSON list of objects. A file of lines may begin with a bracket too: then its first line is the fault."""
    try:
        rows = json.loads(file.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    for number, row in enumerate(rows):
        yield _checked(f"{file}, row {number}", row)


def _checked(place: str, row: Any) -> Placed:
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be an object with named fields, got {str(row)[:80]!r}")
    return Placed(place, row)
