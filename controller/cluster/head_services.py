"""A Ray of the run's own starts without the services of a cluster that people look at, and in groups of its own.

    gcs_server, raylet, its two agents      needed
    API server, autoscaler, log monitor     a Python process each, at the head alone: for a dashboard, `ray status` and
                                            logs in the output of the driver, which a run on one machine turns off

`ray.init` waits for the API server before it starts the raylet, even with include_dashboard=False, and has no setting
that leaves these out: here the three methods of its `Node` that start them do nothing. Half of the seconds of
`ray.init`, and 2.6 s of processor time, on two cores.

`timeout`, a terminal and many supervisors send SIGTERM to the whole process group of what they started. The driver
saves and ends; its head and its raylet, which it still needs for that, are not to hear it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

SERVICES = ("start_api_server", "start_monitor", "start_log_monitor")


@contextmanager
def without_head_services() -> Iterator[None]:
    """`ray.init` inside starts none of them, and each of the others in a process group of its own."""
    from ray._private import services
    from ray._private.node import Node

    popen = services.ConsolePopen
    before: list[tuple[Any, str, Any]] = [(Node, service, getattr(Node, service)) for service in SERVICES]
    before.append((services, "ConsolePopen", popen))
    try:
        for service in SERVICES:
            setattr(Node, service, _nothing)
        setattr(services, "ConsolePopen", partial(popen, process_group=0))  # noqa: B010  mypy takes it for a class
        yield
    finally:
        for owner, name, kept in before:
            setattr(owner, name, kept)


def _nothing(node: Any, *args: Any, **kwargs: Any) -> None:
    """In place of a method of Ray's."""
