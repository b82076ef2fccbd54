"""`rlhf-dist recipes`, `roles`, `columns` and `new`: what they say, and that what is written works."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from controller.commands.cli import main
from rlhf_dist.python_files import load_file
from rlhf_dist.recipe_files import list_recipes, load_papers
from rlhf_dist.schema import COLUMNS
from tests.test_cli import command, imported_by


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--format", "json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_recipes_as_json_say_what_each_needs(capsys: pytest.CaptureFixture[str]) -> None:
    found = {one["name"]: one for one in said(capsys, "recipes")}
    assert found.keys() == {*list_recipes(), *load_papers()}
    assert found["dpo"]["sources"] == {"pairs": "preferences"} and found["ppo"]["sources"] == {"prompts": "prompts"}
    assert found["ppo"]["roles"]["critic"] == "Critic" and "cost" in found["safe_rlhf"]["roles"]
    assert Path(found["grpo"]["file"]).name == "grpo.py" and "arXiv 2402.03300" in found["grpo"]["doc"]
    assert {one["name"] for one in said(capsys, "recipes", "--search", "Preferences")} == {
        name for name, one in found.items() if "preferences" in json.dumps(one).lower()
    }
    assert main(["recipes", "--search", "2402.03300"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["grpo", "exact", "prompts", "actor", "reference"]
    assert found["dpo/ipo"]["catalogue"] == [46] and found["dpo/ipo"]["status"] == "exact"
    assert (
        found["dpo/ipo"]["settings"] == {"algorithm.kind": "ipo"} and found["dpo/ipo"]["file"] == found["dpo"]["file"]
    )
    online = said(capsys, "recipes", "--family", "online_preference", "--needs", "PAIRJ")
    assert online and all(one["family"] == "online_preference" and "PAIRJ" in one["needs"] for one in online)


def test_roles_and_columns_are_those_of_the_declarations(capsys: pytest.CaptureFixture[str]) -> None:
    ops = {f"{kind['kind']}.{op['name']}": op for kind in said(capsys, "roles") for op in kind["ops"]}
    assert ops["Critic.compute_values"]["writes"] == ["values"] and ops["Critic.compute_values"]["rows"] == "keep"
    settings = ops["Actor.generate_sequences"]["settings"]
    assert (settings["n"], settings["greedy"], settings["template"]) == (1, False, None)
    update = ops["Actor.update_actor"]
    assert update["reads_of_loss"] and "response_mask" in update["reads"] and update["weights_written"] == "train"
    assert main(["roles"]) == 0
    assert "reads   prompt_ids, response_ids, response_mask, group_id, what its loss reads" in capsys.readouterr().out
    assert {one["name"] for one in said(capsys, "columns")} == COLUMNS.keys()


def test_columns_of_a_recipe_say_who_writes_and_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    found = {one["name"]: one for one in said(capsys, "columns", "ppo", "algorithm.whiten=false")}
    assert found["values"]["written_by"] == ["critic.compute_values"]
    assert found["values"]["read_by"] == ["gae", "critic.update_critic"]
    assert found["advantages"]["written_by"] == ["gae"] and found["advantages"]["shape"] == "[B, T]"
    assert main(["columns", "ppo"]) == 0
    assert "gae, whiten -> whiten, actor.update_actor" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("recipes",), ("roles",), ("columns", "ppo")])
def test_no_list_needs_torch_or_three_seconds(arguments: tuple[str, ...]) -> None:
    fastest = 1e9
    for _ in range(3):  # the machine may be busy with something else
        started = time.perf_counter()
        assert imported_by(*arguments) == set()
        fastest = min(fastest, time.perf_counter() - started)
        if fastest < 3.0:
            return
    pytest.fail(f"{fastest:.1f} s")


def test_a_new_recipe_is_listed_runs_and_passes_its_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "recipe", "my_grpo"]) == 0
    assert "pytest test_my_grpo.py" in capsys.readouterr().out
    (listed,) = said(capsys, "recipes", "my_grpo.py", "--search", "my_grpo")
    assert listed["roles"] == {"actor": "Actor", "reward": "Reward"}
    assert main(["new", "model", "tiny"]) == 0
    assert main(["run", "my_grpo.py", "--local", "steps=2", "--quiet"]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "runs/my_grpo/summary.json").read_text())["steps"] == 2
    tests = [test for name, test in vars(load_file("test_my_grpo.py")).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("recipe", "My-Grpo"), "a Python name in small letters, such as my_grpo"),
        (("recipe", "class"), "that is no keyword"),
        (("recipe", "test_it"), "does not begin with test_"),
        (("recipe", "ppo"), "ppo is one of our recipes; choose another name, such as my_ppo"),
        (("recipe", "json"), "there is a Python module json already"),
        (("recipe", "mine"), "test_mine.py exists already and is left as it is"),
        (("model", "test_mine.py"), "test_mine.py exists already"),
    ],
)
def test_nothing_is_overwritten_and_no_name_is_taken(
    tmp_path: Path, arguments: tuple[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_mine.py").write_text("mine")
    assert main(["new", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["test_mine.py"]
    assert (tmp_path / "test_mine.py").read_text() == "mine"


def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "nothing.py").write_text("x = 1\n")
    done = command("recipes", "nothing.py", folder=tmp_path)
    assert done.returncode == 2 and "nothing.py has no function marked @recipe" in done.stderr
    assert done.stderr.count("\n") == 1
