"""Settings are written down: in config.yaml, in checkpoints, with trackers, on command lines. So no secret is one.

    ray.worker_env={JUDGE_API_KEY: $JUDGE_API_KEY}      the name is a setting; the value stays in the environment

Workers get such values in a call of their own, which no log, report or process argument shows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from rlhf_dist.typed import ConfigError

_SECRET = re.compile(r"(^|_)(key|secret|token|passphrase|sas)$|password$|connection_string$", re.IGNORECASE)
"""Names of variables and options that hold one."""
_NO_SECRETS = frozenset({"", "anon", "cloud", "google_default"})
"""What such an option may say: to do without, or where the file system itself looks."""
_SIGNATURES = frozenset({"x-amz-signature", "x-goog-signature", "sig", "signature"})
"""Parts of a query that let whoever has the address in."""
_FROM_HERE = re.compile(r"\$(\w+)")


def is_secret(name: str) -> bool:
    """Whether a variable or an option of this name holds a secret."""
    return _SECRET.search(name) is not None


def check_no_secrets(worker_env: Mapping[str, str], store_options: Mapping[str, Any]) -> None:
    """Raises ConfigError for a secret among the settings; the message does not hold it."""
    for name, value in worker_env.items():
        if name_in(value) is not None:
            continue
        if is_secret(name):
            raise ConfigError(
                f"ray.worker_env.{name} must not hold a secret, since config.yaml keeps settings: export {name} and "
                f"write 'ray.worker_env={{{name}: ${name}}}' in single quotes"
            )
        if "$" in value:
            raise ConfigError(
                f"ray.worker_env.{name} must be $NAME alone or a text without a $, got {value!r}; export the whole "
                f"value as {name} and write 'ray.worker_env={{{name}: ${name}}}' in single quotes"
            )
    for key in _secret_options(store_options, "output.store_options"):
        raise ConfigError(
            f"{key} must not hold a secret, since config.yaml keeps settings; put it where the "
            "file system looks for it: environment variables such as AWS_SECRET_ACCESS_KEY, or its own file"
        )


def check_set_here(worker_env: Mapping[str, str]) -> None:
    """Raises ConfigError for a variable that workers are to get from here and that is not set here."""
    for name, value in worker_env.items():
        if (asked := name_in(value)) is not None and asked not in os.environ:
            raise ConfigError(
                f"ray.worker_env.{name} is ${asked}, which is not set in this environment; export {asked}"
            )


def check_addresses(settings: Any, key: str = "") -> None:
    """Raises ConfigError for an address with a password or a signature in it, anywhere in the settings."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            check_addresses(value, f"{key}.{name}" if key else str(name))
    elif isinstance(settings, list | tuple):
        for value in settings:
            check_addresses(value, key)
    elif isinstance(settings, str) and "://" in settings and "\n" not in settings:
        for address in settings.split(","):
            if (what := _secret_in(address.strip())) is not None:
                raise ConfigError(
                    f"{key} must be an address without a secret, since config.yaml keeps settings, and has {what}; "
                    f"leave it out and put credentials where the file system or library looks for them: its "
                    f"environment variables, or its own file"
                )


def name_in(value: str) -> str | None:
    """NAME, of `$NAME`; None of any other text."""
    found = _FROM_HERE.fullmatch(value)
    return None if found is None else found[1]


def plain_variables(worker_env: Mapping[str, str]) -> dict[str, str]:
    """Those whose value is the setting itself."""
    return {name: value for name, value in worker_env.items() if name_in(value) is None}


def kept_variables(worker_env: Mapping[str, str]) -> dict[str, str]:
    """Those whose value this process's environment has; a worker gets them in a call."""
    asked = {name: name_in(value) for name, value in worker_env.items()}
    return {name: os.environ[here] for name, here in asked.items() if here is not None and here in os.environ}


def _secret_options(options: Mapping[str, Any], key: str) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secret_options(value, f"{key}.{name}")
        elif is_secret(str(name)) and value is not None and value is not False and value not in _NO_SECRETS:
            yield f"{key}.{name}"


def _secret_in(address: str) -> str | None:
    try:
        parts = urlsplit(address)
    except ValueError:  # no address after all
        return None
    if parts.password:
        return "a password"
    signed = sorted(name for name, _ in parse_qsl(parts.query) if name.lower() in _SIGNATURES)
    return f"a signature ({signed[0]})" if signed else None
