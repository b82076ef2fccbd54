"""Trackers beside metrics.jsonl and TensorBoard: Weights & Biases and MLflow, from the extra `tracking`.

Both write into the run's folder unless their own environment variables say otherwise (WANDB_MODE=online,
MLFLOW_TRACKING_URI=...), so a run needs no network and no account.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Where a step's metrics also go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Finite metrics of one step."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class WandbTracker:
    """A Weights & Biases run; offline unless WANDB_MODE is set."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        quiet = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            project="rlhf-dist", name=name, dir=str(folder), mode=mode, config=dict(settings), settings=quiet
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


def new_tracker(kind: str, name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker | None:
    """The tracker `output.tracker` names; None for `none`. The driver has checked that its package is there."""
    kinds: dict[str, type[WandbTracker] | type[MlflowTracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
    return kinds[kind](name, folder, settings) if kind in kinds else None
