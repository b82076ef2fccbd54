"""The page of a run as a file: what is in it, what is left out, what it never lets through."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.commands.cli import main
from controller.report.page import write_report
from controller.report.rollouts import fair_share, list_rollouts, read_block
from rlhf_dist.batch import Batch, Column
from tests.report.made_run import SPIKE, make_run

HOSTILE = '</script><script>document.title = "broken"</script><img src=x onerror="document.title=1"><b>bold</b>'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "ppo", responses=("4", HOSTILE))


def block(page: str, name: str) -> Any:
    found = re.search(f'id="block-{name}">([A-Za-z0-9+/=]*)<', page)
    assert found, name
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_a_page_has_the_whole_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "page.html"
    assert main(["report", str(run), "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    page = target.read_text()
    (shown,) = block(page, "data")["runs"]
    assert shown["steps"] == list(range(30))
    assert len(shown["topics"]["Rewards and advantages"]["reward/reward"]["y"]) == 30
    assert shown["topics"]["Held-out rows"]["heldout/reward"] == {"x": [30], "y": [0.9]}
    assert shown["node_of"]["actor/grad_norm"] == "actor.update_actor"
    assert {"actor.update_actor", "gae"} <= {node["name"] for node in shown["graph"]["nodes"]}
    below = [node["y"] for node in shown["graph"]["nodes"] if node["name"].startswith("heldout/")]
    above = [node["y"] for node in shown["graph"]["nodes"] if not node["name"].startswith("heldout/")]
    (part,) = shown["graph"]["parts"]
    assert len(below) == 3 and max(above) < part["y"] < min(below), "what is evaluated stands by itself, with its title"
    assert part["title"] == "heldout, before the first step and after the last"
    assert [one["step"] for one in shown["rollouts"]] == [0, 5, 10, 15, 20, 25]
    spike = shown["spikes"][0]
    assert (spike["metric"], spike["step"]) == ("actor/grad_norm", SPIKE) and spike["value"] == pytest.approx(
        100, abs=1
    )
    columns = block(page, shown["rollouts"][1]["block"])
    assert columns["policy_version"][0] == [[5, 2], [6, 1]] and columns["response"][0] == HOSTILE


def test_nothing_of_a_run_is_html_and_nothing_is_loaded_from_elsewhere(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "onerror" not in page and "broken" not in page, "texts of a run are in compressed blocks only"
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", page) and "@import" not in page
    assert "default-src &#39;none&#39;" in page and "unsafe-eval" not in page and "connect-src &#39;none&#39;" in page


def test_rollouts_keep_to_a_budget_and_say_so(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "page.html", budget=600)
    (shown,) = block((tmp_path / "page.html").read_text(), "data")["runs"]
    kept = sum(one["shown"] for one in shown["rollouts"])
    assert 6 <= kept < 36 and shown["notes"][0].startswith(f"{kept} of 36 rollouts are in this page")


def test_numbers_of_tokens_become_runs(tmp_path: Path) -> None:
    batch = Batch(
        {
            "versions": Column.ragged([[3, 3, 4], [], [5]], dtype=np.int32),
            "advantages": Column.ragged([[0.5, np.nan], [0.5], []], dtype=np.float32),
            "scores": Column(np.array([[1.0, 1.0], [2.0, 3.0], [3.0, 3.0]], np.float32)),
        }
    )
    batch.write_parquet(tmp_path / "rollouts/step_000003.parquet")
    (file,), unreadable = list_rollouts(tmp_path)
    columns = read_block(file).columns
    assert columns["versions"] == [[[3, 2], [4, 1]], [], [[5, 1]]], "no run goes on in the next row"
    assert columns["advantages"] == [[[0.5, 1], [None, 1]], [[0.5, 1]], []]
    assert columns["scores"] == [[[1.0, 2]], [[2.0, 1], [3.0, 1]], [[3.0, 2]]] and unreadable == []


def test_a_budget_is_shared_fairly() -> None:
    assert fair_share([10, 10], 100) >= 10, "all fit"
    assert fair_share([10, 1000, 1000], 210) == 100, "the small one is whole, the large ones have the same"
    assert fair_share([], 5) == 5


def test_a_run_that_has_just_begun_has_a_page_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "new", steps=1)
    (run / "metrics.jsonl").write_text('{"step": 0, "actor/loss": null, "nonfinite_metrics": 1}\n{"step": 1, "act')
    for name in ("trace.json", "graph.json", "rollouts/step_000000.parquet"):
        (run / name).unlink()
    (run / "rollouts/step_000001.parquet").write_text("cut off")
    write_report([run], tmp_path / "page.html")
    (shown,) = block((tmp_path / "page.html").read_text(), "data")["runs"]
    assert shown["steps"] == [0] and not shown["ended"] and shown["timeline"] is None
    assert any("rollouts/step_000001.parquet" in note for note in shown["notes"]), "named, not dropped in silence"


def test_several_runs_are_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_run(tmp_path / "faster", learning_rate=1e-4)
    target = tmp_path / "compare.html"
    assert main(["compare", str(run), str(other), "--output", str(target)]) == 0
    data = block(target.read_text(), "data")
    assert [one["name"] for one in data["runs"]] == ["ppo", "faster"]
    assert data["differ"] == [{"key": "actor.optimizer.lr", "values": ["1e-05", "0.0001"]}]
    assert {"metric": "heldout/reward", "values": [0.9, 0.9]} in data["final"]
    capsys.readouterr()
    assert main(["compare", str(run), str(other), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["last"] == data["final"]


@pytest.mark.parametrize("command", ["report", "compare", "watch"])
def test_what_is_no_run_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path / "nothing")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "is not the folder of a run" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
