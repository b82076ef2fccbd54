"""What kinds of runs `make chaos` disturbs, and with which faults.

sync       GRPO, ranks that train and generate in turns       the same weights and rows as undisturbed
apart      GRPO, two replicas generate in a pool of their own   the same
episodes   tool_grpo, episodes in a pool of their own           the same
stale      GRPO, generation one update ahead                    every step once, no weights older than that
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.chaos_run import Fault

GENERATE, FORWARD, UPDATE, SYNC = "generate_sequences", "compute_ref_log_prob", "update_actor", "reshard"
APART = ("placement.pools.main.slots=1", "placement.pools.gen.slots=2", "placement.rollout=gen")


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A kind of run."""

    recipe: str
    settings: Sequence[str]
    table: Sequence[Fault]
    exact: bool = True
    """A disturbed run ends with the weights and rows of an undisturbed one."""


ENDS = ("recovery.retries=0",)
"""The run ends by the fault, and is resumed."""
SYNC_TABLE = (
    Fault(kind="kill trainer in first sync", action="SIGKILL", op=SYNC, says="signal 9"),
    Fault(kind="kill trainer in generate", action="SIGKILL", op=GENERATE, step=2, says="signal 9"),
    Fault(kind="kill trainer in forward", action="SIGKILL", op=FORWARD, step=2, says="signal 9"),
    Fault(kind="kill trainer in update", action="SIGKILL", op=UPDATE, step=2, says="signal 9"),
    Fault(kind="kill trainer in sync", action="SIGKILL", op=SYNC, step=2, says="signal 9"),
    Fault(kind="kill trainer in save", action="SIGKILL", op=r"actor\.save", step=2, says="signal 9"),
    Fault(kind="kill trainer in start-up", action="SIGKILL", op="host role", says="signal 9|did not start", alone=True),
    Fault(kind="kill first rank in update", action="SIGKILL", rank=0, op=UPDATE, step=2, says="signal 9"),
    Fault(kind="kill host process", action="SIGKILL", pool="host", rank=0, op="reward", step=2, says="signal 9"),
    Fault(kind="stop trainer in generate", action="SIGSTOP", op=GENERATE, step=2, says="is stopped"),
    Fault(kind="stop trainer in forward", action="SIGSTOP", op=FORWARD, step=2, says="is stopped"),
    Fault(kind="stop trainer in update", action="SIGSTOP", op=UPDATE, step=2, says="is stopped"),
    Fault(kind="stop trainer in sync", action="SIGSTOP", op=SYNC, step=2, says="is stopped"),
    Fault(kind="crash of a trainer", action="SIGSEGV", op=UPDATE, step=2, says="signal 11"),
    Fault(kind="memory limit of a trainer", action="memory:0", op=GENERATE, step=2, says="out of memory|alloc"),
    Fault(kind="kill raylet", action="SIGKILL", pool="raylet", op=UPDATE, step=2, says="raylet.*signal 9", alone=True),
    Fault(kind="kill Ray's head", action="SIGKILL", pool="gcs", op=UPDATE, step=2, says="head.*signal 9", alone=True),
    Fault(kind="kill driver", action="SIGKILL", pool="driver", op=UPDATE, step=2, alone=True),
    Fault(kind="notice to driver", action="SIGTERM", pool="driver", op=UPDATE, step=2, says="preempted", alone=True),
    Fault(kind="full disk", action="file:40000", op=UPDATE, step=1, says="File too large|space", alone=True),
    Fault(kind="cut network of a node", action="cut", op=UPDATE, step=2, nodes=2, says="not answer|gone", alone=True),
    Fault(kind="kill of a node", action="power off", op=UPDATE, step=2, nodes=2, says="not answer|gone", alone=True),
    Fault(
        kind="cut network, a spare node", action="cut", op=UPDATE, step=2, nodes=3, says="not answer|gone", alone=True
    ),
    Fault(
        kind="kill of a node, a spare",
        action="power off",
        op=UPDATE,
        step=2,
        nodes=3,
        says="not answer|gone",
        alone=True,
    ),
    Fault(kind="corrupted checkpoint", action="SIGKILL", op=UPDATE, step=3, corrupts=True, alone=True, settings=ENDS),
)
"""Operations are those of GRPO: nodes of the graph, `host role` at the start."""


def _apart(generate: str) -> tuple[Fault, ...]:
    return (
        Fault(kind="kill replica in generate", action="SIGKILL", pool="gen", op=generate, step=1, says="signal 9"),
        Fault(
            kind="stop replica in generate", action="SIGSTOP", pool="gen", rank=0, op=generate, step=1, says="is stop"
        ),
        Fault(kind="kill replica in sync", action="SIGKILL", pool="gen", op=SYNC, step=2, says="signal 9"),
        Fault(kind="kill trainer in update", action="SIGKILL", rank=0, op=UPDATE, step=2, says="signal 9"),
    )


MODES = {
    "sync": Mode(recipe="grpo", settings=("placement.pools.main.slots=2",), table=SYNC_TABLE),
    "apart": Mode(recipe="grpo", settings=APART, table=_apart(GENERATE)),
    "episodes": Mode(recipe="tool_grpo", settings=APART, table=_apart("run_episodes")),
    "stale": Mode(recipe="grpo", settings=(*APART, "placement.max_staleness=1"), table=_apart(GENERATE), exact=False),
}
