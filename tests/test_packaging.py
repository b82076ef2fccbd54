"""What is shipped beside the repository: a wheel that runs outside of it, and images whose files are linted."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny import save_llama

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def test_a_wheel_runs_outside_of_the_repository(tmp_path: Path) -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    sources = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, sources):
        if (ROOT / name).is_file() and not name.startswith((".ci", "tests/", "docs/")):
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=tmp_path / "source", check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    model = save_llama(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n' * 8)

    def rlhf(*arguments: str) -> str:
        code = "import sys; from controller.commands import cli; assert 'site' in cli.__file__; sys.exit(cli.main())"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert {"ppo", "dpo", "sft"} <= {one["name"] for one in json.loads(rlhf("recipes", "--format", "json"))}
    assert "rlhf_dist.demo.addition" in rlhf("config", "ppo", "task=addition", f"model.path={model}", "--plain")
    assert rlhf("check", "sft", f"model.path={model}", "data.train.path=rows.jsonl").endswith("fit together\n")


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.cpu"])
def test_images_are_linted(file: str) -> None:
    done = subprocess.run([BIN / "hadolint", ROOT / "docker" / file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_keeps_to_its_schema() -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", ROOT / "docker/compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
