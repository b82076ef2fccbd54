"""Whether Ray's head (its GCS) still answers. Ray itself waits for a minute, then ends the driver without a word."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

from rlhf_dist.process_state import Exits

EVERY_S = 2.0
"""Between two questions."""
ANSWER_S = 5.0
"""Limit of an answer."""
LOST_S = 20.0
"""Without an answer for so long, the head is lost."""


class HeadWatch:
    """Asks the head, in a thread of its own."""

    def __init__(self, exits: Exits) -> None:
        """exits: sees the end of the head's process, where that runs on this machine."""
        import ray
        from ray._private import worker

        self.address = str(ray.get_runtime_context().gcs_address)
        self._exits, self._pid = exits, 0
        node: Any = getattr(worker, "_global_node", None)
        if node is not None and node.head:
            for started in node.all_processes.get("gcs_server", []):
                self._pid = int(started.process.pid)
            exits.watch([self._pid])
        self._said = ""
        self._over = threading.Event()
        self._answered_s = time.monotonic()
        threading.Thread(target=self._run, name="head watch", daemon=True).start()

    @property
    def lost(self) -> str:
        """What is known of its end; empty while it answers."""
        state = self._exits.state(self._pid) if self._pid else None
        if state is not None and not state.alive:
            return f"Ray's head (GCS, pid {self._pid}, at {self.address}) {state.text}"
        return self._said

    def close(self) -> None:
        """Ask no more."""
        self._over.set()

    def _run(self) -> None:
        import grpc
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

        messages: Any = gcs_service_pb2  # made at run time, without types
        channel: Any = init_grpc_channel(self.address)
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        while not self._over.wait(EVERY_S):
            with suppress(grpc.RpcError):
                stub.CheckAlive(messages.CheckAliveRequest(), timeout=ANSWER_S)
                self._answered_s = time.monotonic()
            silent_s = time.monotonic() - self._answered_s
            state = self._exits.state(self._pid) if self._pid else None
            how = f" ({state.text})" if state is not None and state.stopped else ""
            self._said = (
                f"Ray's head (GCS) at {self.address} has not answered for {silent_s:.0f} s{how}"
                if silent_s > LOST_S
                else ""
            )
        channel.close()
