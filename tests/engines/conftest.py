from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.world import World
from tests.tiny import save_llama


def _world(size: int) -> Iterator[World]:
    world = World(size)
    yield world
    world.close()


@pytest.fixture(scope="package")
def world1() -> Iterator[World]:
    yield from _world(1)


@pytest.fixture(scope="package")
def world2() -> Iterator[World]:
    yield from _world(2)


@pytest.fixture(scope="package")
def world4() -> Iterator[World]:
    yield from _world(4)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tied"), tied=True)
