"""The executor against its bounds, the data plane against collecting at the driver, the controller at 1,024 ranks.

    make bench-executor          prints one JSON line last; about four minutes on 2 cores

step_s             PPO on real Ray worker groups whose work is sleep: wall seconds per step
critical_path_s    the least that any schedule of the same work needs (controller/execution/critical_path.py)
data_plane         2,048 rows through values, reference, reward and update on 8 CPU workers: ours by reference; the
                   others collect each result at the driver, concatenate, split and send, as torch tensors:
                   collect_padded [B, T], collect_ragged one tensor a row, collect_flat one tensor a column (all
                   rows one after the other with their lengths: the most that this way can be tuned)
simulated_1024_overhead_s    the controller's time for a PPO step of 8,192 rows over 1,024 simulated ranks
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import ray
import torch

from benchmarks.executor_roles import ChainProcess
from controller.cluster.pool import Pool
from controller.cluster.start import Cluster, worker_actor
from controller.execution.critical_path import lower_bound_s
from controller.execution.executor import StepReport, run_steps
from controller.execution.ray_runner import RayRunner
from controller.execution.simulated_workers import SimulatedWorkers
from controller.execution.worker_group import WorkerGroup
from controller.record.traffic import ControllerTraffic
from recipes.policy_gradient.ppo import ppo
from rlhf_dist.batch import Batch
from rlhf_dist.config import PoolConfig, RayConfig
from rlhf_dist.dataflow.graph import Dataflow, Node
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.placement.roles import HOST_POOL, rollout_of
from rlhf_dist.roles import Actor, Critic, Reference, Reward, op
from rlhf_dist.schema import SEQUENCE, TRAINABLE

# --- placements --------------------------------------------------------------------------------------------
SECONDS = {
    "generate_sequences": 2.4,
    "compute_log_prob": 0.6,
    "compute_values": 0.6,
    "compute_ref_log_prob": 0.6,
    "compute_reward": 0.6,
    "update_critic": 1.5,
    "update_actor": 1.5,
    "reshard": 0.3,
}
"""Op -> seconds. Host ops (gae, whiten) and the source really run; the bound counts them as nothing."""
ROLES = ("actor", "critic", "reference", "reward")
PLACEMENTS: dict[str, dict[str, str]] = {
    "colocate": dict.fromkeys(ROLES, "a"),
    "split": {"actor": "a", "reference": "a", "critic": "b", "reward": "b"},
    "standalone": {**dict(zip(ROLES, "abcd", strict=True)), rollout_of("actor"): "e"},
    "standalone_stale1": {**dict(zip(ROLES, "abcd", strict=True)), rollout_of("actor"): "e"},
}
STEPS = 6
RANKS = 2
"""Ranks of a pool."""


def measure_placements() -> tuple[dict[str, float], dict[str, float]]:
    """Placement -> wall seconds per step, and the bound of the same."""
    measured, bounds = {}, {}
    with Cluster(RayConfig(object_store_bytes=256 << 20), slots=5 * RANKS, host_processes=2) as cluster:
        host = cluster.add_host_pool()
        pools = {name: cluster.add_pool(name, PoolConfig(device="cpu", slots=RANKS)) for name in "abcde"}
        for name, placed in PLACEMENTS.items():
            dataflow = replace(trace(ppo), staleness=int(name.endswith("stale1")))
            runner = _sleeping(dataflow, {role: pools[pool] for role, pool in placed.items()}, host)
            reports: list[StepReport] = []
            run_steps(dataflow, runner, start=0, stop=1, on_step=lambda report: None)  # imports, first calls
            run_steps(dataflow, runner, start=1, stop=1 + STEPS, on_step=reports.append)
            wall = max(report.ended_s for report in reports) - min(report.started_s for report in reports)
            bound = lower_bound_s(dataflow, pools_of=runner.pools_of, seconds=_seconds, steps=STEPS)
            measured[name], bounds[name] = wall / STEPS, bound / STEPS
    return measured, bounds


def _seconds(node: Node, step: int) -> float:
    return SECONDS.get(node.op, 0.0)


def _sleeping(dataflow: Dataflow, placed: Mapping[str, Pool], host: Pool) -> RayRunner:
    pools = {**placed, "prompts": Pool(HOST_POOL, host.processes[:1])}
    seconds = {**SECONDS, "send_weights": SECONDS["reshard"], "receive_weights": SECONDS["reshard"]}
    for role, pool in pools.items():
        _host(pool, role, "benchmarks.executor_roles:SleepingRole", {"seconds": seconds, "rows": 16})
    groups = {role: WorkerGroup(role, pool) for role, pool in pools.items()}
    return RayRunner(dataflow, groups, host, seed=0, call_timeout_s=60.0)


def _host(pool: Pool, role: str, path: str, settings: Mapping[str, Any]) -> None:
    context = {"seed": 0}
    hosting = [process.host_role.remote(role, path, settings, context) for process in pool.processes]
    told = ray.get(hosting, timeout=120)  # what a user should know about each role; else why it did not start
    failed = [answer for answer in told if not isinstance(answer, tuple)]
    assert not failed, failed


# --- the data plane ----------------------------------------------------------------------------------------
ROWS, WORKERS, PROMPT_TOKENS, RESPONSE_TOKENS, MEAN_TOKENS = 2048, 8, 1024, 3072, 800
CHAIN = ("compute_values", "compute_ref_log_prob", "compute_reward", "update_actor")
READS = {
    "compute_values": ("prompt_ids", "response_ids"),
    "compute_ref_log_prob": ("prompt_ids", "response_ids"),
    "compute_reward": ("prompt_ids", "response_ids"),
    "update_actor": (*TRAINABLE, "rollout_log_probs", "values", "ref_log_probs", "rewards"),
}
REPEATS = 5


class Rollouts(Batch):
    """What generation left on the workers."""

    rows_kind: ClassVar[str] = "prompts"
    columns: ClassVar[tuple[str, ...]] = (*TRAINABLE, "rollout_log_probs")


class TokensReward(Reward, Protocol):
    """A reward that reads tokens only."""

    @op(reads=SEQUENCE, writes=("rewards",))
    def compute_reward(self, batch: Batch) -> Batch:
        """The terminal reward of every row."""
        ...


@dataclass(frozen=True)
class ReadsAll:
    """A loss as the chain needs it: what it reads."""

    reads = ("rollout_log_probs", "values", "ref_log_probs", "rewards")
    outputs: tuple[str, ...] = ()
    average = "tokens"

    def __call__(self, model: Any, rows: Any) -> Any:
        """Nobody computes it here."""
        raise NotImplementedError


@recipe
def chain(rollouts: Rollouts, critic: Critic, reference: Reference, reward: TokensReward, actor: Actor) -> None:
    """Values, reference log-probs, reward, update."""
    batch = reference.compute_ref_log_prob(critic.compute_values(rollouts))
    actor.update_actor(reward.compute_reward(batch), loss=ReadsAll())


def measure_data_plane() -> dict[str, dict[str, float]]:
    """Way -> CPU seconds of the controller, bytes through it, and wall seconds, medians of a step."""
    with Cluster(RayConfig(object_store_bytes=2 << 30), slots=WORKERS, host_processes=1):
        remote = worker_actor(ChainProcess)
        one = remote.options(num_cpus=1)
        processes = [one.remote("cpu", rank, WORKERS, None) for rank in range(WORKERS)]
        ray.get(processes[0].meet.remote(dict(enumerate(processes))), timeout=60)
        pool = Pool("cpu", tuple(processes), leads=(tuple(range(WORKERS)),))
        settings = {"rows": ROWS, "prompt_tokens": PROMPT_TOKENS, "lengths": response_lengths()}
        roles = ("rollouts", "critic", "reference", "reward", "actor")
        for role in roles:
            _host(pool, role, "benchmarks.executor_roles:ChainRole", settings)
        dataflow = trace(chain)
        groups = {role: WorkerGroup(role, pool) for role in roles}
        runner = RayRunner(dataflow, groups, Pool(HOST_POOL, pool.processes[:1]), seed=0, call_timeout_s=120.0)
        steps = iter(range(1000))

        def ours() -> None:
            step = next(steps)
            run_steps(dataflow, runner, start=step, stop=step + 1, on_step=lambda report: None)

        ways: dict[str, Callable[[], None]] = {
            "ours": ours,
            "collect_padded": lambda: _collect(processes, padded=True),
            "collect_ragged": lambda: _collect_rows(processes),
            "collect_flat": lambda: _collect(processes, padded=False),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for repeat in range(REPEATS + 1):
            for name, way in ways.items():  # interleaved, so that a busy machine is busy for all
                measured = _measured(way)
                if repeat:  # the first imports torch in the workers and opens connections
                    found[name].append(measured)
    return {name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in found.items()}


def response_lengths() -> np.ndarray[Any, Any]:
    """[B] lognormal with mean 800 (sigma 0.8), cut at 3,072 tokens."""
    sigma = 0.8
    drawn = np.random.default_rng(0).lognormal(np.log(MEAN_TOKENS) - sigma**2 / 2, sigma, ROWS)
    return np.clip(drawn, 1, RESPONSE_TOKENS).astype(np.int64)


def _measured(way: Callable[[], None]) -> dict[str, float]:
    with ControllerTraffic() as traffic:
        cpu, wall = time.process_time(), time.perf_counter()
        way()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"controller_cpu_s": cpu, "controller_bytes": traffic.sent + traffic.received, "wall_s": wall}


def _collect(processes: list[Any], *, padded: bool) -> None:
    """The plain way: every result comes to the driver, is concatenated, split evenly and sent on."""
    if padded:
        parts = [p.run_padded_source.remote(PROMPT_TOKENS, RESPONSE_TOKENS) for p in processes]
    else:
        parts = [process.run_tensors.remote("next_batch", None) for process in processes]
    batch = _concatenated(ray.get(parts, timeout=300))
    for name in CHAIN:
        reads = READS[name] if padded else (*READS[name], "prompt_lengths", "lengths")
        shards = _split({column: batch[column] for column in reads}, padded)
        written = ray.get([p.run_tensors.remote(name, s) for p, s in zip(processes, shards, strict=True)], timeout=300)
        batch |= _concatenated(written)


def _collect_rows(processes: list[Any]) -> None:
    """The same with a tensor for each row: nothing is padded, concatenating and splitting is joining and slicing."""
    parts = ray.get([process.run_rows.remote("next_batch", None) for process in processes], timeout=300)
    batch = {name: [row for part in parts for row in part[name]] for name in parts[0]}
    each = ROWS // WORKERS
    for name in CHAIN:
        shards = [{c: batch[c][k * each : (k + 1) * each] for c in READS[name]} for k in range(WORKERS)]
        written = ray.get([p.run_rows.remote(name, s) for p, s in zip(processes, shards, strict=True)], timeout=300)
        batch |= {name: [row for part in written for row in part[name]] for name in written[0]}


def _concatenated(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _split(batch: dict[str, torch.Tensor], padded: bool) -> list[dict[str, torch.Tensor]]:
    if padded:
        cut = {name: tensor.chunk(WORKERS) for name, tensor in batch.items()}
    else:
        # Flat values are cut where the rows of a worker end.
        prompts = [int(lengths.sum()) for lengths in batch["prompt_lengths"].chunk(WORKERS)]
        tokens = [int(lengths.sum()) for lengths in batch["lengths"].chunk(WORKERS)]
        cut = {}
        for name, tensor in batch.items():
            per_token = len(tensor) == sum(tokens)
            ends = prompts if name == "prompt_ids" else tokens if per_token else len(tensor) // WORKERS
            cut[name] = tensor.split(ends)
    # A view would bring its whole storage along.
    return [{name: pieces[rank].clone() for name, pieces in cut.items()} for rank in range(WORKERS)]


# --- a thousand ranks --------------------------------------------------------------------------------------
def measure_simulated(ranks: int = 1024) -> float:
    """Median seconds of the controller for a PPO step over `ranks` colocated ranks, 8 rows each."""
    workers = SimulatedWorkers(
        trace(ppo),
        prompts=8 * ranks,
        prompt_tokens=PROMPT_TOKENS,
        response_tokens=lambda rng, n: rng.integers(1, 1600, n),
    )
    runner = workers.runner({role: ("main", ranks) for role in ROLES})
    found = []
    for step in range(REPEATS + 1):
        started = time.perf_counter()
        run_steps(workers.dataflow, runner, start=step, stop=step + 1, on_step=lambda report: None)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def main() -> None:
    """Measure all and print the line."""
    overhead = measure_simulated()
    data_plane = measure_data_plane()
    step_s, critical_path_s = measure_placements()
    line = {
        "step_s": step_s,
        "critical_path_s": critical_path_s,
        "data_plane": data_plane,
        "simulated_1024_overhead_s": overhead,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
