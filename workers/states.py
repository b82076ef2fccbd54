"""Values of a State: numbers with the controller, the rest in the object store, all of them in checkpoints.

step_40/states/buffer/values.json     numbers, texts, lists and mappings of them
                      arrays.npz      arrays
                      rows.parquet    a batch called `rows`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch
from rlhf_dist.wire import HeldState, numbers_in
from workers.store import Store


def held_state(values: Mapping[str, Any], store: Store) -> HeldState:
    """What the controller is given of `values`."""
    numbers = numbers_in(values)
    return HeldState(numbers, None if len(numbers) == len(values) else store.put(dict(values)))


def values_of(held: HeldState, store: Store) -> Mapping[str, Any]:
    """All values of a state."""
    if held.ref is None:
        return {**held.numbers, **held.first}
    values: Mapping[str, Any]
    (values,) = store.get([held.ref])
    return values


def check_values(state: str, values: Any) -> None:
    """Raises ValueError for what a state cannot hold, naming the value."""
    if not isinstance(values, Mapping):
        raise ValueError(f"an op of {state} returns (values, metrics or a HostResult); its values are {values!r}")
    for key, value in values.items():
        if isinstance(value, Batch) or (isinstance(value, np.ndarray) and value.dtype != object):
            continue
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError) as error:
            raise ValueError(f"{state} cannot hold {key!r}, {type(value).__name__}: {error}; {_HOLDS}") from error
        if not same and value == value:
            raise ValueError(f"{state} cannot hold {key!r} as it is: a checkpoint would give it back changed; {_HOLDS}")


_HOLDS = "it holds numbers, texts, arrays, batches, and lists and mappings (keys are texts) of numbers and texts"


def write_state(folder: Path, values: Mapping[str, Any]) -> None:
    """Write `values` to a new folder."""
    folder.mkdir(parents=True)
    batches = {key: value for key, value in values.items() if isinstance(value, Batch)}
    arrays = {key: value for key, value in values.items() if isinstance(value, np.ndarray)}
    plain = {key: value for key, value in values.items() if key not in batches and key not in arrays}
    for key, batch in batches.items():
        batch.write_parquet(folder / f"{key}.parquet")
    if arrays:
        np.savez(folder / "arrays.npz", allow_pickle=False, **arrays)
    (folder / "values.json").write_text(json.dumps(plain))


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote."""
    values: dict[str, Any] = json.loads((folder / "values.json").read_text())
    if (folder / "arrays.npz").is_file():
        with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
            values |= {key: arrays[key] for key in arrays.files}
    values |= {file.stem: Batch.read_parquet(file) for file in folder.glob("*.parquet")}
    return values
