"""Which failures a run goes on from, and which end it."""

from __future__ import annotations

import pytest

from controller.cluster.local import Local
from controller.cluster.pool import ClusterError, LostInStart, NoRoom
from controller.execution.failed_calls import NodeError, WorkerLost
from controller.lifecycle.recovering import Recoveries
from controller.lifecycle.session import Session
from rlhf_dist.compose import compose
from rlhf_dist.failure import FailureKind


@pytest.fixture
def recoveries() -> Recoveries:
    given = ("model.path=/m", "task=addition", "recovery.retries=2", "recovery.backoff_s=0.01")
    return Recoveries(Session(compose("grpo", given), Local(1.0), {}, {}), lambda text: None)


def test_a_node_that_is_gone_without_room_elsewhere_ends_the_run_with_what_is_missing(recoveries: Recoveries) -> None:
    with pytest.raises(NoRoom, match="2 slots of 1 CPU, not free"):
        recoveries.admit(NoRoom("pool 'main' needs 2 slots of 1 CPU, not free within 120 s"), 3)


def test_infrastructure_is_tried_again_within_its_budget_and_code_is_not(recoveries: Recoveries) -> None:
    for error in (WorkerLost("its process died"), LostInStart("rank 1 was killed by signal 9")):
        recoveries.admit(error, 5)
    with pytest.raises(
        ClusterError, match=r"no longer there; the run has recovered 2 times .*recovery.retries.*resume"
    ):
        recoveries.admit(ClusterError("no longer there"), 5)
    with pytest.raises(NodeError, match="KeyError"):
        broken = NodeError("reward.compute_reward failed: KeyError")
        broken.kind = FailureKind.DATA
        recoveries.admit(broken, 200)
