"""What a worker of a role has: a method for every op of its interface, and more where it learns or generates.

    every op     (self, batch, call, **settings) -> OpResult or Batch      settings: the op's own, with its names
    learns       save, saved, load, export                                 checkpoints and the models of a run
    generates    reshard, connect, send_weights, interrupt, close          weights in, and a stop where it is

It is constructed on every rank of the role's pool as `Worker(context=..., **what its kind says)` (`role_kinds.py`). One
of the user's own for a `Function` gets `config`, an instance of the kind's settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from rlhf_dist.batch import Batch
from rlhf_dist.roles import ops_of
from rlhf_dist.typed import ConfigError
from rlhf_dist.wire import Bridge, Call, OpResult


class Closing(Protocol):
    """Holds something outside of its process."""

    def close(self) -> None:
        """Free it; the process ends or goes on without this worker."""
        ...


class Learning(Protocol):
    """Has weights that a run keeps. Collective over the role's pool, all four."""

    def save(self, batch: Batch, call: Call, *, folder: str) -> OpResult:
        """Copy its state, and begin to write it to a new or empty folder."""
        ...

    def saved(self, batch: Batch, call: Call, *, wait: bool) -> OpResult:
        """Metric `pending`: 0 once the last `save` is written."""
        ...

    def load(self, batch: Batch, call: Call, *, folder: str) -> OpResult:
        """Restore what `save` wrote."""
        ...

    def export(self, batch: Batch, call: Call, *, folder: str) -> OpResult:
        """Write a folder that others read."""
        ...


class Syncing(Learning, Closing, Protocol):
    """Learns, and generates here or in a pool of its own."""

    def reshard(self, batch: Batch, call: Call) -> OpResult:
        """Bring the generation engine beside it to the trained weights."""
        ...

    def connect(self, bridge: Bridge) -> None:
        """Meet the ranks that generate, in another pool."""
        ...

    def send_weights(self, batch: Batch, call: Call) -> OpResult:
        """Bring those to the trained weights."""
        ...

    def interrupt(self) -> None:
        """Stop generating after the token at hand, where that is possible; called from another thread."""
        ...


class Receiving(Closing, Protocol):
    """Generates in a pool of its own."""

    def connect(self, bridge: Bridge) -> None:
        """Meet the ranks that train."""
        ...

    def receive_weights(self, batch: Batch, call: Call) -> OpResult:
        """Take the weights that they send."""
        ...

    def interrupt(self) -> None:
        """As `Syncing.interrupt`."""
        ...


def check_worker(worker: type, interface: type) -> None:
    """Raise ConfigError where a class lacks a method of its interface, or one takes other settings."""
    who = f"{interface.__name__}.worker {worker.__name__}"
    built = inspect.signature(worker).parameters
    if "context" not in built and not _takes_any(built.values()):
        raise ConfigError(f"{who} must be constructed with (context, ...), got ({', '.join(built)})")
    ops = ops_of(interface)
    for name in ops:
        method = getattr(worker, name, None)
        if not callable(method):
            raise ConfigError(
                f"{who} lacks the op {name}; write def {name}(self, batch, call{_settings(interface, name)})"
            )
        _check_signature(who, name, method, _keywords(getattr(interface, name)))
    if any(spec.weights_written for spec in ops.values()):
        for name in ("save", "saved", "load", "export"):
            if not callable(getattr(worker, name, None)):
                raise ConfigError(
                    f"{who} lacks {name}, which a role whose ops write weights has (rlhf_dist.worker.Learning)"
                )


def _check_signature(who: str, name: str, method: Callable[..., Any], wanted: list[str]) -> None:
    parameters = list(inspect.signature(method).parameters.values())
    if _takes_any(parameters):
        return
    positional = [one.name for one in parameters if one.kind is not one.KEYWORD_ONLY]
    takes = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    must = {one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty}
    if len(positional) < 3 or not must <= set(wanted) <= set(takes):
        listed = f", *, {', '.join(wanted)}" if wanted else ""
        raise ConfigError(
            f"{who}: {name} must take (self, batch, call{listed}) as its interface says, got "
            f"({', '.join([*positional, *takes])})"
        )


def _keywords(op: Callable[..., Any]) -> list[str]:
    return [one.name for one in inspect.signature(op).parameters.values() if one.kind is one.KEYWORD_ONLY]


def _settings(interface: type, name: str) -> str:
    keywords = _keywords(getattr(interface, name))
    return f", *, {', '.join(keywords)}" if keywords else ""


def _takes_any(parameters: Any) -> bool:
    return any(one.kind is one.VAR_KEYWORD for one in parameters)
