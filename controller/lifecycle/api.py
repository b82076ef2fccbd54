"""A run from Python: a script or a notebook starts it and gets its result.

    from controller import launch

    result = launch("grpo", "model=smollm2", settings={"data.train.path": "sums.jsonl", "reward.function": my_reward})
    result.summary["last"]["reward/reward"], result.metrics, result.models["actor"]

The same settings and checks as `rlhf-dist run`, in this process: mistakes are raised as ConfigError, failures as
NodeError, WorkerLost or ClusterError. Nothing heavy is imported before a launch.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_dist.dataflow.recipe import Recipe


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    folder: Path
    """The run's folder."""
    summary: Mapping[str, Any]
    """What summary.json holds: seconds, tokens a second, `first` and `last` step's metrics, evaluations."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: of every step, and of evaluations, whose `kind` is "evaluation"."""
        from controller.record.metrics import read_metrics

        return read_metrics(self.folder)

    @property
    def models(self) -> dict[str, Path]:
        """Role -> Hugging Face folder of its trained model; empty with output.save_model=false."""
        return {path.name: path for path in sorted((self.folder / "models").glob("[!.]*"))}


def launch(
    recipe: str | Path | Recipe,
    *overrides: str,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
    eager: bool = False,
    local: bool = False,
) -> RunResult:
    """Run `recipe` (a name, a file, or a function marked @recipe) to its end.

    overrides: as on the command line, `key=value`. settings: key -> Python value, before them; where a function is
    named, the function itself will do. quiet: no progress. eager: line by line. local: in this process, line by line.

    Raises ConfigError or GraphError (ValueErrors) for what the settings, the recipe or the data cannot be, before
    anything starts; NodeError, WorkerLost or ClusterError for what failed. KeyboardInterrupt passes through. In all
    cases every process that was started has ended, and another launch may follow.
    """
    from controller.lifecycle.prepare import prepared
    from controller.lifecycle.run import run
    from controller.record.display import Display

    said = [*as_overrides(settings or {}), *overrides]
    made, plan = prepared(spec_of(recipe), said, local=local, eager=eager)
    if not quiet:
        print("\n".join(plan), flush=True)
    with _interruptible(), Display(made.run.name, made.run.steps, quiet=quiet) as display:
        summary = run(made, display, eager=eager or local, local=local)
    return RunResult((Path(made.run.output.root) / made.run.name).resolve(), summary)


def launch_stages(
    stages: str | Path | Mapping[str, Any],
    *overrides: str,
    quiet: bool = False,
    eager: bool = False,
    local: bool = False,
) -> dict[str, RunResult]:
    """Run several recipes one after the other; stage -> what it left behind.

    stages: a YAML file, or a mapping with the same content (`rlhf_dist/stages.py`). The rest as in `launch`, with
    `STAGE.key=value` for one stage. Raises ConfigError before anything starts, StageFailed
    from what a run of a stage raised.
    """
    from controller.lifecycle.stages import run_stages
    from rlhf_dist.stages import read_stages

    read = read_stages(stages, overrides)
    with _interruptible():
        summaries = run_stages(read, local=local, eager=eager, quiet=quiet)
    return {name: RunResult((read.folder / name).resolve(), summary) for name, summary in summaries.items()}


def spec_of(recipe: str | Path | Recipe) -> str:
    """The recipe as the command line names it. Raises ConfigError for one that is in no file."""
    if isinstance(recipe, (str, Path)):
        return str(recipe)
    from rlhf_dist.typed import ConfigError

    if not recipe.file.is_file():
        raise ConfigError(
            f"recipe {recipe.name} is defined in {recipe.file}, which is no file; write it into one "
            f"(%%writefile mine.py in a notebook) and name that"
        )
    return f"{recipe.file}:{recipe.name}"


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Python values as the command line's `key=value`. Raises ConfigError for a value that is no setting."""
    return [_override(key, value) for key, value in settings.items()]


def _override(key: str, value: Any) -> str:
    if isinstance(value, (str, Path)):
        return f"{key}={value}"  # as it is typed on the command line
    if callable(value):
        return f"{key}={_name_of(key, value)}"
    return f"{key}={_plain(key, value)}"


def _plain(key: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, Path)):
        # Hydra takes a backslash for one before a quote or at the end only.
        return "'" + re.sub(r"(\\+)(?='|$)", r"\1\1", str(value)).replace("'", "\\'") + "'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}: {_plain(key, entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_plain(key, entry) for entry in value) + "]"
    from rlhf_dist.typed import ConfigError

    raise ConfigError(
        f"{key} is given as a {type(value).__name__}; a setting is text, a number, a list, a dict or None"
    )


def _name_of(key: str, function: Callable[..., Any]) -> str:
    """`module:name` of a function or class, under which it is found again here."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module is None or getattr(sys.modules.get(module), name, None) is not function:
        from rlhf_dist.typed import ConfigError

        raise ConfigError(
            f"{key}: {name or function!r} has no name of its own in a module; define it with `def` or `class` at the "
            f"top of a file or cell"
        )
    return f"{module}:{name}"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt here: a running event loop would only take note of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
