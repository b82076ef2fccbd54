"""`rlhf-dist submit --dry-run` for each kind of cluster, and what it refuses; nothing is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.commands.cli import main
from controller.submission.slurm import _info


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["submit", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_the_fewest_nodes_that_it_fits_on_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["submit", "sft", "--to", "k8s", "--image", "i", "--nodes", "auto", "--node", "8xH100", "--dry-run",
         "model.path=llama3-70b", "task=chain_sum"]
    )  # fmt: skip
    told = capsys.readouterr()
    assert "nodes of 8xH100: the fewest on which it fits" in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("submit", "sft", "model.path=/m"), "--to ray needs --address"),
        (("submit", "sft", "--to", "k8s", "model.path=/m"), "--to k8s needs --image"),
        (("submit", "sft", "--address", "http://x:1", "--nodes", "2", "model.path=/m"), "--nodes is for slurm and k8s"),
        (("submit", "sft", "--to", "k8s", "--image", "i", "--nodes", "no", "model.path=/m"), "must be a number from 1"),
        (("submit", "sft", "--to", "k8s", "--image", "i", "--nodes", "auto", "model.path=/m"), "needs --node GxKIND"),
        (("submit", "sft", "--to", "k8s", "--image", "i", "--env", "X", "model.path=/m"), "must be NAME=VALUE"),
        (
            (
                "submit",
                "sft",
                "--to",
                "k8s",
                "--image",
                "i",
                "--dry-run",
                "model.path=/m",
                "ray.worker_env={JUDGE_API_KEY: sk-PLANTED}",
            ),
            "ray.worker_env.JUDGE_API_KEY must not hold a secret",
        ),
        (("jobs", "status", "--address", "http://x:1"), "needs a job's id"),
        (("jobs", "list", "--to", "slurm", "--address", "http://x:1"), "--address is Ray's dashboard"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, *arguments)


def test_slurm_s_words_are_read(tmp_path: Path) -> None:
    line = (
        "JobId=12 JobName=rlhf-dist:grpo:mine UserId=a(1) JobState=CANCELLED Reason=None StartTime=2026-01-02T03:04:05 "
        f"EndTime=2026-01-02T03:05:05 StdOut={tmp_path}/log.txt"
    )
    (tmp_path / "exit.json").write_text('{"code": 143}')
    found = _info(line)
    assert (found.id, found.recipe, found.name, found.status) == ("12", "grpo", "mine", "stopped")
    assert found.message == "cancelled; the run ended with code 143" and found.ended - found.started == 60  # type: ignore[operator]
    waiting = _info(line.replace("CANCELLED", "PENDING").replace("Reason=None", "Reason=Resources"))
    assert (waiting.status, waiting.message, waiting.started) == ("waiting", "pending: Resources", None)
