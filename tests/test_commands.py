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
from rlhf_dist.compose import compose
from rlhf_dist.secret_settings import check_addresses, check_no_secrets, kept_variables, plain_variables
from rlhf_dist.typed import ConfigError
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
    for name in (
        "HF_TOKEN",
        "WANDB_API_KEY",
        "RAY_AUTH_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "RLHF_DIST_TOKEN",
        "JUDGE_API_KEY",
    ):
        monkeypatch.setenv(name, SECRET)
    model = save_llama(tmp_path / "model", hidden=64)
    capsys.readouterr()
    settings = [f"model.path={model}", "task=addition", f"output.root={tmp_path}", "data.prompts_per_step=2", "steps=1"]
    short = ["actor.rollout.max_response_tokens=2", "output.save_model=false", "output.checkpoint_every=null"]
    short.append("ray.worker_env={JUDGE_API_KEY: $JUDGE_API_KEY}")
    assert main(["run", "remax", "--local", "--format", "json", *settings, *short]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["steps"] == 1 and printed.count("\n") == 1
    assert main(["report", str(tmp_path / "remax")]) == 0
    files = [path for path in (tmp_path / "remax").rglob("*") if path.is_file()]
    assert len(files) > 5 and (tmp_path / "remax/report.html") in files
    for path in files:
        for text in (path.read_bytes(), *_blocks(path)):
            assert SECRET.encode() not in text, path


@pytest.mark.parametrize(
    "setting",
    [
        "ray.worker_env={JUDGE_API_KEY: PLANTED}",
        "output.store_options={secret: PLANTED}",
        "output.store_options={client_kwargs: {aws_secret_access_key: PLANTED}}",
        "ray.worker_env={A: $NOT_SET_4711}",
    ],
    ids=["variable", "store", "store, nested", "not set"],
)
def test_a_secret_is_no_setting(setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "remax", "--local", "model.path=nowhere", "task=addition", f"output.root={tmp_path}"]
    assert main([*arguments, setting.replace("PLANTED", SECRET)]) == 2
    said = capsys.readouterr().err
    assert "must not hold a secret" in said or "which is not set" in said
    assert SECRET not in said and not any(tmp_path.iterdir())


def test_workers_get_secrets_in_a_call_and_all_else_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    given = {"JUDGE_API_KEY": "$JUDGE_API_KEY", "OTHER_TOKEN": "$JUDGE_API_KEY", "LD_LIBRARY_PATH": "/opt/lib"}
    assert plain_variables(given) == {"LD_LIBRARY_PATH": "/opt/lib"}
    assert kept_variables(given) == {"JUDGE_API_KEY": SECRET, "OTHER_TOKEN": SECRET}


@pytest.mark.parametrize("name", ["HF_TOKEN", "PGPASSWORD", "key", "blob_sas", "AZURE_STORAGE_CONNECTION_STRING"])
def test_secrets_are_known_by_their_names(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must not hold a secret"):
        check_no_secrets({name: "x"}, {})
    with pytest.raises(ConfigError, match=f"store_options.a.{name} must not hold a secret"):
        check_no_secrets({name: f"${name}"}, {"a": {name: "x"}})


def test_what_is_no_secret_is_a_setting() -> None:
    check_no_secrets({"TOKENIZERS_PARALLELISM": "false", "MONKEY": "1"}, {"token": "anon", "anon": True, "key": None})
    check_addresses({"data": {"path": "s3://bucket/a.jsonl,hf://datasets/a/b@v1/*[01].jsonl", "text": "a://b:c@d\n"}})
    with pytest.raises(ConfigError, match=r"ray.worker_env.PATH must be \$NAME alone .* got '/opt:\$PATH'"):
        check_no_secrets({"PATH": "/opt:$PATH"}, {})


@pytest.mark.parametrize(
    "address",
    [f"https://me:{SECRET}@host/v1", f"https://host/a?X-Amz-Signature={SECRET}", f"az://a/b?x=1&sig={SECRET}"],
)
def test_an_address_holds_no_secret(address: str) -> None:
    with pytest.raises(ConfigError, match="data.path must be an address without a secret") as error:
        check_addresses({"data": {"path": f"rows.jsonl,{address}"}})
    assert SECRET not in str(error.value)
    with pytest.raises(ConfigError, match="^(model|actor.model).path must be an address without a secret"):
        compose("sft", [f"model.path={address}", "task=none", "name=x"])


def _blocks(path: Path) -> list[bytes]:
    """What is compressed in a page."""
    found = re.findall(r'id="block-[^"]*">([^<]*)<', path.read_text()) if path.suffix == ".html" else []
    return [gzip.decompress(base64.b64decode(text)) for text in found]
