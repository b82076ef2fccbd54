"""What faults cost, on a clock whose numbers are worked out by hand."""

from __future__ import annotations

import pytest

from controller.recovery.budget import Budget
from controller.recovery.throughput import FaultedRun, RecoveryCosts, faulted_run
from recipes.policy_gradient.grpo import grpo
from rlhf_dist.dataflow.trace import trace

COSTS = RecoveryCosts(notice_s=1.0, rebuild_s=10.0, restore_s=4.0, sync_s=2.0, save_s=0.5)
SECONDS = {"generate_sequences": 4.0, "update_actor": 5.0, "reshard": 1.0}
POOLS = {"actor": "train", "actor.generate_sequences": "gen", "actor.reshard": ("train", "gen")}


def run(*faults: tuple[float, str], checkpoint_every: int = 0, retries: int = 3) -> FaultedRun:
    """Six steps of 10 s."""
    return faulted_run(
        trace(grpo),
        pool_of=POOLS,
        seconds=lambda node, step: SECONDS.get(node.op, 0.0),
        steps=6,
        faults=faults,
        checkpoint_every=checkpoint_every,
        costs=COSTS,
        budget=Budget(retries=retries, window=100, backoff_s=3.0),
    )


def test_without_faults_only_checkpoints_cost() -> None:
    assert run().seconds == run().calm_s == 60.0
    assert run(checkpoint_every=2).seconds == 61.5


def test_a_generating_pool_costs_its_own_step_and_one_that_learns_all_since_the_checkpoint() -> None:
    generating = run((2.3, "gen"))
    assert (generating.seconds, generating.replayed) == (60 + 3 + 1 + 10 + 2, 0)
    updating = run((2.6, "gen"))
    assert (updating.seconds, updating.replayed) == (60 + 6 + 20 + 1 + 10 + 2 + 4, 2)
    learning = run((3.31, "train"), checkpoint_every=2)
    # 33.1 s of work, one save of 0.5 s among them: 12.6 s since the checkpoint are lost.
    assert learning.seconds == pytest.approx(61.5 + 12.6 + 1 + 10 + 2 + 4)
    assert (learning.replayed, learning.recoveries) == (1, 1)


def test_a_fault_at_the_same_step_waits_and_a_spent_budget_ends() -> None:
    once, twice = run((0.1, "gen")), run((0.1, "gen"), (0.3, "gen"))
    assert twice.seconds - once.seconds == pytest.approx(2 + 1 + 10 + 2 + 3)
    with pytest.raises(RuntimeError, match="recovery.retries"):
        run((0.1, "gen"), (0.3, "gen"), retries=1)
