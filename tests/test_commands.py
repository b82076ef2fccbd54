"""Commands as people and scripts meet them: help with right examples, exit codes in one place, JSON on stdout."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shlex
from pathlib import Path

import pytest

from controller.commands.cli import _parsed, main
from controller.commands.registry import EXIT_CODES, all_commands
from tests.tiny import save_llama

COMMANDS = all_commands()
SECRET = "planted-4711"


@pytest.mark.parametrize("name", sorted(COMMANDS.run))
def test_every_command_has_help_with_examples_that_it_understands(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "\nexamples:\n  rlhf-dist " in shown
    for example in COMMANDS.examples[name]:
        assert example in shown
        parsed = _parsed(COMMANDS, shlex.split(example))
        assert parsed.command == name, example


def test_exit_codes_are_the_same_in_the_help_and_in_the_docs() -> None:
    documented = (Path(__file__).parents[1] / "docs/running.md").read_text().partition("## Exit codes")[2]
    for code in re.findall(r"^ +(\d+) ", EXIT_CODES, re.MULTILINE):
        assert f"| {code} |" in documented


def test_a_run_tells_a_script_its_summary_and_keeps_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "RLHF_DIST_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    model = save_llama(tmp_path / "model", hidden=64)
    capsys.readouterr()
    settings = [f"model.path={model}", "task=addition", f"output.root={tmp_path}", "data.prompts_per_step=2", "steps=1"]
    short = ["actor.rollout.max_response_tokens=2", "output.save_model=false", "output.checkpoint_every=null"]
    assert main(["run", "remax", "--local", "--format", "json", *settings, *short]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["steps"] == 1 and printed.count("\n") == 1
    assert main(["report", str(tmp_path / "remax")]) == 0
    files = [path for path in (tmp_path / "remax").rglob("*") if path.is_file()]
    assert len(files) > 5 and (tmp_path / "remax/report.html") in files
    for path in files:
        for text in (path.read_bytes(), *_blocks(path)):
            assert SECRET.encode() not in text, path


def _blocks(path: Path) -> list[bytes]:
    """What is compressed in a page."""
    found = re.findall(r'id="block-[^"]*">([^<]*)<', path.read_text()) if path.suffix == ".html" else []
    return [gzip.decompress(base64.b64decode(text)) for text in found]
