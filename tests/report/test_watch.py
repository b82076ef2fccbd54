"""`rlhf-dist watch`: who gets an answer, what an answer is, and that it ends with Ctrl-C."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.report.server import Server, Watched, make_server
from tests.report.conftest import until
from tests.report.made_run import make_run, rollouts


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with make_server(Watched(make_run(tmp_path / "ppo", steps=12))) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join(10)


def ask(server: Server, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, dict(answer.getheaders())


def shown(server: Server) -> dict[str, Any]:
    status, body, _ = ask(server, f"/{server.token}/data")
    assert status == 200
    run: dict[str, Any] = json.loads(gzip.decompress(body))["runs"][0]
    return run


def test_only_who_knows_the_token_gets_an_answer(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    for path in ("/", "/data", "/nope/data", f"/{server.token[:-1]}/data"):
        assert ask(server, path)[0] == 404
    assert ask(server, f"/{server.token}/", Host=f"attacker.example:{server.server_port}")[0] == 404, "DNS rebinding"
    status, body, headers = ask(server, f"/{server.token}/")
    assert status == 200 and b'data-mode="live"' in body and headers["Referrer-Policy"] == "no-referrer"
    assert ask(server, f"/{server.token}/block/../../etc/passwd")[0] == 404


def test_news_come_when_there_are_some(server: Server) -> None:
    folder = server.watched._folder
    mark = ask(server, f"/{server.token}/data")[2]["ETag"]
    assert ask(server, f"/{server.token}/data", If_None_Match=mark)[:2] == (304, b"")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "reward/reward": 0.5}\n')
    rollouts(12, 6, ("late",)).write_parquet(folder / "rollouts/step_000012.parquet")
    assert ask(server, f"/{server.token}/data", If_None_Match=mark)[0] == 200
    run = shown(server)
    assert run["steps"][-1] == 12 and run["rollouts"][-1]["step"] == 12
    status, body, _ = ask(server, f"/{server.token}/block/{run['rollouts'][-1]['block']}")
    assert status == 200 and json.loads(gzip.decompress(body))["response"] == ["late"] * 6


def test_a_run_that_is_being_replaced_is_a_short_answer(server: Server) -> None:
    (server.watched._folder / "graph.json").write_text("{")
    status, body, _ = ask(server, f"/{server.token}/data")
    assert status == 503 and b"graph.json is not JSON" in body


def test_a_browser_that_goes_away_is_no_error(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as gone:
            host = f"Host: 127.0.0.1:{server.server_port}"
            gone.sendall(f"GET /{server.token}/ HTTP/1.0\r\n{host}\r\n\r\n".encode())
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # the end is a reset
    assert shown(server)["name"] == "ppo"
    for thread in [one for one in threading.enumerate() if "process_request_thread" in one.name]:
        thread.join(30)
    assert capfd.readouterr().err == ""


def test_the_live_page_draws_new_steps(server: Server, tab: Any) -> None:
    tab.goto(f"http://127.0.0.1:{server.server_port}/{server.token}/")
    tab.wait_for_selector("body[data-ready=yes]")
    tab.locator("[data-metric='reward/reward']").scroll_into_view_if_needed()
    points = "[...document.querySelector(\"[data-metric='reward/reward'] .plot\").data[0].y].length"
    until(tab, f"document.querySelector(\"[data-metric='reward/reward'] .plot\").data && {points} === 12")
    with (server.watched._folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "reward/reward": 0.5}\n')
    until(tab, f"{points} === 13")
    assert "13 of 12" in tab.locator("#overview").inner_text()
    assert all(url.startswith(f"http://127.0.0.1:{server.server_port}/{server.token}/") for url in tab.wrong), tab.wrong


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "ppo", steps=2)
    command = [sys.executable, "-m", "controller.commands.cli", "watch", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        said = running.stdout.readline()
        assert re.match(r"http://127\.0\.0\.1:\d+/[\w-]{32}/ ", said)
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0 and running.stderr.read() == ""
