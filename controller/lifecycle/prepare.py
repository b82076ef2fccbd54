"""From what a person wrote to a launch that was checked: settings, graph, machine, memory, passes over the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch
    from rlhf_dist.hardware import Cluster


def prepared(
    recipe: str,
    overrides: Sequence[str],
    config: str | Sequence[Mapping[str, Any]] | None = None,
    *,
    local: bool = False,
    eager: bool = False,
    cluster: Cluster | None = None,
) -> tuple[Launch, list[str]]:
    """The launch and its plan, as lines for people.

    config: see `compose`. local: in this process, line by line. eager: line by line. cluster: one that is described.

    Raises ConfigError, GraphError or another ValueError for what cannot run.
    """
    from controller.cluster.local import local_launch
    from rlhf_dist.auto_settings import settle
    from rlhf_dist.checks import check_launch
    from rlhf_dist.data import with_steps_of_epochs
    from rlhf_dist.dataflow.trace import rehearsal
    from rlhf_dist.machine import described_machine
    from rlhf_dist.planner.launch import compose_planned
    from rlhf_dist.planner.launch_memory import here_lines, memory_lines

    with rehearsal() if eager or local else nullcontext():
        launch = compose_planned(recipe, overrides, config)
    launch = local_launch(launch, overrides) if local else launch
    launch = settle(launch, described_machine(cluster)) if cluster else launch
    plan = check_launch(launch, cluster)
    memory = memory_lines(launch, cluster) if cluster else here_lines(launch)
    # Reads all rows, so only of a launch that is right otherwise.
    counted = with_steps_of_epochs(launch)
    plan = plan if counted is launch else check_launch(counted)
    return counted, [*plan, *memory]
