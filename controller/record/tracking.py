"""Trackers beside metrics.jsonl: TensorBoard; Weights & Biases and MLflow (extra `tracking`), Trackio (extra `trackio`)
and SwanLab (extra `swanlab`).

None of them delays or ends a run (`outbox.py`). All but TensorBoard write into the run's folder unless their own
environment variables say otherwise (WANDB_MODE=online, MLFLOW_TRACKING_URI=..., TRACKIO_DIR, TRACKIO_SPACE_ID or
TRACKIO_SERVER_URL, SWANLAB_MODE=online), so a run needs no network and no account.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from controller.record.outbox import Outbox, Tracker


class WandbTracker:
    """A Weights & Biases run; offline unless WANDB_MODE is set."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        # Without limits wandb waits 90 s at the start and for ever at the end; what is not sent stays in its folder.
        bounds = wandb.Settings(
            silent=True, console="off", init_timeout=30, finish_timeout=30, finish_timeout_raises=True
        )
        self._run = wandb.init(
            project="rlhf-dist", name=name, dir=str(folder), mode=mode, config=dict(settings), settings=bounds
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


class MlflowTracker:
    """An MLflow run; in plain files in the run's folder unless MLFLOW_TRACKING_URI is set."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        # MLflow waits two minutes for an answer and asks eight times; a row it misses is kept.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI", (folder / "mlflow").resolve().as_uri())
        # MLflow 3 wants to be asked before it writes plain files; a database would need another package.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name("rlhf-dist")
        experiment = found.experiment_id if found else self._client.create_experiment("rlhf-dist")
        self._id = self._client.create_run(experiment, run_name=name).info.run_id
        self._client.log_dict(self._id, dict(settings), "config.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        from mlflow.entities import Metric

        # MLflow's names allow slashes but no '#'.
        rows = [Metric(name.replace("#", "-"), value, 0, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=rows)

    def close(self) -> None:
        """See Tracker."""
        self._client.set_terminated(self._id)


class TrackioTracker:
    """A Trackio run: a database in the run's folder unless TRACKIO_DIR, or a server, is set in the environment."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises RuntimeError where an earlier run of this process has another folder: Trackio reads it once."""
        told = os.environ.get("TRACKIO_DIR")
        wanted = Path(told) if told else folder.resolve() / "trackio"
        os.environ["TRACKIO_DIR"] = str(wanted)
        try:
            import trackio
            import trackio.run
            import trackio.utils
        finally:
            if told is None:
                del os.environ["TRACKIO_DIR"]
        if Path(trackio.utils.TRACKIO_DIR) != wanted:
            raise RuntimeError(
                f"Trackio writes to {trackio.utils.TRACKIO_DIR} in this process, as an earlier run has told it; set "
                "TRACKIO_DIR for all of them"
            )
        # Else it tells how to look at it, in the middle of what a run prints.
        for module in (trackio, trackio.run, trackio.utils):
            vars(module)["print"] = _unsaid
        self._run = trackio.init(
            project="rlhf-dist",
            name=name,
            config=dict(settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


def _unsaid(*words: object, **how: Any) -> None:
    """A `print` that says nothing."""


class SwanlabTracker:
    """A SwanLab run: files in the run's folder unless SWANLAB_MODE=online; `swanlab sync` sends them later."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        import swanlab

        self._run = swanlab.init(
            project="rlhf-dist",
            name=name,
            log_dir=str(folder.resolve() / "swanlab"),
            mode=os.environ.get("SWANLAB_MODE", "offline"),
            config=dict(settings),
            settings=swanlab.Settings(interactive=False),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


class TensorBoard:
    """TensorBoard's event files, written without torch."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """A run that continues at `first_step` tells TensorBoard to forget that step and later ones."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events = EventFileWriter(str(folder), flush_secs=10)
        if first_step:
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(step=first_step, wall_time=time.time(), session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._events.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))

    def close(self) -> None:
        """See Tracker."""
        self._events.close()


def new_tracker(
    kind: str, name: str, folder: Path, settings: Mapping[str, Any], tell: Callable[[str], None] = print
) -> Outbox | None:
    """The tracker `output.tracker` names; None for `none`. The driver has checked that its package is there.

    tell: shows people a line, once, when it does not work.
    """
    kinds: dict[str, Callable[[str, Path, Mapping[str, Any]], Tracker]] = {
        "wandb": WandbTracker,
        "mlflow": MlflowTracker,
        "trackio": TrackioTracker,
        "swanlab": SwanlabTracker,
    }
    return Outbox(kind, lambda: kinds[kind](name, folder, settings), folder, tell) if kind in kinds else None
