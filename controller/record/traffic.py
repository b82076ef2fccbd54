"""How many bytes pass through the controller: everything Ray serialises or deserialises in this process.

with ControllerTraffic() as traffic: run_steps(...)
traffic.sent, traffic.received          bytes; rows and shards count, tokens must not
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import ray


class ControllerTraffic:
    """Counts while it is entered. Needs an initialised Ray."""

    def __init__(self) -> None:
        self.sent = 0
        """Bytes of arguments and puts."""
        self.received = 0
        """Bytes of results."""

    def __enter__(self) -> ControllerTraffic:
        self._context: Any = ray._private.worker.global_worker.get_serialization_context()
        self._serialize, self._deserialize = self._context.serialize, self._context.deserialize_objects

        def serialize(value: Any) -> Any:
            made = self._serialize(value)
            self.sent += made.total_bytes
            return made

        def deserialize(serialized: Any, *rest: Any) -> Any:
            self.received += sum(len(entry.data) for entry in serialized if entry.data is not None)
            return self._deserialize(serialized, *rest)

        self._context.serialize, self._context.deserialize_objects = serialize, deserialize
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.serialize, self._context.deserialize_objects = self._serialize, self._deserialize
