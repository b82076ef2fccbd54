"""Which cluster a run uses: its own whatever the environment holds, or the one at ray.address, asked in seconds."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.cluster.ray_address import ANSWER_S, CONNECT_S, AddressError, address_to_join, prepare_own
from tests.tiny import save_llama

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent
CLEAR = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in CLEAR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise Ray turns it on for this process
    return monkeypatch


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://head:8265", r"must be host:port .* got a web address; .*submit RECIPE --address http://head:8265"),
        ("ray://head:10001", r"must be auto or host:port of a cluster \(port 6379\), got 'ray://head:10001'"),
        ("head", r"must be auto or host:port of a cluster \(port 6379\), got 'head'"),
        ("127.0.0.1:1", r"nothing listens at 127.0.0.1:1, which ray.address=127.0.0.1:1 names: .*refused"),
        ("no-such-host.invalid:6379", r"nothing listens at no-such-host.invalid:6379"),
    ],
)
def test_an_address_that_cannot_be_is_one_line(clean: pytest.MonkeyPatch, address: str, says: str) -> None:
    with pytest.raises(AddressError, match=says) as caught:
        address_to_join(address)
    assert "\n" not in str(caught.value)


def test_something_that_listens_and_never_answers_is_left_in_time(clean: pytest.MonkeyPatch) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        started = time.monotonic()
        with pytest.raises(AddressError, match="does not answer as a Ray cluster within 10 s"):
            address_to_join(f"127.0.0.1:{mute.getsockname()[1]}")
        assert time.monotonic() - started < CONNECT_S + ANSWER_S + 5


def test_the_environment_decides_for_auto_and_in_a_job_only(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert address_to_join(None) is None
    with pytest.raises(AddressError, match="ray.address=auto with RAY_ADDRESS=127.0.0.1:1 names .left by a cluster"):
        address_to_join("auto")
    clean.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(AddressError, match="ray.address=auto with RAY_ADDRESS=http://head:8265 must be host:port"):
        address_to_join("auto")
    clean.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(AddressError, match="RAY_ADDRESS=http://head:8265"):
        address_to_join(None)


def test_a_cluster_of_its_own_gets_a_token_without_a_file(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert prepare_own() == "127.0.0.1:1" and "RAY_ADDRESS" not in os.environ
    assert "RAY_AUTH_TOKEN" not in os.environ, "the user said which mode"
    clean.delenv("RAY_AUTH_MODE")
    clean.setenv("RAY_AUTH_TOKEN", "")  # so that it is taken back when the test ends
    del os.environ["RAY_AUTH_TOKEN"]
    prepare_own()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ra"))  # short: Ray puts Unix sockets into it
    save_llama(made / "model")
    (made / "rows.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n' * 8)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def run(folder: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPTS / "rlhf-dist"), "run", "sft", "task=none", f"model.path={folder}/model", "steps=1"]
    command += [f"data.train.path={folder}/rows.jsonl", "data.prompts_per_step=2", "placement.pools.main.slots=1"]
    command += [f"output.root={folder}/runs", "resume=overwrite", "output.save_model=false"]
    clean = {name: value for name, value in os.environ.items() if name not in CLEAR}
    environment = {**clean, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(folder), **variables}
    return subprocess.run(
        [*command, *overrides], capture_output=True, text=True, timeout=280, cwd=folder, env=environment, check=False
    )


@pytest.mark.slow
def test_a_run_joins_a_cluster_that_wants_a_token_or_stands_beside_it(folder: Path) -> None:
    home = folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("a-token-that-an-earlier-run-left-0123456789")
    port = free_port()
    command = [
        str(SCRIPTS / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
        f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
        "--include-dashboard=false", f"--temp-dir={folder}/ray", "--num-cpus=3", "--num-gpus=0",
        f"--object-store-memory={128 << 20}", "--disable-usage-stats",
    ]  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if name not in CLEAR}
    environment = {**clean, "HOME": str(home), "PYTHONPATH": str(ROOT)}
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while "block forever" not in (folder / "head.log").read_text():
            assert head.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()[-2000:]
            time.sleep(0.2)
        address = f"ray.address=127.0.0.1:{port}"
        started = time.monotonic()
        refused = run(folder, address, HOME=str(folder / "nothing here"))
        assert refused.returncode == 1 and time.monotonic() - started < 60
        assert refused.stderr.startswith(f"error: the cluster at 127.0.0.1:{port} asks for a token and ours is missing")
        assert len(refused.stderr.splitlines()) == 1
        joined = run(folder, address, HOME=str(home))
        assert joined.returncode == 0, joined.stderr[-2000:]
        assert f"in the Ray cluster at 127.0.0.1:{port}" in joined.stdout and "step 1/1" in joined.stdout
        # Beside it, with a RAY_ADDRESS that is none and a home folder that does not exist.
        beside = run(folder, HOME="/proc/nohome", RAY_ADDRESS="http://127.0.0.1:8265")
        assert beside.returncode == 0 and "step 1/1" in beside.stdout, beside.stderr[-2000:]
        assert "in a Ray cluster of its own; RAY_ADDRESS=http://127.0.0.1:8265 is left alone" in beside.stdout
    finally:
        head.send_signal(signal.SIGTERM)  # this head and what it started, nothing else on the machine
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
