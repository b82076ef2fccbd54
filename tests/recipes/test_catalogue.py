"""What recipes declare of papers: refused where it cannot be, listed, launched as variants, made a page of."""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from controller import launch_stages
from controller.commands.cli import main
from controller.commands.recipes_page import recipes_page
from controller.lifecycle.stages import check_stages
from rlhf_dist.catalogue import ROWS, Paper
from rlhf_dist.compose import compose, compose_dataflow
from rlhf_dist.recipe_files import list_recipes, list_stage_files, load_papers, load_recipe
from rlhf_dist.stages import read_stages
from rlhf_dist.typed import ConfigError
from rlhf_dist.vocabulary_facts import missing_rows
from tests.recipes.settings import MIXED, Made, make_files
from tests.tiny import save_llama


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    return {**make_files(folder), "model": save_llama(folder / "model")}


ROOT = Path(__file__).parent.parent.parent
PAPERS = {name: paper for name, (paper, _) in load_papers().items()}


def test_everything_on_the_shelf_says_what_it_is_of() -> None:
    assert {name.partition("/")[0] for name in PAPERS} == {*list_recipes(), *list_stage_files()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rows": (0,)}, "1 to 205, got 0"),
        ({"rows": (206,)}, "1 to 205, got 206"),
        ({"needs": ()}, "at least one of"),
        ({"needs": ("PREFS",)}, "at least one of"),
        ({"status": "sure"}, "exact, outline, study"),
        ({"status": "outline"}, "says in assumed="),
        ({"arxiv": "2401.00001v2"}, "without a version, got '2401.00001v2'"),
        ({"arxiv": "2413.00001"}, "a number like 2402.03300"),
        ({"arxiv": "2312.00001"}, "2023 for 2312.00001, got 2024"),
    ],
)
def test_a_paper_that_cannot_be_is_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Paper(**{"title": "X", "year": 2024, "needs": ("PREF",), **given})


def test_a_preprint_is_of_one_row_of_the_catalogue() -> None:
    """A number copied to another paper. Entries without a row may share it: they are other parts of the same paper."""
    rows = defaultdict(set)
    for paper in PAPERS.values():
        if paper.arxiv and paper.rows:
            rows[paper.arxiv].add(paper.rows)
    assert {number: found for number, found in rows.items() if len(found) > 1} == {}


def test_a_file_says_the_number_of_the_paper_that_it_is_of() -> None:
    """Corrected in one place and not in the other, or written in neither."""
    found = {file.stem: (paper.arxiv, file) for name, (paper, file) in load_papers().items() if "/" not in name}
    assert [name for name, (number, file) in found.items() if number and number not in said_of(file)] == []


def said_of(file: Path) -> str:
    """The docstring of a recipe; the comments of a file of stages."""
    text = file.read_text()
    if file.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    return "\n".join(line for line in text.splitlines() if line.startswith("#"))


def test_the_page_of_recipes_is_current() -> None:
    written = (ROOT / "docs" / "recipes.md").read_text()
    assert written == recipes_page(), "run: rlhf-dist recipes --format markdown > docs/recipes.md"


def test_what_is_missing_is_what_no_recipe_covers(capsys: pytest.CaptureFixture[str]) -> None:
    covered = {row for paper in PAPERS.values() for row in paper.rows}
    assert set(missing_rows()) == set(ROWS) - covered
    assert main(["recipes", "--missing", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == missing_rows()
    assert len(covered) >= 190, "rows that were covered are no more"


def test_a_variant_is_its_file_under_its_settings(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    given = [f"model.path={model}", "data.train.path=/d"]
    variant, plain = compose("dpo/ipo", given), compose("dpo", [*given, "algorithm.kind=ipo"])
    assert variant.recipe == plain.recipe and variant.algorithm == plain.algorithm
    assert (variant.run.name, plain.run.name) == ("dpo_ipo", "dpo")
    assert compose("dpo/ipo", [*given, "algorithm.kind=hinge"]).algorithm.kind == "hinge"  # the command line decides
    (tmp_path / "run.yaml").write_text("algorithm: {kind: sppo}\n")
    assert compose("dpo/ipo", given, str(tmp_path / "run.yaml")).algorithm.kind == "sppo"  # and so does --config


def test_a_variants_settings_may_follow_others() -> None:
    launch = compose("grpo/dr_grpo", ["model.path=/m", "actor.rollout.max_response_tokens=77"])
    assert launch.algorithm.row_divisor == 77 and not launch.algorithm.scale


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo/ipoo", "did you mean dpo/ipo"),
        ("xpo/what", "xpo has none"),
        ("ipo", "did you mean dpo/ipo?"),
        ("dpo/dpo", "unknown variant"),
    ],
)
def test_an_unknown_variant_is_named_with_those_there_are(name: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        compose(name, ["model.path=/m"])


@pytest.mark.parametrize("name", sorted(name for name, paper in PAPERS.items() if "/" in name and not paper.settings))
def test_a_variant_by_its_data_alone_has_the_graph_of_its_file(name: str) -> None:
    """Those with settings run in test_shelf.py."""
    assert [node.name for node in compose_dataflow(name)] == [
        node.name for node in compose_dataflow(name.split("/")[0])
    ]
    assert load_recipe(name).name == name.partition("/")[0]


def stages_given(name: str, made: Made, root: Path) -> list[str]:
    """Settings that make a file of stages whole: a tiny model, rows, a rule where no stage trains a reward."""
    given = {"model.path": made["model"], "model.dtype": "float32", "data.train.path": made["labelled"], "task": "none"}
    given |= {"data.prompts_per_step": 4, "steps": 1, "output.root": root, "output.tracker": "none"}
    found = [f"{key}={value}" for key, value in given.items()]
    for stage in read_stages(name).stages:
        if "reward.function" in stage.keys and not any("reward" in key for key in stage.settings[-1]):
            found.append(f"{stage.name}.reward.function={MIXED}")
        if "actor.rollout.max_response_tokens" in stage.keys:
            found.append(f"{stage.name}.actor.rollout.max_response_tokens=4")
    return found


@pytest.mark.parametrize("name", sorted(list_stage_files()))
def test_every_file_of_stages_fits_together(name: str, made: Made, tmp_path: Path) -> None:
    checked = check_stages(read_stages(name, stages_given(name, made, tmp_path)), local=True)
    assert len(checked) > 1 and PAPERS[name].rows


def test_a_pipeline_of_ours_runs_by_its_name(made: Made, tmp_path: Path) -> None:
    given = stages_given("genies", made, tmp_path)
    results = launch_stages("genies", *given, local=True, quiet=True)
    assert list(results) == ["source", "target"]
    measured = results["target"].summary["last"]
    assert 0 <= measured["accuracies/explicit_accuracy"] <= 1


def test_an_unknown_family_or_capability_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in ((("--family", "preferences"), "preference"), (("--needs", "PREFS"), "PREF")):
        assert main(["recipes", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and expected in said and said.count("\n") == 1
