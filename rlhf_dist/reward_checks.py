"""What can be known of rewards before a process starts: where they come from, and that there is what they ask for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_dist.config import RemoteJudgeConfig, RewardConfig
from rlhf_dist.typed import ConfigError

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch
    from rlhf_dist.rewards.signature import Signature


def check_rewards(launch: Launch, *, here: bool = True) -> None:
    """Raise ConfigError for a reward without exactly one origin, one that cannot be loaded or asks for no column, and
    for a judge without an endpoint. here: whether the run starts here, where its key must be set then."""
    for role, settings in launch.used_roles.items():
        if isinstance(settings, RemoteJudgeConfig):
            _check_endpoint(role, settings, launch.run.ray.worker_env, here)
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


def _check_endpoint(role: str, settings: RemoteJudgeConfig, worker_env: Mapping[str, str], here: bool) -> None:
    if not settings.url.startswith(("http://", "https://")):
        raise ConfigError(
            f"{role}.url must be the address of an endpoint, up to and with its version, got {settings.url!r}; set "
            f"{role}.url=http://HOST:PORT/v1"
        )
    if not settings.served_model:
        raise ConfigError(
            f"{role}.served_model must be the model's name as {settings.url} calls it, got ''; set "
            f"{role}.served_model=NAME"
        )
    variable = settings.key_variable
    if here and variable and variable not in os.environ and variable not in worker_env:
        raise ConfigError(
            f"{role}.key_variable must name a variable that is set here, got {variable!r}; export {variable}, or set "
            f"{role}.key_variable= for none"
        )


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
