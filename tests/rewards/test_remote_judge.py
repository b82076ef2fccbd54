"""A judge over HTTP: a server on the loopback that is busy, broken, slow or talks nonsense, and what is made of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlhf_dist.batch import Batch, Column
from rlhf_dist.compose import compose
from rlhf_dist.config import RemoteJudgeConfig
from rlhf_dist.missing import is_missing
from rlhf_dist.parsers import Number
from rlhf_dist.prompt_template import Template
from rlhf_dist.reward_checks import check_rewards
from rlhf_dist.typed import ConfigError
from rlhf_dist.wire import Call, OpResult, WorkerContext
from workers.remote_judge import JudgeUnavailable, RemoteJudgeWorker

Answer = Callable[[str, int], web.Response]


class Server:
    """Answers a question by a function of its text and of how often it was asked."""

    def __init__(self) -> None:
        self.answer: Answer = lambda text, times: says("Score: 3")
        self.asked: list[dict[str, Any]] = []
        self.under_way = self.most_under_way = 0
        self.wait_s, self.loop, self.url = 0.0, asyncio.new_event_loop(), ""

    async def handle(self, request: web.Request) -> web.Response:
        given = await request.json()
        self.asked.append({**given, "key": request.headers.get("Authorization")})
        text = given["messages"][-1]["content"]
        times = sum(one["messages"] == given["messages"] for one in self.asked)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(self.wait_s)
        self.under_way -= 1
        return self.answer(text, times)

    async def start(self) -> None:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", self.handle)
        self.runner = web.AppRunner(application)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0, shutdown_timeout=0.1).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}/v1"


def says(text: str) -> web.Response:
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}]})


def busy(seconds: str) -> web.Response:
    return web.Response(status=429, headers={"Retry-After": seconds}, text="slow down")


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    thread = threading.Thread(target=one.loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(one.start(), one.loop).result(60)
    yield one
    asyncio.run_coroutine_threadsafe(one.runner.cleanup(), one.loop).result(60)
    one.loop.call_soon_threadsafe(one.loop.stop)
    thread.join(60)
    one.loop.close()


def worker(server: Server, folder: Path, **settings: Any) -> RemoteJudgeWorker:
    context = WorkerContext(role="remote", rank=0, world=1, device="cpu", seed=0, folder=str(folder))
    small: dict[str, Any] = {"backoff_s": 0.01, "timeout_s": 30.0, "served_model": "m", "url": server.url}
    return RemoteJudgeWorker(context, RemoteJudgeConfig(**{**small, **settings}))


def ask(judge: RemoteJudgeWorker, texts: list[str], **settings: Any) -> OpResult:
    import numpy as np

    batch = Batch({"response": Column.strings(texts)})
    call = Call(num_rows=len(texts), row_index=np.arange(len(texts)), step=0, node="remote.ask", line="", seed=0)
    return judge.ask(batch, call, template=Template("grade {response}"), **{"parser": Number("Score:"), **settings})


def counted(result: OpResult) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def test_rows_are_asked_about_and_what_was_heard_is_kept(server: Server, tmp_path: Path) -> None:
    server.answer = lambda text, times: says("no idea" if "b" in text else f"Score: {len(text)}")
    found = ask(worker(server, tmp_path), ["a", "b", "a"], n=2)
    scores = found.columns["score"].values
    assert scores[[0, 1, 4, 5]].tolist() == [7] * 4 and is_missing(scores[[2, 3]]).all()
    assert found.columns["parsed"].values.tolist() == [1, 1, 0, 0, 1, 1] and found.parent.tolist() == [0, 0, 1, 1, 2, 2]  # type: ignore[union-attr]
    assert counted(found) | {"unparsed": 0} == {
        "asked": 4, "kept_answers": 0, "asked_again": 0, "unanswered": 0, "unparsed": 0
    }  # fmt: skip
    assert {one["max_tokens"] for one in server.asked} == {512}
    again = ask(worker(server, tmp_path), ["a", "b", "c"], n=2)  # a run that goes on has another process
    assert counted(again)["asked"] == 2 and counted(again)["kept_answers"] == 4 and len(server.asked) == 6
    assert again.columns["response"].rows()[:4] == found.columns["response"].rows()[:4]


def test_a_file_that_was_cut_loses_its_last_line_alone(server: Server, tmp_path: Path) -> None:
    ask(worker(server, tmp_path), ["a", "b"])
    file = tmp_path / "verdicts" / "remote" / "rank_0.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    ask(worker(server, tmp_path), ["a", "b"])
    assert counted(ask(worker(server, tmp_path), ["a", "b"]))["kept_answers"] == 2 and len(server.asked) == 3


def test_what_passes_is_tried_again_and_a_wish_to_wait_is_kept(server: Server, tmp_path: Path) -> None:
    nothing, page = web.json_response({"choices": []}), web.Response(text="<html>")
    broken = {1: web.Response(status=503), 2: busy("0.3"), 3: nothing, 4: page}
    server.answer = lambda text, times: broken.get(times) or says("Score: 1")
    times: list[float] = []
    handle = server.handle

    async def timed(request: web.Request) -> web.Response:
        times.append(server.loop.time())
        return await handle(request)

    server.handle = timed  # type: ignore[method-assign]
    found = ask(worker(server, tmp_path), ["a"])
    assert found.columns["score"].values.tolist() == [1] and counted(found)["asked_again"] == 4


def test_a_busy_endpoint_is_left_alone_by_all(server: Server, tmp_path: Path) -> None:
    at: list[float] = []

    def once(text: str, times: int) -> web.Response:
        at.append(server.loop.time())
        return busy("0.5") if len(at) == 1 else says("Score: 1")

    server.answer = once
    ask(worker(server, tmp_path, concurrency=1), ["a", "b", "c"])
    assert len(at) == 4 and at[1] - at[0] > 0.45, "the others waited, too"


def test_what_never_answers_is_missing_and_counted(server: Server, tmp_path: Path) -> None:
    server.answer = lambda text, times: web.Response(status=500) if "b" in text else says("Score: 2")
    found = ask(worker(server, tmp_path, tries=2, most_failed=0.5), ["a", "b"])
    assert counted(found)["unanswered"] == 1 and is_missing(found.columns["score"].values).tolist() == [False, True]
    with pytest.raises(JudgeUnavailable, match=r"1 of 2 questions .* at most a share of 0.1 may \(remote.most"):
        ask(worker(server, tmp_path, tries=2), ["a", "b"])
    server.answer = lambda text, times: web.Response(status=400, text="too long")
    with pytest.raises(JudgeUnavailable, match="the last: 400: too long"):
        ask(worker(server, tmp_path), ["d"])
    assert sum("grade d" in one["messages"][-1]["content"] for one in server.asked) == 1, "a 400 is not tried again"


class Silence:
    """A parser that has a verdict on nothing, too."""

    columns = {"score": "number"}  # noqa: RUF012

    def __call__(self, text: str) -> dict[str, float]:
        return {"score": float(len(text))}


def test_no_answer_is_no_verdict(server: Server, tmp_path: Path) -> None:
    server.answer = lambda text, times: web.Response(status=400) if "b" in text else says("")
    found = ask(worker(server, tmp_path, most_failed=0.5), ["a", "b"], parser=Silence())
    assert found.columns["parsed"].values.tolist() == [1, 0] and found.columns["score"].values[0] == 0
    assert is_missing(found.columns["score"].values).tolist() == [False, True]


def test_a_judge_that_is_down_is_noticed_at_once(server: Server, tmp_path: Path) -> None:
    server.answer = lambda text, times: web.Response(status=503)
    judge = worker(server, tmp_path, tries=1, concurrency=1, backoff_s=60.0, backoff_most_s=60.0)
    with pytest.raises(JudgeUnavailable, match="3 of 20 questions"):
        ask(judge, [f"<{number}>" for number in range(20)])
    assert len(server.asked) <= 4, "the rest is not asked, and nobody waits after a last try"


def test_time_and_keys(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.wait_s = 0.2
    ask(worker(server, tmp_path, concurrency=2), list("abcde"))
    assert server.most_under_way == 2
    server.wait_s = 2.0
    with pytest.raises(JudgeUnavailable, match="TimeoutError"):
        ask(worker(server, tmp_path, timeout_s=0.1, tries=2), ["x"])
    with pytest.raises(JudgeUnavailable, match=r"no answer within 0.2 s \(remote.deadline_s\)"):
        ask(worker(server, tmp_path, deadline_s=0.2), ["x"])
    server.wait_s = 0.0
    monkeypatch.setenv("JUDGE_KEY", "secret")
    ask(worker(server, tmp_path, key_variable="JUDGE_KEY"), ["y"])
    assert server.asked[-1]["key"] == "Bearer secret"
    server.answer = lambda text, times: web.Response(status=401, text="who are you")
    with pytest.raises(JudgeUnavailable, match="answered 401: who are you; look at remote's settings"):
        ask(worker(server, tmp_path), ["z"])
    with pytest.raises(ValueError, match="remote.key_variable names NO_KEY, which is not set here"):
        worker(server, tmp_path, key_variable="NO_KEY")
    with pytest.raises(ValueError, match="remote asks an endpoint and needs remote.url="):
        worker(server, tmp_path, url="")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((), "remote.url must be the address of an endpoint, .* got ''; set remote.url=http://HOST:PORT/v1"),
        (("remote.url=http://h/v1",), "remote.served_model must be the model's name .* got ''"),
        (
            ("remote.url=http://h/v1", "remote.served_model=m", "remote.key_variable=NOT_SET_4711"),
            "remote.key_variable must name a variable that is set here, got 'NOT_SET_4711'; export NOT_SET_4711",
        ),
    ],
)
def test_an_endpoint_is_checked_before_the_run_where_it_is_asked(settings: tuple[str, ...], said: str) -> None:
    given = ("model.path=m", "judge.model.path=m", *settings)
    check_rewards(compose("judge_grpo", given))
    with pytest.raises(ConfigError, match=f"^{said}"):
        check_rewards(compose("judge_grpo", [*given, "algorithm.remote=true"]))


def test_judge_grpo_asks_an_endpoint(server: Server) -> None:
    from rlhf_dist.testing import check_recipe

    server.answer = lambda text, times: says(f"Score: {sum(map(ord, text)) % 10}")
    settings = {"algorithm.remote": True, "algorithm.samples_per_prompt": 2, "remote.url": server.url}
    steps = check_recipe("judge_grpo", both_ways=False, steps=1, **settings, **{"remote.served_model": "m"})
    assert steps[-1]["remote/asked"] == 8 and steps[-1]["actor/grad_norm"] > 0
