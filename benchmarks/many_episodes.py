"""What 10,000 episodes at one time cost the process that plays them, beside an engine that costs nothing.

The engine is simulated: a response of n tokens is there n * TOKEN_S after it was asked for, whatever else is in flight.
All else is real: conversations, seeds, limits, tools, the two threads and the queue between them, rows in the end.
Each number of episodes is a process of its own, so that memory is its own, too.
"""

from __future__ import annotations

import heapq
import itertools
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rlhf_dist.batch import Batch
from rlhf_dist.environments import Environment, EpisodeLimits
from rlhf_dist.sampling import Sampling
from rlhf_dist.testing.tiny_model import save_tokenizer
from rlhf_dist.wire import Call
from workers.engines.generation.interface import NOTHING_DRAWN, Request, Response
from workers.episodes.rows import episode_columns, episode_metrics
from workers.episodes.run import run_episodes

TOKEN_S = 0.02
"""Of the simulated engine."""
WAIT_S = 0.005
"""Longest that its step waits for something to be done."""
Rows = Callable[[int], tuple[Batch, Call]]


class SimulatedEngine:
    """The part of `GenerationEngine` that episodes use; sees how much is in flight, and what memory the process has."""

    weights_version = 0

    def __init__(self) -> None:
        self._due: list[tuple[float, int, str, int]] = []
        self._in_flight: set[str] = set()
        self._numbers, self._process = itertools.count(), psutil.Process()
        self._looked_s = 0.0
        self.turns = self.most = self.peak_bytes = 0
        self.cpu_s = 0.0
        """Of its own calls."""

    def add(self, request: Request) -> None:
        """See GenerationEngine."""
        began = time.thread_time()
        tokens = request.sampling.max_tokens
        heapq.heappush(self._due, (time.monotonic() + tokens * TOKEN_S, next(self._numbers), request.name, tokens))
        self._in_flight.add(request.name)
        self.turns, self.most = self.turns + 1, max(self.most, len(self._in_flight))
        self.cpu_s += time.thread_time() - began

    def step(self) -> list[tuple[str, Response]]:
        """See GenerationEngine."""
        began = time.thread_time()
        now, done = time.monotonic(), []
        if now - self._looked_s > 0.25:
            self._looked_s, self.peak_bytes = now, max(self.peak_bytes, self._process.memory_info().rss)
        if self._due and self._due[0][0] > now:
            time.sleep(min(WAIT_S, self._due[0][0] - now))
        while self._due and self._due[0][0] <= time.monotonic():
            _, _, name, tokens = heapq.heappop(self._due)
            if name in self._in_flight:
                self._in_flight.remove(name)
                done.append((name, _drawn(tokens)))
        self.cpu_s += time.thread_time() - began
        return done

    def abort(self, name: str) -> Response:
        """See GenerationEngine."""
        self._in_flight.discard(name)
        return NOTHING_DRAWN


def many_episodes(counts: Sequence[int], environment: Environment, rows: Rows, tokens: int) -> list[dict[str, Any]]:
    """For each number of episodes, all under way at one time, what a turn and an episode cost. tokens: of a row."""
    found = []
    for count in counts:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found.append(pool.apply(_measured, (count, environment, rows, tokens)))
    return found


def _measured(count: int, environment: Environment, rows: Rows, tokens: int) -> dict[str, Any]:
    batch, call = rows(count)
    engine: Any = SimulatedEngine()
    limits = EpisodeLimits(seconds=3600.0, concurrent=count)
    with tempfile.TemporaryDirectory() as scratch:
        save_tokenizer(Path(scratch))
        before_bytes = psutil.Process().memory_info().rss
        began_s, began_cpu_s, began_own_s = time.perf_counter(), time.process_time(), time.thread_time()
        episodes = run_episodes(
            engine, scratch, batch, call, environment, limits, Sampling(max_tokens=tokens), tokens + 8
        )
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s - engine.cpu_s
    engine_thread_s = time.thread_time() - began_own_s - engine.cpu_s
    began_cpu_s = time.process_time()
    episode_columns([episode for episode in episodes if episode.trains], rewards=True)
    rows_s = time.process_time() - began_cpu_s
    metrics = {name: metric.value for name, metric in episode_metrics(episodes).items()}
    return {
        "episodes": count,
        "turns": engine.turns,
        "most_in_flight": engine.most,
        "seconds": round(seconds, 2),
        "cpu_ms_per_turn": round(1e3 * cpu_s / engine.turns, 3),
        "of_that_engine_thread_ms": round(1e3 * engine_thread_s / engine.turns, 3),
        "rows_cpu_ms_per_episode": round(1e3 * rows_s / count, 3),
        "memory_kb_per_episode": round((engine.peak_bytes - before_bytes) / count / 1e3, 1),
        "lost": int(metrics["lost"]),
        "outcomes": dict(Counter(episode.outcome for episode in episodes)),
    }


def _drawn(tokens: int) -> Response:
    ids = np.full(tokens, 4, np.int32)
    return Response(ids, np.zeros(tokens, np.float32), np.zeros(tokens, np.int32), finished=False)
