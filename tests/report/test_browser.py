"""The page in a real browser: it draws, it links, it is readable on a phone, and texts of a run stay texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.report.page import write_report
from tests.report.conftest import new_tab, until
from tests.report.made_run import SPIKE, make_run
from tests.report.test_page import HOSTILE


@pytest.fixture(scope="module")
def read(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tab with the page of a run, one of whose responses tries to be HTML: a chart library takes seconds to start, so
    it is read once."""
    folder = tmp_path_factory.mktemp("runs")
    write_report([make_run(folder / "<i>ppo", responses=("4", HOSTILE), rows=25)], folder / "page.html")
    tab = opened(new_tab(browser), folder / "page.html")
    yield tab
    tab.close()


@pytest.fixture
def tab_of_run(read: Any) -> Any:
    """The same tab as it was in the beginning, as far as a person sees."""
    read.set_viewport_size({"width": 1200, "height": 900})
    read.evaluate("document.getElementById('step').close(); location.hash = ''")
    return read


def opened(tab: Any, page: Path) -> Any:
    """The tab, once it shows the page."""
    tab.goto(page.as_uri())
    tab.wait_for_selector("body[data-ready]")
    assert tab.evaluate("document.body.dataset.ready") == "yes", tab.wrong
    tab.wait_for_selector("#rows .row")
    return tab


def test_it_draws_without_asking_anybody(tab_of_run: Any) -> None:
    tab = tab_of_run
    titles = tab.locator("h2").all_inner_texts()
    assert titles[:4] == ["Run", "Health", "Curves", "Time by node"] and "Rollouts" in titles
    tab.locator("[data-metric='reward/reward']").scroll_into_view_if_needed()
    tab.wait_for_selector("[data-metric='reward/reward'] .plot .scatterlayer path.js-line")
    assert tab.locator("#graph .node").count() >= 10
    assert tab.wrong == []


def test_texts_of_a_run_are_shown_as_they_are(tab_of_run: Any) -> None:
    tab = tab_of_run
    shown = tab.locator("#rows pre.response").all_inner_texts()
    assert HOSTILE in shown and "4" in shown
    assert tab.title() == "<i>ppo" and tab.locator("h1").inner_text() == "<i>ppo"
    assert tab.locator("main b", has_text="bold").count() == 0 and tab.locator("img").count() == 0
    assert tab.wrong == []


def test_a_spike_leads_to_its_step_rows_weights_and_node(tab_of_run: Any) -> None:
    tab = tab_of_run
    tab.get_by_text("Spikes (1)").click()
    tab.locator("#health").get_by_role("button", name=f"step {SPIKE}").click()
    said = tab.locator("#step").inner_text()
    assert re.search(r"actor/grad_norm (99|100)", said) and "weight versions after it: actor 21" in said
    assert "Unusual in this step" in said
    tab.wait_for_selector("#step .row")
    assert "drawn by weights 20 (2), 21 (1)" in tab.locator("#step .row").first.inner_text()
    tab.locator("#step").get_by_role("button", name="actor.update_actor").click()
    assert "chosen" in tab.locator("[data-node='actor.update_actor']").get_attribute("class")
    assert "actor/grad_norm" in tab.locator("#node").inner_text()


def test_an_address_opens_a_step_whose_rows_were_not_kept(tab_of_run: Any) -> None:
    tab = tab_of_run
    tab.evaluate("location.hash = 'step=13&metric=gae/ref_kl'")
    tab.wait_for_selector("#step .row")
    assert "rollouts were kept at step 15, not at 13" in tab.locator("#step").inner_text()


def test_rollouts_are_paged_searched_and_set_side_by_side(tab_of_run: Any) -> None:
    tab = tab_of_run
    assert tab.locator("#rows .row").count() == 20
    tab.locator("#rows").get_by_text("next ›").first.click()
    until(tab, "document.querySelectorAll('#rows > .row').length === 5")
    tab.locator("#rows").get_by_text("this prompt in other steps").first.click()
    tab.wait_for_selector(".beside")
    assert tab.locator(".beside h3").all_inner_texts()[:2] == ["step 0 (8)", "step 5 (8)"]
    search = tab.get_by_label("search rollouts")
    search.fill("<IMG SRC")
    search.press("Enter")
    until(tab, "document.querySelector('#rows p').textContent.includes('6 of 6 files')")
    assert tab.locator("#rows p.soft").first.inner_text().startswith("75 rows with “<IMG SRC” in 150 rollouts")
    assert tab.locator("mark").first.inner_text() == "<img src"


def test_a_phone_needs_no_sideways_scrolling(tab_of_run: Any) -> None:
    tab = tab_of_run
    tab.set_viewport_size({"width": 375, "height": 800})
    until(tab, "document.documentElement.scrollWidth <= 375")


def test_runs_are_drawn_over_each_other(tab: Any, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, learning_rate=lr) for name, lr in (("one", 1e-5), ("two", 1e-4))]
    write_report(runs, tmp_path / "compare.html")
    opened(tab, tmp_path / "compare.html")
    assert "actor.optimizer.lr" in tab.locator("#differences").inner_text()
    tab.locator("[data-metric='reward/reward']").scroll_into_view_if_needed()
    tab.wait_for_selector("[data-metric='reward/reward'] .plot .scatterlayer path.js-line")
    assert tab.locator("[data-metric='reward/reward'] .plot .scatterlayer path.js-line").count() == 2
    tab.get_by_label("run", exact=True).select_option("1")
    assert tab.locator("#overview h2").inner_text() == "Run two"
