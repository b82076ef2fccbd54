"""The sources of a launch: whose tokenizer they use, and how many steps its epochs are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.config import DataConfig, SourceConfig
from rlhf_dist.data.source import PromptSource

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch


def tokenizer_of(launch: Launch) -> str | None:
    """The model folder whose tokenizer the sources use."""
    role = tokenizer_role(launch)
    model = None if role is None else launch.used_roles[role].model
    return None if model is None else str(Path(model.path).expanduser().resolve())


def tokenizer_role(launch: Launch) -> str | None:
    """Whose tokenizer the sources use: a role's that generates, else the first's with a model."""
    generating = launch.dataflow.generating
    roles = sorted(launch.used_roles.items(), key=lambda role: role[0] not in generating)
    return next((name for name, settings in roles if settings.model is not None), None)


def open_source(
    config: SourceConfig, data: DataConfig, *, tokenizer: str, seed: int, heldout: SourceConfig | None = None
) -> PromptSource:
    """A source with the limits of `data`; rows whose prompts are in `heldout` are left out."""
    exclude: frozenset[str] = frozenset()
    if heldout is not None:
        exclude = open_source(heldout, data, tokenizer=tokenizer, seed=seed).prompts
    return PromptSource(
        config,
        tokenizer=tokenizer,
        seed=seed,
        max_prompt_tokens=data.max_prompt_tokens,
        max_response_tokens=data.max_response_tokens,
        exclude=exclude,
    )


def training_source(launch: Launch) -> PromptSource:
    """The training rows of a launch, all of them, as its workers see them. Raises ValueError for faulty data."""
    return _source(launch, launch.run.data.train, "data.train", launch.run.data.heldout)


def heldout_source(launch: Launch) -> PromptSource:
    """The held-out rows of a launch. Raises ValueError for faulty data, and where there are none."""
    if launch.run.data.heldout is None:
        raise ValueError("data.heldout is not set, so there are no held-out rows")
    return _source(launch, launch.run.data.heldout, "data.heldout", None)


def with_steps_of_epochs(launch: Launch) -> Launch:
    """The launch with `steps` enough for `data.epochs` passes over its rows; as it is where that is not set.

    All rows are read and tokenised to know how many there are. Raises ValueError for faulty data.
    """
    data = launch.run.data
    if data.epochs <= 0 or launch.epoch_rows:
        return launch
    size = training_source(launch).size
    steps = -(-data.epochs * size // data.prompts_per_step)
    return replace(launch, run=replace(launch.run, steps=steps), epoch_rows=size)


def _source(launch: Launch, config: SourceConfig, where: str, heldout: SourceConfig | None) -> PromptSource:
    tokenizer, run = tokenizer_of(launch), launch.run
    if tokenizer is None:
        raise ValueError("no role has a model, so there is no tokenizer for the data")
    try:
        return open_source(config, run.data, tokenizer=tokenizer, seed=run.seed, heldout=heldout)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
