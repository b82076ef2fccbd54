"""Settings are written down: in config.yaml, in checkpoints, with trackers, on command lines. So no secret is one.

    ray.worker_env={JUDGE_API_KEY: $JUDGE_API_KEY}      the name is a setting; the value stays in the environment

Workers get such values in a call of their own, which no log, report or process argument shows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from rlhf_dist.typed import ConfigError

SECRET = ("_KEY", "_PASSWORD", "_SECRET", "_TOKEN")
"""Ends of the names of environment variables that hold one."""
SECRET_OPTIONS = frozenset({"key", "secret", "token", "password"})
"""Options of file systems that hold one."""
_FROM_HERE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def check_secrets(worker_env: Mapping[str, str], store_options: Mapping[str, Any]) -> None:
    """Raises ConfigError for a secret among the settings, and for a variable that is not set here."""
    for name, value in worker_env.items():
        asked = name_in(value)
        if asked is None and name.endswith(SECRET):
            raise ConfigError(
                f"ray.worker_env.{name} must not hold a secret, since config.yaml keeps settings: export {name} and "
                f"write 'ray.worker_env={{{name}: ${name}}}' in single quotes"
            )
        if asked is not None and asked not in os.environ:
            raise ConfigError(
                f"ray.worker_env.{name} is ${asked}, which is not set in this environment; export {asked}"
            )
    for name in sorted(SECRET_OPTIONS & set(store_options)):
        raise ConfigError(
            f"output.store_options.{name} must not hold a secret, since config.yaml keeps settings; put it where the "
            "file system looks for it: environment variables such as AWS_SECRET_ACCESS_KEY, or its own file"
        )


def name_in(value: str) -> str | None:
    """NAME, of `$NAME` or `${NAME}`; None of any other text."""
    found = _FROM_HERE.fullmatch(value)
    return None if found is None else found[1] or found[2]


def plain_variables(worker_env: Mapping[str, str]) -> dict[str, str]:
    """Those whose value is the setting itself."""
    return {name: value for name, value in worker_env.items() if name_in(value) is None}


def kept_variables(worker_env: Mapping[str, str]) -> dict[str, str]:
    """Those whose value this process's environment has; a worker gets them in a call."""
    asked = {name: name_in(value) for name, value in worker_env.items()}
    return {name: os.environ[here] for name, here in asked.items() if here is not None and here in os.environ}
