"""A headless Chromium for the tests of the page, where the machine has one."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Skips where there is no playwright, or no browser: neither an installed one nor one of playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
    with playwright.sync_playwright() as driver:
        program = next(filter(None, map(shutil.which, NAMES)), None) or driver.chromium.executable_path
        if not os.path.exists(program):
            pytest.skip("no Chromium here: `apt install chromium`, or `playwright install chromium`")
        made = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


def new_tab(browser: Any) -> Any:
    """A new tab. What goes wrong in it, and every address it asks for beside files, is in `tab.wrong`."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    opened.set_default_timeout(60_000)
    opened.wrong = []
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    opened.on("console", lambda said: opened.wrong.append(said.text) if said.type == "error" else None)
    opened.on("request", lambda asked: opened.wrong.append(asked.url) if asked.url.startswith("http") else None)
    return opened


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab for one test."""
    opened = new_tab(browser)
    yield opened
    opened.close()


def until(tab: Any, expression: str, within_s: float = 60.0) -> None:
    """Wait until a JavaScript expression holds; playwright's own way needs `eval`, which the page forbids."""
    ends = time.monotonic() + within_s
    while not tab.evaluate(expression):
        assert time.monotonic() < ends, f"not true within {within_s:g} s: {expression}"
        tab.wait_for_timeout(20)
