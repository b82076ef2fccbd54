"""A judge behind an OpenAI-compatible endpoint: asked over HTTP, within bounds; a rank never asks twice about the same.

    row ── template ──> messages ── known? ──> the kept answer
                                     │ no
                                     v
        at most `concurrency` requests ──> 200 ──> kept on disk, then parsed
               ^    │
               │    ├─ 408, 409, 425, 429, 5xx, no connection, no answer in time: again, after Retry-After or back-off
               └────┘
                    └─ tries or deadline used up: the row has no verdict, which is counted; the run ends as soon as
                       more than `most_failed` of all rows have none
        401, 403, 404: the run ends, whatever is asked next would be answered so, too

An answer is kept under a hash of all that it depends on (address, model, messages, sampling, which vote), one line of
JSON each in the run's folder, so that a run that goes on asks only what it has not heard. Two ranks with the same
question in one run ask it twice: files are read when a process starts.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import RemoteJudgeConfig
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.parsers import Parser, parsed_columns
from rlhf_dist.prompt_template import Template
from rlhf_dist.wire import Call, OpResult, WorkerContext

AGAIN = frozenset((408, 409, 425, 429))
"""Statuses below 500 after which a request is sent again."""
NEVER = frozenset((401, 403, 404))
"""Statuses that say nothing of the request, but of the settings."""


class JudgeUnavailable(RuntimeError):
    """The endpoint does not answer as it should, for more rows than may be without a verdict."""


@dataclass
class Counts:
    """What one call of the op came to."""

    asked: int = 0
    kept: int = 0
    again: int = 0
    failed: int = 0
    """Answers that there will not be; a question that several rows have counts for each."""
    why: str = ""
    """Of the last failure."""


class Verdicts:
    """Answers that were heard before, by the hash of their question: one file a rank, all of them read."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file, self._known = folder / f"rank_{rank}.jsonl", dict[str, str]()
        for file in sorted(folder.glob("rank_*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["text"]
                except (ValueError, KeyError, TypeError):  # the last line of a process that was ended
                    continue

    def get(self, key: str) -> str | None:
        """The answer; None for a question that was not asked."""
        return self._known.get(key)

    def put(self, key: str, text: str) -> None:
        """Keep an answer, on disk before it is used."""
        self._known[key] = text
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # Begins with a line end: what a process left half written does not swallow it.
        with self._file.open("a", encoding="utf-8") as out:
            out.write("\n" + json.dumps({"key": key, "text": text}))


class RemoteJudgeWorker:
    """One CPU process that asks about its share of the rows. Implements `rlhf_dist.roles.RemoteJudge`."""

    def __init__(self, context: WorkerContext, config: RemoteJudgeConfig) -> None:
        if not config.url or not config.served_model:
            raise ValueError(
                f"{context.role} asks an endpoint and needs {context.role}.url=http://HOST:PORT/v1 and "
                f"{context.role}.served_model=NAME"
            )
        if config.key_variable and config.key_variable not in os.environ:
            raise ValueError(f"{context.role}.key_variable names {config.key_variable}, which is not set here")
        self._role, self._config = context.role, config
        self._verdicts = Verdicts(Path(context.folder) / "verdicts" / context.role, context.rank)
        self._not_before = 0.0
        """Monotonic seconds before which nothing is sent: what the endpoint has asked for."""

    def ask(
        self,
        batch: Batch,
        call: Call,
        *,
        template: Template,
        parser: Parser | None = None,
        n: int = 1,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        decode: Mapping[str, str] = MappingProxyType({}),
    ) -> OpResult:
        """`n` answers to each row. Raises JudgeUnavailable (see `most_failed`)."""
        if decode:
            raise ValueError(f"an endpoint is asked in words, and the template has token ids: {', '.join(decode)}")
        sampling = {"temperature": temperature, "top_p": top_p, "stop": list(stop) or None}
        sampling["max_tokens"] = max_tokens or self._config.max_tokens
        asked = {name: value for name, value in sampling.items() if value is not None}
        columns = {name: batch[name].rows() for name in template.columns}
        messages = [
            self._messages(template, {name: values[row] for name, values in columns.items()})
            for row in range(batch.num_rows)
        ]
        counts = Counts()
        texts = asyncio.run(self._all(messages, n, asked, counts)) if messages else []
        parent = np.repeat(np.arange(batch.num_rows), n)
        found = {
            "prompt": Column.strings([one[-1]["content"] for one in messages]).take(parent),
            "response": Column.strings([text or "" for text in texts]),
        }
        metrics: Metrics = {
            "asked": Mean(float(counts.asked), 0),
            "kept_answers": Mean(float(counts.kept), 0),
            "asked_again": Mean(float(counts.again), 0),
            "unanswered": Mean(float(counts.failed), 0),
        }
        if parser is not None:
            parsed, unparsed = parsed_columns(parser, texts)
            found |= parsed
            metrics["unparsed"] = Mean(float(unparsed), float(len(texts)))
        return OpResult(columns=Batch(found, len(texts)), parent=parent, metrics=metrics)

    def close(self) -> None:
        """Nothing is held between calls."""

    def _messages(self, template: Template, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        messages, answer = template.messages(row)
        if answer:
            raise ValueError("an endpoint begins its answer itself; leave Template(answer=...) out")
        return messages

    async def _all(
        self, messages: Sequence[list[dict[str, Any]]], n: int, sampling: Mapping[str, Any], counts: Counts
    ) -> list[str | None]:
        import aiohttp

        key = os.environ.get(self._config.key_variable, "") if self._config.key_variable else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_s)
        room = asyncio.Semaphore(self._config.concurrency)
        requests = [{"model": self._config.served_model, "messages": one, **sampling} for one in messages]
        keys = [self._key(request, vote) for request in requests for vote in range(n)]
        questions = dict(zip(keys, (request for request in requests for _ in range(n)), strict=True))
        times = Counter(keys)
        try:
            async with (
                aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
                asyncio.TaskGroup() as group,
            ):
                tasks = {
                    key: group.create_task(self._one(session, room, key, request, counts, (times[key], len(keys))))
                    for key, request in questions.items()
                }
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [tasks[key].result() for key in keys]

    def _key(self, request: Mapping[str, Any], vote: int) -> str:
        content = json.dumps([self._config.url, request, vote], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    async def _one(
        self,
        session: Any,
        room: asyncio.Semaphore,
        key: str,
        request: Mapping[str, Any],
        counts: Counts,
        share: tuple[int, int],
    ) -> str | None:
        """The answer to a question that so many of all rows have (`share`). Raises JudgeUnavailable once too many of
        them have none: no more is asked of an endpoint that is down."""
        known = self._verdicts.get(key)
        if known is not None:
            counts.kept += 1
            return known
        async with room:
            try:
                async with asyncio.timeout(self._config.deadline_s):
                    text = await self._answered(session, request, counts)
            except TimeoutError:
                text, counts.why = None, f"no answer within {self._config.deadline_s:g} s ({self._role}.deadline_s)"
        if text is not None:
            self._verdicts.put(key, text)
            return text
        rows, of = share
        counts.failed += rows
        if counts.failed > self._config.most_failed * of:
            raise JudgeUnavailable(
                f"{counts.failed} of {of} questions to {self._config.url} have no answer, at most a share of "
                f"{self._config.most_failed:g} may ({self._role}.most_failed); the last: {counts.why}"
            )
        return None

    async def _answered(self, session: Any, request: Mapping[str, Any], counts: Counts) -> str | None:
        """The answer; None once it was asked for as often as it may be, or cannot be answered."""
        import aiohttp

        address = f"{self._config.url.rstrip('/')}/chat/completions"
        for attempt in range(self._config.tries):
            if attempt:
                counts.again += 1
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            counts.asked += 1
            wait: float | None = None
            try:
                async with session.post(address, json=request) as answer:
                    body = await answer.text()
                    if answer.status == 200:
                        return _content(body)
                    counts.why = f"{answer.status}: {body[:300]}"
                    if answer.status in NEVER:
                        raise JudgeUnavailable(f"{address} answered {counts.why}; look at {self._role}'s settings")
                    if answer.status not in AGAIN and answer.status < 500:
                        return None
                    wait = _retry_after(answer.headers.get("Retry-After"))
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                counts.why = f"{type(error).__name__}: {error}"
            if wait is not None:  # the endpoint's own wish, for all that is sent to it
                self._not_before = max(self._not_before, time.monotonic() + wait)
            elif attempt + 1 < self._config.tries:
                most = min(self._config.backoff_most_s, self._config.backoff_s * 2**attempt)
                await asyncio.sleep(random.uniform(most / 2, most))
        return None


def _content(body: str) -> str:
    """What the judge said. Raises ValueError for a body that is no completion."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"the endpoint answered what is no completion: {body[:200]!r}") from error
    if not isinstance(content, str):
        raise ValueError(f"the endpoint answered without a text: {body[:200]!r}")
    return content


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, of a number or a date; None without either."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
