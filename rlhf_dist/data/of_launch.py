"""The sources of a launch: whose tokenizer they use, and how many steps its epochs are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from rlhf_dist.config import DataConfig, SourceConfig
from rlhf_dist.data.source import PromptSource
from rlhf_dist.dataflow.token_makers import reads_others_tokens
from rlhf_dist.held_out import held_out_fields

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch


def tokenizer_of(launch: Launch) -> str | None:
    """The model folder whose tokenizer the sources use."""
    role = tokenizer_role(launch)
    model = None if role is None else launch.used_roles[role].model
    return None if model is None else str(Path(model.path).expanduser().resolve())


def tokenizer_role(launch: Launch) -> str | None:
    """Whose tokenizer the sources use: of the roles with a model that are given token ids, one that generates, else
    the first."""
    generating, dataflow = launch.dataflow.generating, launch.dataflow
    models = [name for name, settings in launch.used_roles.items() if settings.model is not None]
    return min(models, key=lambda role: (not reads_others_tokens(dataflow, role), role not in generating), default=None)


def tokenizers(launch: Launch) -> dict[str, str]:
    """Role with a model, and source -> the model folder whose tokenizer makes its token ids."""
    models = {name: model for name, settings in launch.used_roles.items() if (model := settings.model) is not None}
    base = tokenizer_of(launch)
    return {
        **{role: str(Path(model.path).expanduser().resolve()) for role, model in models.items()},
        **({} if base is None else dict.fromkeys(launch.recipe.sources, base)),
    }


def open_source(
    config: SourceConfig,
    data: DataConfig,
    *,
    tokenizer: str,
    seed: int,
    heldout: SourceConfig | None = None,
    fields: Mapping[str, str] = MappingProxyType({}),
    first_group: int = 0,
) -> PromptSource:
    """A source with the limits of `data`; rows whose prompts are in `heldout` are left out. fields, first_group: see
    `PromptSource`."""
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
        fields=fields,
        first_group=first_group,
    )


def epoch_source(launch: Launch) -> str:
    """The source parameter that `data.epochs` counts: the first that data.train feeds, else the first."""
    sources = list(launch.recipe.sources)
    return next((name for name in sources if name not in launch.run.data.sources), sources[0])


def training_source(launch: Launch, name: str | None = None) -> PromptSource:
    """All rows of a source parameter (None: of `epoch_source`), as its workers see them.

    Raises ValueError for faulty data, or no such parameter.
    """
    name = name or epoch_source(launch)
    if name not in launch.recipe.sources:
        known = ", ".join(launch.recipe.sources)
        raise ValueError(f"recipe {launch.recipe.name} has no source {name!r}; it has {known}")
    config, fields = launch.source(name), launch.recipe.source_fields(name)
    return _source(launch, config, launch.source_key(name), launch.run.data.heldout, fields)


def heldout_source(launch: Launch) -> PromptSource:
    """The held-out rows of a launch. Raises ValueError for faulty data, and where there are none."""
    if launch.run.data.heldout is None:
        raise ValueError("data.heldout is not set, so there are no held-out rows")
    return _source(
        launch, launch.run.data.heldout, "data.heldout", None, held_out_fields(launch.recipe, launch.dataflow)
    )


def with_steps_of_epochs(launch: Launch) -> Launch:
    """The launch with `steps` enough for `data.epochs` passes over its rows; as it is where that is not set.

    All rows are read and tokenised to know how many there are. Raises ValueError for faulty data.
    """
    data = launch.run.data
    if data.epochs <= 0 or launch.epoch_rows:
        return launch
    size = training_source(launch).size
    steps = -(-data.epochs * size // launch.source_rows(epoch_source(launch)))
    return replace(launch, run=replace(launch.run, steps=steps), epoch_rows=size)


def _source(
    launch: Launch,
    config: SourceConfig,
    where: str,
    heldout: SourceConfig | None,
    fields: Mapping[str, str] = MappingProxyType({}),
) -> PromptSource:
    tokenizer, run = tokenizer_of(launch), launch.run
    if tokenizer is None:
        raise ValueError("no role has a model, so there is no tokenizer for the data")
    try:
        return open_source(config, run.data, tokenizer=tokenizer, seed=run.seed, heldout=heldout, fields=fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
