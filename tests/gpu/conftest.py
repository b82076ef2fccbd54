"""Worlds whose ranks share one device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.world import World
from tests.tiny import save_llama


@pytest.fixture(scope="module")
def world(device: str) -> Iterator[World]:
    """Two ranks on that device."""
    made = World(2, device)
    yield made
    made.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; heads of 32, which every kernel takes."""
    return save_llama(tmp_path_factory.mktemp("gpu"), hidden=128)
