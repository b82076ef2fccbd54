"""Recipes of this folder run on a few tiny models, hundreds of times: each model is probed once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import wraps
from typing import Any

import pytest

from workers.engines.model.probe import Finding, probe
from workers.engines.training import packed_engine


@pytest.fixture(scope="package", autouse=True)
def probed_once() -> Iterator[None]:
    """What the probe found of a model is what it finds of another of the same config.json, dtype and engine; tests of
    the probe are in tests/engines. A tenth of the time of this folder."""
    found: dict[tuple[Any, ...], Finding] = {}

    @wraps(probe)
    def once(trial: Any, *, asked: Any, config: Any, **kind: Any) -> Finding:
        of = (json.dumps(config.to_dict(), sort_keys=True, default=str), *sorted(kind.items()))
        if of not in found:
            found[of] = probe(trial, asked=asked, config=config, **kind)
        return found[of]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_engine, "probe", once)
        yield
