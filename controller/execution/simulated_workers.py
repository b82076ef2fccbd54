"""Worker groups without workers: thousands of ranks whose replies are made up, behind the runner of a real run.

    workers = SimulatedWorkers(trace(ppo), response_tokens=lambda rng, rows: rng.integers(1, 800, rows))
    runner = workers.runner({"actor": ("main", 1024), "critic": ("main", 1024), ...})
    run_steps(workers.dataflow, runner, ...)          # cut, called, collected: all but the work and the network

What it costs is what the controller costs. For how long things take on a clock, see `simulation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from controller.cluster.pool import Pool
from controller.cluster.replies import Answer, Replies
from controller.execution.ray_runner import RayRunner
from controller.execution.worker_group import WorkerGroup
from rlhf_dist.batch import IntArray
from rlhf_dist.dataflow.graph import Dataflow
from rlhf_dist.placement.roles import HOST_POOL
from rlhf_dist.wire import Call, Reply

Lengths = Callable[[np.random.Generator, int], IntArray]
"""(random stream, rows) -> [B] tokens."""


class SimulatedWorkers:
    """Replies to every call of a dataflow's nodes at once, with the rows a real worker would have."""

    def __init__(self, dataflow: Dataflow, *, prompts: int, prompt_tokens: int, response_tokens: Lengths) -> None:
        """prompts: rows that a source emits, of `prompt_tokens` tokens each."""
        self.dataflow, self._nodes = dataflow, {node.name: node for node in dataflow}
        self._prompts, self._prompt_tokens, self._response_tokens = prompts, prompt_tokens, response_tokens
        self._random = np.random.default_rng(0)
        self._objects = 0

    def runner(
        self, placed: Mapping[str, tuple[str, int]], host_processes: int = 8, replies: Replies | None = None
    ) -> RayRunner:
        """A runner over simulated groups. placed: role -> (pool, ranks); roles not named run on the host pool.
        replies: in which order they come; None: all at once."""
        host = Pool(HOST_POOL, self._processes(host_processes))
        pools = {name: Pool(name, self._processes(ranks)) for name, ranks in set(placed.values())}
        groups = {role: WorkerGroup(role, pools[name]) for role, (name, _) in placed.items()}
        for node in self.dataflow:
            if node.kind == "source":
                groups[node.role] = WorkerGroup(node.role, Pool(HOST_POOL, host.processes[:1]))
            elif node.kind == "op" and node.role not in groups:
                groups[node.role] = WorkerGroup(node.role, host)
        return RayRunner(self.dataflow, groups, host, seed=0, call_timeout_s=60.0, replies=replies or AtOnce())

    def reply(self, call: Call) -> Reply:
        """What the rank that gets `call` would say."""
        node = self._nodes.get(call.node)
        if node is None or (not node.writes and node.rows == "keep"):
            return Reply(stored=(), num_rows=call.num_rows, nbytes=0, seconds=0.0, pull_seconds=0.0)
        rows, parent, tokens, groups = call.num_rows, None, None, None
        if node.kind == "source":
            rows, groups = self._prompts, np.arange(self._prompts) + call.step * self._prompts
            tokens = np.full(rows, self._prompt_tokens)
        elif node.rows == "expand":
            parent = np.repeat(np.arange(rows), int(call.kwargs.get("n", 1)))
            rows = len(parent)
            tokens = self._prompt_tokens + self._response_tokens(self._random, rows)
        elif node.rows == "drop":
            parent = np.arange(rows)
        stored = []
        for name in node.writes:
            self._objects += 1
            stored.append(((name,), self._objects))
        return Reply(
            stored=tuple(stored),
            num_rows=rows,
            nbytes=0,
            seconds=0.0,
            pull_seconds=0.0,
            parent=parent,
            tokens=tokens,
            groups=groups,
        )

    def _processes(self, count: int) -> tuple[Any, ...]:
        return (_Process(self),) * count


@dataclass(frozen=True)
class _Method:
    reply: Callable[[Call], Reply]

    def remote(self, *arguments: Any) -> _Answer:
        """As a Ray method: starts the call and returns a reference to its reply."""
        return _Answer(self.reply(arguments[-1]))


class _Process:
    """What the runner calls of `workers.process.WorkerProcess`."""

    def __init__(self, workers: SimulatedWorkers) -> None:
        self.call = self.run_host_op = _Method(workers.reply)


@dataclass(frozen=True, eq=False)
class _Answer:
    reply: Reply


class AtOnce:
    """Replies that are there as soon as they are asked for."""

    def ready(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        """See Replies."""
        return list(refs)

    def get(self, refs: Sequence[Any], timeout_s: float) -> list[Answer]:
        """See Replies."""
        return [ref.reply for ref in refs]
