"""`check_recipe`: a recipe run for real at the smallest size, both ways, and compared.

    traced       a missing column, an unknown op or setting, a condition on data: found before anything starts
    losses       each passes check_loss, where the vocabulary knows the columns it reads
    run twice    line by line, and as a graph; trained weights must be the same to the last bit
    finite       every metric of every step, and every weight

Both runs are `rlhf-dist run RECIPE --local`: this process, its CPU, the workers and engines of any run.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from rlhf_dist.compose import Launch, compose, root_type
from rlhf_dist.config import RewardConfig
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.dataflow.state_value import resolved
from rlhf_dist.recipe_files import load_recipe
from rlhf_dist.schema import COLUMNS
from rlhf_dist.testing.failed import CheckFailed
from rlhf_dist.testing.losses import check_loss
from rlhf_dist.testing.tiny_model import save_llama
from rlhf_dist.typed import keys

Weights = Mapping[str, np.ndarray[Any, Any]]
TINY = {
    "task": "none",
    "model.dtype": "float32",
    "data.prompts_per_step": 4,
    "steps": 2,
    "output.tracker": "none",
    "output.rollouts_every": 0,
    "output.checkpoint_every": None,
    "resume": "overwrite",
}
"""What a check sets for every recipe, unless it is told otherwise."""
REWARD = "rlhf_dist.rewards:share_of_digits"
"""For roles that have none."""
RESPONSE_TOKENS = 8
LEARNING_RATE = 1e-3
"""So high that float32 weights move in two steps, whatever the recipe's own is."""


def check_recipe(recipe: str | Path | Recipe, *, both_ways: bool = True, **overrides: Any) -> list[dict[str, float]]:
    """Raises CheckFailed for a recipe that cannot be traced or run, runs otherwise line by line than as a graph, or
    has a number that is not finite. Returns the metrics of every step, for checks of one's own.

    recipe: a name, a file (`mine.py`, `mine.py:name`) or a function marked @recipe. overrides: settings in place of the
    small ones, `check_recipe("mine.py", steps=1, **{"algorithm.clip": 0.1})`. both_ways: False leaves the run line by
    line out, and what it finds. A tiny random model, sums as data
    (prompts, examples and preferences) and a reward for roles that have none are there by themselves.
    """
    name = recipe.name if isinstance(recipe, Recipe) else Path(str(recipe)).name
    with tempfile.TemporaryDirectory(prefix="check_recipe_") as scratch:
        folder = Path(scratch)
        launch, settings = _launch(name, recipe, overrides, folder)
        _check_losses(name, launch)
        metrics, weights = _run(name, launch, settings, folder / "graph", eager=False)
        if both_ways:
            _, line_by_line = _run(name, launch, settings, folder / "eager", eager=True)
            _check_same(name, weights, line_by_line)
    _check_finite(name, metrics, weights)
    return metrics


# --- the runs ------------------------------------------------------------------------------------------------
def _launch(
    name: str, recipe: str | Path | Recipe, overrides: Mapping[str, Any], folder: Path
) -> tuple[Launch, list[str]]:
    """The recipe with its settings for this check, and these as `key=value`."""
    from controller.lifecycle.api import as_overrides, spec_of

    try:
        spec = spec_of(recipe)
        asked = as_overrides({**_defaults(spec, overrides, folder), **overrides})
        launch = compose(spec, asked)
        bare = [role for role, settings in launch.roles.items() if _has_no_reward(settings)]
        if bare:
            asked += [f"{role}.function={REWARD}" for role in bare]
            launch = compose(spec, asked)
    except ValueError as error:  # ConfigError and GraphError are: the user's settings, or the recipe
        raise CheckFailed(name, str(error)) from error
    return launch, asked


