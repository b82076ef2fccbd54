"""A Ray of the run's own starts without the services of a cluster that people look at.

    gcs_server, raylet, its two agents      needed
    API server, autoscaler, log monitor     a Python process each, at the head alone: for a dashboard, `ray status` and
                                            logs in the output of the driver, which a run on one machine turns off

`ray.init` waits for the API server before it starts the raylet, even with include_dashboard=False, and has no setting
that leaves these out: here the three methods of its `Node` that start them do nothing. Half of the seconds of
`ray.init`, and 2.6 s of processor time, on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SERVICES = ("start_api_server", "start_monitor", "start_log_monitor")


@contextmanager
def without_head_services() -> Iterator[None]:
    """`ray.init` inside starts none of them."""
    from ray._private.node import Node

    before = {service: getattr(Node, service) for service in SERVICES}
    try:
        for service in SERVICES:
            setattr(Node, service, _nothing)
        yield
    finally:
        for service, method in before.items():
            setattr(Node, service, method)


def _nothing(node: Any, *args: Any, **kwargs: Any) -> None:
    """In place of a method of Ray's."""
