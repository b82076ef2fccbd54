"""`rlhf-dist submit --to slurm` and `rlhf-dist jobs` on a real SLURM of two nodes, each a slurmd on this machine."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.submission.slurm_cluster import slurm_cluster, why_not
from tests.tiny import save_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RUN = (
    "task=none", "steps=2", "reward.function=rlhf_dist.rewards:exact_match", "actor.rollout.engine=transformers",
    "actor.rollout.max_response_tokens=4", "data.prompts_per_step=4", "placement.pools.main.slots=1",
    "placement.host_processes=1", "data.train.path=rows.jsonl",
)  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if reason := why_not():
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield {**environment, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}


def rlhf(slurm: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "controller.commands.cli", *arguments],
        capture_output=True, text=True, timeout=400, check=False, cwd=folder, env=slurm,
    )  # fmt: skip


def test_a_run_over_two_nodes_is_sent_watched_and_found_again(slurm: dict[str, str], tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 8)
    sent = rlhf(
        slurm, tmp_path, "submit", "grpo", "--to", "slurm", "--nodes", "2", "--detach", "--folder", "jobs",
        f"model.path={model}", f"output.root={tmp_path}/runs", "placement.pools.main.nodes=2", *RUN,
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.strip()
    assert job.isdigit() and "sending 1 files" in sent.stderr
    followed = rlhf(slurm, tmp_path, "jobs", "attach", job, "--to", "slurm")
    assert followed.returncode == 0, followed.stdout[-3000:] + followed.stderr
    assert "step 2/2" in followed.stdout and f"job {job}: succeeded" in followed.stderr
    assert json.loads((tmp_path / "runs/grpo/summary.json").read_text())["steps"] == 2
    [listed] = json.loads(rlhf(slurm, tmp_path, "jobs", "list", "--to", "slurm", "--format", "json").stdout)
    assert (listed["id"], listed["status"], listed["recipe"], listed["name"]) == (job, "succeeded", "grpo", "grpo")
    [folder] = (tmp_path / "jobs").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    token = (folder / "token").read_text()
    assert not any(
        token in file.read_text() for file in (folder / "job.sh", folder / "command.json", folder / "log.txt")
    )
    scratch = Path(json.loads((folder / "head.json").read_text())["scratch"])
    assert not scratch.exists() and not _processes_with(str(scratch)), "Ray and its files are gone"


def test_a_job_that_is_stopped_ends_and_leaves_nothing(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "from rlhf_dist.dataflow.recipe import recipe\n"
        "from rlhf_dist.roles import Actor, Prompts\n\n"
        "if 'SLURM_JOB_ID' in os.environ:\n"
        "    print('job is up', flush=True)\n"
        "    time.sleep(300)\n\n\n"
        "@recipe\n"
        "def slow(prompts: Prompts, actor: Actor):\n"
        "    actor.generate_sequences(prompts)\n"
    )
    small = ("placement.pools.main.slots=1", "placement.host_processes=1", "model.path=/m")
    sent = rlhf(slurm, tmp_path, "submit", "slow.py", "--to", "slurm", "--detach", "--folder", "jobs", *small)
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.strip()
    deadline = time.monotonic() + 200
    while "job is up" not in rlhf(slurm, tmp_path, "jobs", "logs", job, "--to", "slurm").stdout:
        assert time.monotonic() < deadline, "the job did not start"
        time.sleep(1)
    assert rlhf(slurm, tmp_path, "jobs", "status", job, "--to", "slurm").stdout.split()[:2] == [job, "running"]
    stopped = rlhf(slurm, tmp_path, "jobs", "stop", job, "--to", "slurm")
    assert stopped.returncode == 0 and f"job {job}: " in stopped.stderr
    [folder] = (tmp_path / "jobs").iterdir()
    scratch = Path(json.loads((folder / "head.json").read_text())["scratch"])
    deadline = time.monotonic() + 60
    while scratch.exists() or _processes_with(str(scratch)):
        assert time.monotonic() < deadline, "Ray is still there"
        time.sleep(0.5)


def test_what_slurm_does_not_know_is_said(slurm: dict[str, str], tmp_path: Path) -> None:
    unknown = rlhf(slurm, tmp_path, "jobs", "status", "987654", "--to", "slurm")
    assert unknown.returncode == 1 and "`scontrol --oneliner show job 987654` failed" in unknown.stderr
    option = rlhf(
        slurm,
        tmp_path,
        "submit",
        "sft",
        "--to",
        "slurm",
        "--option=--partition=none",
        "--folder",
        "jobs",
        "model.path=/m",
    )
    assert option.returncode == 1 and "partition" in option.stderr and "Traceback" not in option.stderr


def _processes_with(text: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if text in (process / "cmdline").read_text().replace("\0", " "):
                found.append(int(process.name))
        except OSError:
            continue
    return [one for one in found if one != os.getpid()]
