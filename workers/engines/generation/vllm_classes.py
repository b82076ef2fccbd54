"""transformers' classes as they were, although vLLM runs models on them.

Families without an implementation of vLLM's own run on transformers' code there (GPT-NeoX, Phi, ...): vLLM decorates
the class of the decoder in place for torch.compile, and every model of that class in the process, a trainer's as
well, asks for vLLM's configuration from then on. Here the decoration moves to a subclass that vLLM's model alone has.

    decorate    remembers the class as it was                         (vLLM's own call, watched)
    after       the class is as before; what was changed is in a subclass of the same name
                vLLM's modules of that class become instances of the subclass
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from vllm.model_executor.models.transformers.base import Base

_SLOTS = ("__dict__", "__weakref__")
"""Entries of a class that its instances' memory belongs to: a subclass has none of its own."""


@contextmanager
def classes_kept() -> Iterator[list[type]]:
    """Classes of transformers that vLLM decorates inside are as before after it; gives them, for `move`."""
    before: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}
    decorate = Base._decorate_cls_for_torch_compile

    def watched(model: Base, cls: type, *args: Any, **kwargs: Any) -> None:
        before.setdefault(cls, (cls.__bases__, dict(vars(cls))))
        decorate(model, cls, *args, **kwargs)

    Base._decorate_cls_for_torch_compile = watched
    decorated: list[type] = []
    try:
        yield decorated
    finally:
        Base._decorate_cls_for_torch_compile = decorate
        decorated += [_restored(cls, bases, entries) for cls, (bases, entries) in before.items()]


def move(model: nn.Module, decorated: list[type]) -> None:
    """Give vLLM's modules the subclasses that have what vLLM added to their classes."""
    own = {cls.__bases__[0]: cls for cls in decorated}
    for module in model.modules():
        if type(module) in own:
            module.__class__ = own[type(module)]


def _restored(cls: type, bases: tuple[type, ...], entries: dict[str, Any]) -> type:
    """Undo what was done to `cls`; returns the subclass that has it."""
    changed = {
        name: value
        for name, value in vars(cls).items()
        if name not in _SLOTS and (name not in entries or entries[name] is not value)
    }
    added = [base for base in cls.__bases__ if base not in bases]
    for name in changed:
        if name in entries:
            setattr(cls, name, entries[name])
        else:
            delattr(cls, name)
    cls.__bases__ = bases
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls, *added), names | changed)
