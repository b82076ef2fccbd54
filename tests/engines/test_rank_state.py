"""A copy in memory of what a rank holds: training goes on from it, in this engine or a new one, to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines.losses import TokenLoss, make_batch
from tests.engines.test_state import ENGINES, my_rows, new_engine, same, weights_of
from tests.engines.world import World


def copy_and_go_on(folder: Path, settings: dict[str, Any]) -> tuple[Any, Any, Any, str]:
    from workers.engines.files.rank_state import BrokenCopy

    engine = new_engine(folder, **settings)
    rows = my_rows(make_batch(), settings)
    engine.step(rows, TokenLoss())
    engine.save_weights("best", optimizer=False)
    copy = engine.copy_state()
    engine.step(rows, TokenLoss())
    expected = weights_of(engine)
    engine.step(rows, TokenLoss())
    engine.put_back(copy)
    engine.step(rows, TokenLoss())
    again = weights_of(engine)
    new = new_engine(folder, seed=5, **settings)
    new.put_back(copy)
    assert new.version == 1
    new.step(rows, TokenLoss())
    taken_up = weights_of(new)
    new.restore_weights("best")
    broken = next(parts for parts in copy.parts.values() if parts and parts[0].nbytes)
    broken[0][0] ^= 1
    try:
        new.put_back(replace(copy, version=9))
    except BrokenCopy as error:
        return expected, again, taken_up, str(error)
    return expected, again, taken_up, ""


@pytest.mark.parametrize("engine", [ENGINES[name] for name in ("fsdp", "deepspeed 1", "deepspeed 3")])
def test_training_goes_on_from_a_copy_in_memory(world2: World, llama: Path, engine: dict[str, Any]) -> None:
    for expected, again, taken_up, refused in world2.run(copy_and_go_on, llama, engine):
        same(again, expected)
        same(taken_up, expected)
        assert "CRC-32 differs" in refused
        assert any(np.any(value) for value in expected.values())