def _defaults(spec: str, overrides: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Small settings, a model and data."""
    made: dict[str, Any] = {**TINY, "output.root": folder}
    if not any(key == "model.path" for key in overrides):
        made["model.path"] = save_llama(folder / "model")
    loaded = load_recipe(spec)
    if not any(key.startswith(("data.train", "data.sources")) for key in overrides):
        sums = _sums(folder / "sums.jsonl")
        made |= {"data.train.path": sums, "data.train.generator": None, "data.heldout": None}
        made |= {f"data.sources.{name}.path": sums for name in list(loaded.sources)[1:]}
    known = keys(root_type(loaded))
    for role in loaded.roles:
        small = {f"{role}.rollout.max_response_tokens": RESPONSE_TOKENS, f"{role}.optimizer.lr": LEARNING_RATE}
        made |= {key: value for key, value in small.items() if key in known}
    return made


def _has_no_reward(settings: Any) -> bool:
    return isinstance(settings, RewardConfig) and settings.function is None and settings.model is None


def _sums(path: Path) -> Path:
    """Sums of two digits as JSON lines: prompts with answers, examples and preferences in one file."""
    pairs = [(a, b) for a in range(6) for b in range(6)]
    rows = [
        {"prompt": f"{a}+{b}=", "answer": right, "response": right, "chosen": right, "rejected": str(a + b + 1)}
        for a, b in pairs
        for right in [str(a + b)]
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _run(
    name: str, launch: Launch, settings: list[str], folder: Path, *, eager: bool
) -> tuple[list[dict[str, float]], Weights]:
    """Metrics of every step and the weights at the end, `role/tensor` -> values."""
    from controller.cluster.local import local_launch
    from controller.lifecycle.run import run
    from controller.record.display import Display
    from controller.record.metrics import read_metrics
    from rlhf_dist.checks import check_launch

    way = "line by line" if eager else "as a graph"
    try:
        here = local_launch(launch, settings, device="cpu")
        here = replace(here, run=replace(here.run, output=replace(here.run.output, root=str(folder))))
        check_launch(here)
        with Display(here.run.name, here.run.steps, quiet=True) as display, _without_debug_logs():
            run(here, display, eager=eager, local=True)
    except Exception as error:
        raise CheckFailed(name, f"run {way}: {error}") from error
    models = folder / here.run.name / "models"
    weights = {
        f"{file.parent.name}/{tensor}": values
        for file in sorted(models.glob("*/*.safetensors"))
        for tensor, values in load_file(file).items()
    }
    return read_metrics(folder / here.run.name), weights


@contextmanager
def _without_debug_logs() -> Iterator[None]:
    """torch logs every tensor it saves, and a test runner would show all of it below a failure."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.DEBUG))
    try:
        yield
    finally:
        logging.disable(before)


# --- what is checked -----------------------------------------------------------------------------------------
def _check_losses(name: str, launch: Launch) -> None:
    numbers = {state: kind().initial(launch.algorithm) for state, kind in launch.recipe.states.items()}
    for node in launch.dataflow:
        settings = resolved(dict(node.kwargs), numbers)
        for loss, _ in settings.get("terms", ((settings.get("loss"), 1.0),)):
            if loss is None or not set(loss.reads) <= COLUMNS.keys():
                continue
            try:
                check_loss(loss, heads=getattr(launch.recipe.roles[node.role], "heads", ()))
            except CheckFailed as failed:
                raise CheckFailed(name, f"{node.line}: {failed}") from failed


def _check_same(name: str, graph: Weights, eager: Weights) -> None:
    if graph.keys() != eager.keys():
        other = sorted(graph.keys() ^ eager.keys())[0]
        raise CheckFailed(name, f"the graph and the run line by line train different roles: only one trains {other}")
    for tensor, values in graph.items():
        if not np.array_equal(values, eager[tensor], equal_nan=True):
            apart = float(np.abs(values - eager[tensor]).max())
            raise CheckFailed(
                name,
                f"the run line by line ends with other weights than the graph: {tensor} is up to {apart:.3g} apart; "
                "the recipe or a host op of it depends on something besides its settings and its batch (randomness "
                "without a seed, time, what it keeps from call to call)",
            )


def _check_finite(name: str, metrics: list[dict[str, float]], weights: Weights) -> None:
    for row in metrics:
        for key, value in row.items():
            if value is None or not math.isfinite(value):  # JSON has no nan: the file says null
                raise CheckFailed(name, f"metric {key} is nan or infinite at step {row['step']:g}; it must be finite")
    for tensor, values in weights.items():
        if not np.isfinite(values).all():
            bad = int(values.size - np.isfinite(values).sum())
            raise CheckFailed(
                name, f"{bad} of {values.size} weights of {tensor} are not finite after {len(metrics)} steps"
            )
