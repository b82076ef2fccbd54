"""Code that lies in a model's folder is never run: not by default, and not because somebody says yes to a question."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_llama

ROOT = Path(__file__).parents[1]
LOADING = ("from_pretrained", "from_config", "EngineArgs")


def test_every_place_that_loads_a_model_says_so() -> None:
    found = []
    for folder in ("rlhf_dist", "workers", "controller"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and _name(node.func) in LOADING:
                    said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    found.append((f"{file.relative_to(ROOT)}:{node.lineno}", said.get("trust_remote_code")))
    assert len(found) > 8
    assert [place for place, said in found if said != "False"] == []


def _name(function: ast.expr) -> str:
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


@pytest.mark.slow
def test_a_folder_with_code_is_refused_whatever_stands_on_stdin(tmp_path: Path) -> None:
    model, marker = save_llama(tmp_path / "model", hidden=64), tmp_path / "it ran"
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "controller.commands.cli", "run", "remax", "--local", "task=addition", "steps=1"]
    done = subprocess.run(
        [*command, f"model.path={model}", f"output.root={tmp_path / 'runs'}"],
        input="y\n" * 20, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0 and "error: " in done.stderr.splitlines()[-1]
    assert not marker.exists()
