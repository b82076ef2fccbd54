"""What can be known of rewards before a process starts: where they come from, and that there is what they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_dist.config import RewardConfig
from rlhf_dist.typed import ConfigError

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch
    from rlhf_dist.rewards.signature import Signature


def check_rewards(launch: Launch) -> None:
    """Raise ConfigError for a reward without exactly one origin, one that cannot be loaded or asks for no column."""
    for role, settings in launch.used_roles.items():
        if not isinstance(settings, RewardConfig):
            continue
        if settings.function is not None and settings.model is not None:
            raise ConfigError(
                f"{role} has both a function ({settings.function}) and a model ({settings.model.path}); exactly one is "
                f"needed: set {role}.function=null or {role}.model=null"
            )
        if settings.function is None and settings.model is None:
            raise ConfigError(
                f"{role} has neither a function nor a model; set {role}.function=FUNCTION (or choose a task=...), "
                f"or {role}.model.path=FOLDER"
            )
        if settings.function is not None:
            _check_columns(launch, role, _loaded(launch, role, settings.function))


def _loaded(launch: Launch, role: str, function: str) -> Signature:
    from rlhf_dist.rewards.load import load_reward

    try:
        return load_reward(function, launch.recipe.file).signature
    except Exception as error:  # the user's file may raise anything when it is executed
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigError(f"{role}.function: {name}{error}") from error


def _check_columns(launch: Launch, role: str, signature: Signature) -> None:
    from rlhf_dist.data.check import field_names
    from rlhf_dist.rewards.rule import FIELDS

    for node in launch.dataflow:
        if node.role != role or not node.inputs:
            continue
        columns, fields = node.inputs[0].columns, set[str]()
        source = launch.dataflow.source_of(node.inputs[0].rows)
        if FIELDS in columns and source is not None:
            try:
                fields = field_names(launch.source(source), launch.run.seed)
            except ValueError:
                return  # The check of the source says what is wrong with it.
        try:
            signature.bind(columns, fields)
        except ValueError as error:
            raise ConfigError(f"{node.line}: {role}.function: {error}") from error
