from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.world import World
from tests.tiny import save_llama, save_qwen3


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Two ranks, shared by all tests of this folder: they import vLLM once."""
    found = World(2)
    yield found
    found.close()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by name; `changed` has the shape of `tied` and `untied2` that of `untied`, other weights."""
    root = tmp_path_factory.mktemp("models")
    return {
        "tied": save_llama(root / "tied", tied=True),
        "tied2": save_llama(root / "tied2", tied=True, seed=1),
        "untied": save_llama(root / "untied"),
        "untied2": save_llama(root / "untied2", seed=1),
        "qwen3": save_qwen3(root / "qwen3"),
        "qwen32": save_qwen3(root / "qwen32", seed=1),
    }
