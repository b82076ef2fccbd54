"""The folder of a run, written by what a run writes it with: metrics, rollouts, graph, trace; no model needed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from controller.execution.executor import Finished
from controller.record.graph_file import GraphFile
from controller.record.metrics import MetricsWriter
from rlhf_dist.batch import Batch, Column
from rlhf_dist.compose import compose_graphs

SPIKE = 20
"""Step at which actor/grad_norm is 100 times what it was before."""
CONFIG = """name: {name}
steps: {steps}
data:
  prompts_per_step: 4
placement:
  max_staleness: 0
output:
  root: runs
"""


def make_run(
    folder: Path, *, steps: int = 30, rows: int = 6, every: int = 5, responses: Sequence[str] = ("4", "5 apples"),
    noise: float = 1.0, learning_rate: float = 1e-5,
) -> Path:  # fmt: skip
    """A run of PPO that has ended; `responses` take turns. Returns the folder."""
    folder.mkdir(parents=True)
    dataflow, evaluations = compose_graphs("ppo")
    (folder / "config.yaml").write_text(
        CONFIG.format(name=folder.name, steps=steps) + f"actor:\n  optimizer:\n    lr: {learning_rate}\n"
    )
    random, events = np.random.default_rng(0), []
    graph = GraphFile(folder, dataflow, evaluations)
    with MetricsWriter(folder) as writer:
        for step in range(steps):
            metrics = {
                "reward/reward": step / steps + 0.02 * random.normal(),
                "gae/ref_kl": 0.001 * step,
                "gae/explained_variance": 0.4 + 0.01 * random.normal(),
                "actor/entropy": 3.0 * math.exp(-step / steps),
                "actor/clip_fraction": 0.1 + 0.01 * random.normal(),
                "actor/grad_norm": (100.0 if step == SPIKE else 1.0) + 0.01 * noise * random.normal(),
                "actor/response_tokens": 20.0 + random.normal(),
                "actor/version": float(step + 1),
            }
            finished = [
                Finished(node=node.name, step=step, started_s=step + at / 20, ended_s=step + at / 20 + 0.04, metrics={})
                for at, node in enumerate(dataflow)
            ]
            graph.saw([_telling(one.node, metrics, one) for one in finished])
            writer.write(step, metrics, {one.node: one.ended_s - one.started_s for one in finished})
            events += [_slice(one) for one in finished]
            if step % every == 0:
                rollouts(step, rows, responses).write_parquet(folder / f"rollouts/step_{step:06d}.parquet")
        writer.write_evaluation(steps, {"heldout/reward": 0.9})
    names = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "main"}}]
    (folder / "trace.json").write_text(json.dumps({"traceEvents": [*names, *events]}))
    return folder


def rollouts(step: int, rows: int, responses: Sequence[str], prompts: int = 3) -> Batch:
    """What a source's `dump` writes: `rows` responses to `prompts` prompts that are the same at every step."""
    said = [responses[(step + row) % len(responses)] for row in range(rows)]
    return Batch(
        {
            "prompt": Column.strings([f"what is {row % prompts} + 2?" for row in range(rows)]),
            "response": Column.strings(said),
            "answer": Column.strings([str(row % prompts + 2) for row in range(rows)]),
            "rewards": Column(np.linspace(0, 1, rows, dtype=np.float32)),
            "finished": Column(np.ones(rows, np.uint8)),
            "policy_version": Column.ragged([[step, step, step + 1]] * rows, dtype=np.int32),
            "group_id": Column(np.arange(rows) % prompts),
        }
    )


def _telling(node: str, metrics: dict[str, float], finished: Finished) -> Finished:
    """The node with those of the metrics that it tells in a run."""
    update = ("clip_fraction", "grad_norm", "version")
    own = {
        "actor.update_actor": [name for name in metrics if name.startswith("actor/") and name.endswith(update)],
        "actor.generate_sequences": ["actor/response_tokens"],
        "actor.compute_log_prob": ["actor/entropy"],
        "gae": [name for name in metrics if name.startswith("gae/")],
        "reward.compute_reward": ["reward/reward"],
    }.get(node, [])
    return Finished(
        node=node, step=finished.step, started_s=finished.started_s, ended_s=finished.ended_s,
        metrics={name: metrics[name] for name in own},
    )  # fmt: skip


def _slice(one: Finished) -> dict[str, object]:
    return {
        "name": one.node, "ph": "X", "ts": round(one.started_s * 1e6), "dur": 40_000, "pid": 0, "tid": 0, "cat": "main",
        "args": {"step": one.step, "tokens": 8, "bytes": 64},
    }  # fmt: skip
