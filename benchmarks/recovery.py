"""Throughput with one fault in every 50 steps at 1,024 ranks, on a simulated clock.

    make bench-recovery        one JSON line

throughput     steps a second, as a share of the run without faults and checkpoints; goal: at least 0.9
colocate       the paper's PPO with all roles on 1,024 ranks: every fault hits a pool that learns
separate       actor 512, critic 256, reference and reward 128, generation 128: by turns each pool dies
every_N        with a checkpoint every N steps

The executor is that of a run, and so are the rule of where a run goes back to and the budget. The seconds of nodes are
those of a step of five minutes; those of a recovery are stated below.
"""

from __future__ import annotations

import json
import random

from controller.recovery.budget import Budget
from controller.recovery.throughput import RecoveryCosts, as_json, every_nth_step, faulted_run
from recipes.policy_gradient.ppo import ppo
from rlhf_dist.config import RecoveryConfig
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.dataflow.trace import trace

STEPS, EVERY = 1000, 50
SECONDS = {
    "generate_sequences": 130.0,
    "compute_values": 15.0,
    "compute_ref_log_prob": 15.0,
    "compute_log_prob": 15.0,
    "compute_reward": 10.0,
    "update_critic": 50.0,
    "update_actor": 55.0,
    "reshard": 5.0,
}
"""Of a step of about 300 s, generation somewhat less than half of it."""
COSTS = RecoveryCosts(
    notice_s=30.0,  # the worst of those that make chaos measured: a node that is cut off
    rebuild_s=150.0,  # processes, imports, a 70B model read by slices, vLLM's start, communicators
    restore_s=60.0,  # 16 bytes a parameter of 70B: 1.1 GB a rank, at 150 MB/s for each node of 8
    sync_s=10.0,
    save_s=3.0,  # 1.1 GB to host memory
)
PLACEMENTS = {
    "colocate": dict.fromkeys(("actor", "critic", "reference", "reward"), "main"),
    "separate": {
        "actor": "actor",
        "critic": "critic",
        "reference": "frozen",
        "reward": "frozen",
        "actor.generate_sequences": "gen",
        "actor.reshard": ("actor", "gen"),
    },
}


def seconds(node: Node, step: int) -> float:
    """Of a node at work; nothing for what moves indices."""
    return SECONDS.get(node.op, 0.0)


def measure(placement: str, checkpoint_every: int) -> dict[str, object]:
    """One run of STEPS steps."""
    pool_of = PLACEMENTS[placement]
    pools = sorted({pool for pools in pool_of.values() for pool in ([pools] if isinstance(pools, str) else pools)})
    config, rng = RecoveryConfig(), random.Random(0)
    run = faulted_run(
        trace(ppo),
        pool_of=pool_of,
        seconds=seconds,
        steps=STEPS,
        faults=every_nth_step(STEPS, EVERY, pools, rng.random),
        checkpoint_every=checkpoint_every,
        costs=COSTS,
        budget=Budget(config.retries, config.window_steps, config.backoff_s),
    )
    return as_json(run)


def main() -> None:
    """Measure all and print the line."""
    found = {f"{name}/every_{every}": measure(name, every) for name in PLACEMENTS for every in (1, 2, 5, 10)}
    print(json.dumps({"ranks": 1024, "steps": STEPS, "fault_every": EVERY, **found}))


if __name__ == "__main__":
    main()
