"""Folders whose tests start real process groups, engines or clusters are `slow`: left out of `make check`."""

from __future__ import annotations

from pathlib import Path

import pytest

SLOW_FOLDERS = {"engines", "generation", "gpu", "runs"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)
