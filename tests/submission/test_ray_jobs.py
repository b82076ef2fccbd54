"""`rlhf-dist submit` against a real Ray cluster with token authentication, started here in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller.submission.files import JobFiles
from controller.submission.job import Job
from controller.submission.ray_jobs import _environment
from tests.tiny import save_llama

TOKEN = "a-token-only-this-test-knows-0123456789"
START_S = 120.0
RAY_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class RunningCluster:
    """A head node with its dashboard."""

    url: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in RAY_VARIABLES}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean.get('PATH', '')}"
    return {**clean, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **extra}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    folder = Path(tempfile.mkdtemp(prefix="rs"))  # short: Ray puts Unix sockets into it
    dashboard = free_port()
    url = f"http://127.0.0.1:{dashboard}"
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={free_port()}", f"--ray-client-server-port={free_port()}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}",
        "--num-cpus=6", "--num-gpus=0", f"--object-store-memory={256 << 20}", "--disable-usage-stats",
    ]  # fmt: skip
    log = (folder / "head.log").open("w")
    head = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env=environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while not _answers(url):
            assert head.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()[-3000:]
            time.sleep(0.5)
        yield RunningCluster(url)
    finally:
        head.send_signal(signal.SIGTERM)  # this head and what it started, nothing else on the machine
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    """Whether the job server is up: it refuses us, since we show no token."""
    try:
        urllib.request.urlopen(f"{url}/api/jobs/", timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False
    raise AssertionError("the cluster answered without a token: authentication is off")


def submit(
    cluster: RunningCluster, *arguments: str, folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "controller.commands.cli", "submit", *arguments, "--address", cluster.url],
        capture_output=True, text=True, timeout=280, check=False, cwd=folder,
        env=environment(PYTHONPATH=str(Path.cwd()), **variables),
    )  # fmt: skip


def jobs(cluster: RunningCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "controller.commands.cli", "jobs", *arguments, "--address", cluster.url],
        capture_output=True, text=True, timeout=100, check=False,
        env=environment(RAY_AUTH_TOKEN=TOKEN),
    )  # fmt: skip


def test_a_missing_and_a_wrong_token_name_the_variables_to_set(cluster: RunningCluster, tmp_path: Path) -> None:
    without = submit(cluster, "sft", "model.path=/m", folder=tmp_path, RAY_AUTH_MODE="disabled")
    assert without.returncode == 1 and "asks for a token and ours is missing" in without.stderr
    wrong = submit(cluster, "sft", "model.path=/m", folder=tmp_path, RAY_AUTH_TOKEN="x" * 32)
    assert wrong.returncode == 1 and "was refused" in wrong.stderr
    for done in (without, wrong):
        assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in done.stderr and "Traceback" not in done.stderr


def test_a_job_that_fails_fails_here_with_its_log(cluster: RunningCluster, tmp_path: Path) -> None:
    done = submit(cluster, "sft", "model.path=/no/such/model", folder=tmp_path, RAY_AUTH_TOKEN=TOKEN)
    assert done.returncode == 1 and "no folder '/no/such/model'" in done.stdout, done.stderr


def test_a_users_recipe_runs_as_a_job_with_all_it_needs_and_live_logs(cluster: RunningCluster, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 8)
    project = tmp_path / "project"
    project.mkdir()
    (project / "beside.py").write_text(
        "TOKENS = 4\n\n\ndef right(response, answer):\n    return float(response == answer)\n"
    )
    (project / "rew.py").write_text(
        "from beside import right\n\n\ndef f(prompt, response, answer):\n    import beside\n\n"
        "    assert beside.TOKENS == 4\n    return right(response, answer)\n"
    )
    (project / "mine.py").write_text(
        "from beside import TOKENS\n"
        "from rlhf_dist.algorithms import policy_gradient\n"
        "from rlhf_dist.dataflow.recipe import recipe\n"
        "from rlhf_dist.roles import Actor, Prompts, Reward\n"
        "from rlhf_dist.transforms import rloo_advantage\n\n\n"
        "@recipe\n"
        "def mine(prompts: Prompts, actor: Actor, reward: Reward):\n"
        "    batch = reward.compute_reward(actor.generate_sequences(prompts, n=TOKENS))\n"
        "    actor.update_actor(rloo_advantage(batch), loss=policy_gradient())\n"
    )
    done = submit(
        cluster, "project/mine.py", f"model.path={model}", "data.train.path=rows.jsonl", "steps=2",
        "reward.function=project/rew.py:f", "actor.rollout.engine=transformers", "actor.rollout.max_response_tokens=4",
        "data.prompts_per_step=4", "placement.pools.main.slots=1", f"output.root={tmp_path / 'runs'}",
        folder=tmp_path, RAY_AUTH_TOKEN=TOKEN,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "sending 4 files" in done.stderr and "project/beside.py, project/mine.py, project/rew.py" in done.stderr
    assert "step 1/2" in done.stdout and "step 2/2" in done.stdout
    assert (tmp_path / "runs" / "mine" / "summary.json").is_file()


def test_ctrl_c_of_a_follower_leaves_the_job_and_stop_ends_it(cluster: RunningCluster, tmp_path: Path) -> None:
    # A recipe file that takes its time when the job loads it, and none when it is loaded here.
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "from rlhf_dist.dataflow.recipe import recipe\n"
        "from rlhf_dist.roles import Actor, Prompts\n\n"
        "if 'RAY_JOB_CONFIG_JSON_ENV_VAR' in os.environ:\n"
        "    print('job is up', flush=True)\n"
        "    time.sleep(200)\n\n\n"
        "@recipe\n"
        "def slow(prompts: Prompts, actor: Actor):\n"
        "    actor.generate_sequences(prompts)\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-m", "controller.commands.cli", "submit", "slow.py", "model.path=/m", "--address",
         cluster.url],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        env=environment(PYTHONPATH=str(Path.cwd()), PYTHONUNBUFFERED="1", RAY_AUTH_TOKEN=TOKEN),
    )  # fmt: skip
    assert started.stdout is not None
    lines = []
    for line in started.stdout:
        lines.append(line)
        if "job is up" in line:
            break
    started.send_signal(signal.SIGINT)
    rest, _ = started.communicate(timeout=60)
    assert started.returncode == 130 and "goes on; `rlhf-dist jobs attach" in rest, "".join(lines) + rest
    [job] = [one for one in json.loads(jobs(cluster, "list", "--format", "json").stdout) if one["status"] == "running"]
    assert (job["recipe"], job["name"]) == ("slow", "slow")
    assert "job is up" in jobs(cluster, "logs", job["id"]).stdout
    stopped = jobs(cluster, "stop", job["id"])
    assert stopped.returncode == 0 and f"job {job['id']}: stopped" in stopped.stderr
    unknown = jobs(cluster, "status", "raysubmit_none")
    assert unknown.returncode == 1 and "has no job 'raysubmit_none'" in unknown.stderr


def test_a_job_that_never_fits_says_what_is_free(cluster: RunningCluster, tmp_path: Path) -> None:
    done = submit(
        cluster, "sft", "model.path=/m", "placement.pools.main.slots=64", folder=tmp_path, RAY_AUTH_TOKEN=TOKEN
    )
    assert done.returncode == 1 and "has 6, 6 free; use fewer slots" in done.stderr, done.stderr
    waited = submit(
        cluster, "sft", "model.path=/m", "placement.pools.main.slots=64", "--wait", "1", folder=tmp_path,
        RAY_AUTH_TOKEN=TOKEN,
    )  # fmt: skip
    assert waited.returncode == 1 and "use fewer slots" in waited.stderr, "waiting would not help"


def test_nobody_at_the_address_is_said_at_once(tmp_path: Path) -> None:
    nobody = RunningCluster(f"http://127.0.0.1:{free_port()}")
    done = submit(nobody, "sft", "model.path=/m", folder=tmp_path)
    assert done.returncode == 1 and "no Ray dashboard answers at" in done.stderr and "Traceback" not in done.stderr


def test_the_job_s_folder_has_what_the_launch_names_where_it_was_found(tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    files = {Path("project/mine.py"): _file(tmp_path, "mine.py"), Path("rows.jsonl"): _file(tmp_path, "rows.jsonl")}
    job = Job(
        name="n",
        recipe="two",
        files=JobFiles(files, "project/mine.py:two", 0),
        overrides=["data.train.system='be kind'"],
    )
    environment = _environment(job, shipped)
    assert sorted(str(path.relative_to(shipped)) for path in shipped.rglob("*.*")) == ["project/mine.py", "rows.jsonl"]
    told = """rlhf-dist run project/mine.py:two 'data.train.system='"'"'be kind'"'"'' ray.address=auto"""
    assert job.command_line("auto") == told
    assert environment == {"working_dir": str(shipped)}
    nothing = Job(name="n", recipe="ppo", files=JobFiles({}, "ppo", 0), overrides=["ray.address=1.2.3.4:5"])
    assert (
        nothing.command_line("auto") == "rlhf-dist run ppo ray.address=1.2.3.4:5" and _environment(nothing, None) == {}
    )


def _file(folder: Path, name: str) -> Path:
    (folder / name).write_text("x")
    return folder / name
