"""Stages one after the other: all are checked before the first begins, each is a run, a complete one is skipped.

    runs/rlhf/  sft/  rm/  ppo/        a run's folder each: checkpoints, metrics, models
                summary.json           the summaries of all stages, so far

The model of a stage that has not run is checked as what it will be: the folder its role starts from, with a value head
where the role has one. With resume=auto the launch goes on in the stage that was not complete.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from controller.lifecycle.prepare import prepared
from controller.lifecycle.run_folder import Beginning, find_beginning, finished_steps, is_run
from rlhf_dist import typed
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.model_to_come import write_model_to_come
from rlhf_dist.stages import Stage, Stages
from rlhf_dist.typed import ConfigError

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch
    from rlhf_dist.hardware import Cluster


class StageFailed(Exception):
    """A stage's run failed; the cause is what it raised."""


@dataclass(frozen=True, kw_only=True)
class CheckedStage:
    """A stage that can run."""

    stage: Stage
    launch: Launch
    """With models to come where a stage before it is not complete."""
    lines: list[str]
    """Its plan, for people."""
    beginning: Beginning
    complete: bool

    @property
    def note(self) -> str:
        """What becomes of the stage's folder."""
        if not self.complete:
            return self.beginning.note or "new"
        changed = _changed(self.launch, self.beginning.folder)
        more = f"; {', '.join(changed[:3])} differ from what it ran with" if changed else ""
        return f"complete, {self.launch.run.steps} steps: skipped{more}"


@dataclass
class _Models:
    """Folders of models, of stages that are complete and of those to come."""

    stages: Stages
    scratch: Path
    checked: dict[str, CheckedStage] = field(default_factory=dict)

    def folder_of(self, stage: str, role: str) -> str:
        """The folder to check with. Raises ConfigError where the stage exports no such role."""
        found, path = self.checked[stage], self.stages.model_of(stage, role)
        learning = found.launch.learning_roles
        if role not in learning:
            raise ConfigError(f"${{stage.{stage}.{role}}}: {typed.unknown(role, learning, f'trained role of {stage}')}")
        if not found.launch.run.output.save_model:
            raise ConfigError(f"${{stage.{stage}.{role}}} needs output.save_model=true in stage {stage}, got false")
        if found.complete:
            return path
        settings: Any = found.launch.roles[role]
        start = Path(settings.model.path).expanduser()
        if not start.is_dir():
            return str(settings.model.path)  # A shape that is described, for a cluster that is.
        folder = self.scratch / stage / role
        if not folder.exists():
            # Of the kinds of role that learn, language models alone know how to generate; others have a value head.
            write_model_to_come(folder, start, value_head=not hasattr(settings, "rollout"))
        return str(folder)

    def said(self, text: str) -> str:
        """A text with the folders that will be, in place of those that were checked."""
        for stage, found in self.checked.items():
            for role in found.launch.learning_roles:
                text = text.replace(str(self.scratch / stage / role), self.stages.model_of(stage, role))
        return text


def check_stages(
    stages: Stages, *, local: bool = False, eager: bool = False, cluster: Cluster | None = None
) -> list[CheckedStage]:
    """Every stage with its plan; nothing is started or written. Raises ConfigError, naming the stage."""
    if is_run(stages.folder):
        raise ConfigError(f"{stages.folder} holds a run of one recipe; choose another name=... for the stages")
    with tempfile.TemporaryDirectory(prefix="rlhf-dist-models-to-come-") as scratch:
        models = _Models(stages, Path(scratch).resolve())
        for stage in stages.stages:
            try:
                models.checked[stage.name] = _checked(stage, models, local, eager, cluster)
            except ValueError as error:
                raise ConfigError(f"stage {stage.name}: {models.said(str(error))}") from error
    return list(models.checked.values())


def _checked(stage: Stage, models: _Models, local: bool, eager: bool, cluster: Cluster | None) -> CheckedStage:
    ready = stage.with_models(models.folder_of)
    launch, lines = prepared(ready.recipe, ready.overrides, ready.settings, local=local, eager=eager, cluster=cluster)
    folder = Path(launch.run.output.root) / launch.run.name
    complete = launch.run.resume == "auto" and finished_steps(folder) == launch.run.steps
    rerun = [name for name, _ in stage.references if not models.checked[name].complete]
    # A model to come is not yet what the stage was trained from.
    beginning = (
        Beginning(folder=folder)
        if complete
        else find_beginning(launch, compare=not rerun, elsewhere=cluster is not None)
    )
    if rerun and (complete or beginning.first_step):
        raise ConfigError(
            f"{folder} was trained from a model of stage {rerun[0]}, which is not complete and will be another; set "
            f"{stage.name}.resume=overwrite, or {rerun[0]}.steps to what it was"
        )
    return CheckedStage(
        stage=stage, launch=launch, lines=[models.said(line) for line in lines], beginning=beginning, complete=complete
    )


def run_stages(
    stages: Stages, *, local: bool = False, eager: bool = False, quiet: bool = False
) -> dict[str, dict[str, Any]]:
    """Run every stage that is not complete; the summary of each by its name, which summary.json has too.

    Raises ConfigError before anything starts, StageFailed for a run that failed, from its error. KeyboardInterrupt
    passes through.
    """
    from controller.lifecycle.run import run
    from controller.record.display import Display
    from controller.record.run_summary import for_people

    started, summaries = time.perf_counter(), dict[str, dict[str, Any]]()
    checked = check_stages(stages, local=local, eager=eager)
    for number, found in enumerate(checked, start=1):
        name, folder = found.stage.name, found.beginning.folder
        if not quiet:
            doing = found.note if found.complete else f"{found.launch.run.steps} steps of {found.launch.recipe.name}"
            print(f"\n--- stage {number} of {len(checked)}: {name}: {doing}", flush=True)
        if found.complete:
            summaries[name] = json.loads((folder / "summary.json").read_text())
            continue
        ready = found.stage.with_models(stages.model_of)
        with _named(name):
            launch, lines = prepared(ready.recipe, ready.overrides, ready.settings, local=local, eager=eager)
            if not quiet:
                print("\n".join(lines), flush=True)
            with Display(name, launch.run.steps, quiet=quiet, lines=eager or local) as display:
                summaries[name] = run(launch, display, eager=eager or local, local=local)
                display.summary(for_people(summaries[name]))
        _write_summary(stages, summaries, time.perf_counter() - started)
    _write_summary(stages, summaries, time.perf_counter() - started)
    return summaries


@contextmanager
def _named(stage: str) -> Iterator[None]:
    """Errors of a run that explain themselves say which stage it was."""
    try:
        yield
    except (ConfigError, GraphError) as error:
        raise ConfigError(f"stage {stage}: {error}") from error
    except Exception as error:
        if not type(error).__module__.startswith("controller."):
            error.add_note(f"in stage {stage}")
            raise
        raise StageFailed(f"stage {stage}: {error}") from error


def _write_summary(stages: Stages, summaries: dict[str, dict[str, Any]], seconds: float) -> None:
    path = stages.folder / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"name": stages.name, "wall_s": round(seconds, 2), "stages": summaries}, indent=2))
    partial.replace(path)


def _changed(launch: Launch, folder: Path) -> list[str]:
    """Settings that are others than in the config.yaml that a run left in its folder."""
    try:
        kept = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []
    now, then = _leaves(yaml.safe_load(launch.yaml)), _leaves(kept)
    return [key for key, value in now.items() if key != "resume" and key in then and then[key] != value]


def _leaves(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    return {
        key: leaf
        for name, value in content.items()
        for key, leaf in _leaves(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }
