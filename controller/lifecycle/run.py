"""A run from its folder to its summary: everything that it opens, it closes.

claim the folder ─> cluster ─> session ─> run_in_progress.py ─> summary.json, trace.json, feedback to the planner
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controller.cluster.local import Local
from controller.cluster.machine import settled_on_cluster
from controller.cluster.stacks import stacks_on_demand
from controller.lifecycle.checkpoint_store import store_of
from controller.lifecycle.disk_space import said_of_disk
from controller.lifecycle.plan_feedback import write_feedback
from controller.lifecycle.preemption import Notices
from controller.lifecycle.run_folder import Beginning, claim_folder, steps_from
from controller.lifecycle.run_in_progress import Progress, RunInProgress, StepDisplay
from controller.lifecycle.session import slots_needed, start_session
from controller.lifecycle.startup import StartUp
from controller.lifecycle.uploads import Uploads
from controller.record.metrics import MetricsWriter
from controller.record.prometheus import PrometheusEndpoint
from controller.record.tracking import new_tracker
from rlhf_dist.compose import Launch
from rlhf_dist.data.of_launch import with_steps_of_epochs
from rlhf_dist.durable_files import write_durably

if TYPE_CHECKING:
    from controller.cluster.start import Cluster


def run(
    launch: Launch, display: StepDisplay, *, eager: bool = False, local: bool = False, began_s: float | None = None
) -> dict[str, Any]:
    """Run a launch to its end and return its summary, which is also written to summary.json.

    eager: line by line. local: in this process, for a launch that `local_launch` made. began_s: when the command was
    started, seconds since 1970.

    Raises NodeError, WorkerLost or ClusterError for what failed; KeyboardInterrupt, and Preempted which is one, pass
    through once every process that was started has ended.
    """
    launch, startup = with_steps_of_epochs(launch), StartUp(display, began_s)
    with claim_folder(launch, display.note) as beginning:
        launch = replace(launch, run=replace(launch.run, steps=steps_from(launch, beginning.sources)))
        with said_of_disk(beginning.folder):
            return _run_in(beginning, launch, startup, eager, local)


def _cluster(launch: Launch, folder: Path) -> Cluster:
    from controller.cluster.start import Cluster  # imports Ray, which a local run does not need

    return Cluster(launch.run.ray, slots_needed(launch), launch.run.placement.host_processes, folder / "logs")


def _run_in(beginning: Beginning, launch: Launch, display: StartUp, eager: bool, local: bool) -> dict[str, Any]:
    folder, first_step = beginning.folder, beginning.first_step
    started = time.perf_counter()
    tracker = new_tracker(launch.run.output.tracker, launch.run.name, folder, {"settings": launch.yaml}, display.note)
    progress = Progress()
    cluster = Local(launch.run.ray.call_timeout_s) if local else _cluster(launch, folder)
    display.phase("this process" if local else "Ray")
    notices = Notices(launch.run.output.notice_file, launch.run.output.notice_s)
    # After the cluster: Ray sets a SIGTERM handler of its own when it starts.
    with (
        ExitStack() as leaving,
        _endpoint(launch, folder, display.note) as endpoint,  # before the cluster: a port may be taken
        cluster,
        notices.heard(),
        MetricsWriter(folder, first_step, tracker, display.note, endpoint) as writer,
        stacks_on_demand(folder, lambda: cluster.pools, cluster.replies),
    ):
        if not isinstance(cluster, Local):
            if launch.run.ray.address is not None:
                launch = settled_on_cluster(launch, display.note)
                cluster.slots = slots_needed(launch)
            counts = f"{slots_needed(launch)} slots and {cluster.host_processes} host processes"
            display.phase(f"processes: {counts}, {cluster.about}")
        session = start_session(launch, cluster, display.phase)
        uploads = _uploads(launch, display.note)
        if uploads is not None:
            leaving.enter_context(uploads)
            if beginning.checkpoint is not None:
                uploads.add_missing(beginning.checkpoint)
        run_of = RunInProgress(
            launch, session, beginning, writer, display, progress, eager, cluster.metrics, uploads, notices
        )
        run_of.execute()
    summary = {
        "name": launch.run.name,
        "folder": str(folder),
        "recipe": launch.recipe.name,
        "steps": launch.run.steps,
        "seed": launch.run.seed,
        "wall_s": round(time.perf_counter() - started, 2),
        "step_s": round(progress.seconds / max(progress.steps, 1), 4),
        "tokens_per_s": round(progress.tokens / progress.seconds, 1) if progress.seconds else 0.0,
        "first": progress.first,
        "last": progress.last,
        "evaluations": progress.evaluations,
        "steps_without_signal": progress.warnings.steps,
        "auto": {key: choice.value for choice in launch.choices for key in choice.keys},
        "startup_s": {part: round(seconds, 2) for part, seconds in display.seconds.items()},
        **progress.recoveries,
    }
    if uploads is not None:
        summary["store"] = {"place": uploads.place, "steps": uploads.done, "failed": uploads.failed}
    if progress.timeline is not None:
        summary |= {"idle_share": progress.timeline.idle_share(), "critical_path_s": progress.timeline.critical_path()}
        _write_json(folder / "trace.json", {"traceEvents": progress.timeline.events()})
        if progress.steps:
            write_feedback(launch, folder, progress.node_seconds, progress.seconds / progress.steps, progress.last)
    _write_json(folder / "summary.json", summary)
    return summary


def _endpoint(
    launch: Launch, folder: Path, tell: Callable[[str], None]
) -> AbstractContextManager[PrometheusEndpoint | None]:
    output = launch.run.output
    if output.prometheus_port is None:
        return nullcontext()
    endpoint = PrometheusEndpoint(launch.run.name, folder, output.prometheus_host, output.prometheus_port)
    tell(f"metrics for Prometheus: {endpoint.url}")
    return endpoint


def _uploads(launch: Launch, tell: Callable[[str], None]) -> Uploads | None:
    output = launch.run.output
    store = store_of(output, launch.run.name)
    if store is None:
        return None
    return Uploads(store, keep=output.keep_checkpoints, retry_s=output.store_retry_s, tell=tell)


def _write_json(path: Path, data: Any) -> None:
    write_durably(path, json.dumps(data, indent=2))
