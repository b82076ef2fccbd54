"""Where columns lie between the op that writes them and those that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

PULL_TIMEOUT_S = 300.0
"""Longest wait for rows that another process wrote; they are there already unless that process died."""


class Store(Protocol):
    """Columns by reference."""

    def put(self, columns: Any) -> Any:
        """Keep columns, or a state's values; the reference travels through the controller to whoever reads them."""
        ...

    def get(self, refs: Sequence[Any]) -> list[Any]:
        """What references stand for."""
        ...


class RayStore:
    """Shared memory of the node, moved between nodes by Ray."""

    def put(self, columns: Any) -> Any:
        """See Store."""
        import ray

        return ray.put(columns)

    def get(self, refs: Sequence[Any]) -> list[Any]:
        """See Store."""
        import ray

        return list(ray.get(list(refs), timeout=PULL_TIMEOUT_S))


class LocalStore:
    """This process: a column is its own reference, and is gone with the last of them."""

    def put(self, columns: Any) -> Any:
        """See Store."""
        return columns

    def get(self, refs: Sequence[Any]) -> list[Any]:
        """See Store."""
        return list(refs)
