"""A Ray of the run's own has no API server, autoscaler and log monitor: Ray's pinned version starts them in methods.
What is sent to the driver's process group is not for it."""

from __future__ import annotations

import inspect
import os

from ray._private import services
from ray._private.node import Node

from controller.cluster.head_services import SERVICES, without_head_services


def test_ray_starts_these_services_in_methods_of_its_node_that_do_nothing_for_us() -> None:
    before = [getattr(Node, service) for service in SERVICES]
    starting = inspect.getsource(Node.start_head_processes) + inspect.getsource(Node.start_ray_processes)
    assert all(f"self.{service}(" in starting for service in SERVICES), "Ray starts them elsewhere now"
    with without_head_services():
        assert all(getattr(Node, service)(None, include_dashboard=False) is None for service in SERVICES)
    assert [getattr(Node, service) for service in SERVICES] == before


def test_its_processes_are_in_groups_of_their_own() -> None:
    before = services.ConsolePopen
    assert "ConsolePopen(" in inspect.getsource(services.start_ray_process), "Ray starts them otherwise now"
    with without_head_services(), services.ConsolePopen(["sleep", "60"]) as started:
        assert os.getpgid(started.pid) == started.pid != os.getpgrp()
        started.kill()
    assert services.ConsolePopen is before
