"""What faults cost a long run: the executor of a real run on a clock, with pools that die.

    step 40      41      42 x                            42      43
         |-------|-------|--|   notice, rebuild, restore  |-------|
                                                     ^ from the last step, or the last checkpoint (then 41 again)

The rule of where a run goes back to is that of `lifecycle/recovering.py`, the waits are those of its budget; how long
a rebuild takes is stated by whoever asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.execution.executor import Finished, StepReport, run_steps
from controller.execution.simulation import Clock, Seconds
from controller.recovery.budget import Budget
from rlhf_dist.dataflow.graph import Dataflow, Node


@dataclass(frozen=True, kw_only=True)
class RecoveryCosts:
    """Seconds of what a recovery does, and of what it needs beforehand."""

    notice_s: float
    """From the death to the error."""
    rebuild_s: float
    """New processes with engines, connected."""
    restore_s: float
    """Reading a checkpoint on all ranks."""
    sync_s: float
    """The verified weight sync that every recovery ends with."""
    save_s: float
    """For which a checkpoint stops the run: copying the state; it is written beside the next step."""


@dataclass(frozen=True, kw_only=True)
class FaultedRun:
    """A run on the clock, with faults and without."""

    calm_s: float
    """Without faults and checkpoints."""
    seconds: float
    recoveries: int
    replayed: int
    """Steps that had ended and were run again."""

    @property
    def throughput(self) -> float:
        """Share of the steps a second of the undisturbed run."""
        return self.calm_s / self.seconds


class _Died(Exception):
    """A pool died while the clock ran."""


class _Faulty(Clock):
    """A clock on which a pool dies at `dies_s`."""

    def __init__(self, pool_of: Mapping[str, str | tuple[str, ...]], seconds: Seconds, dies_s: float) -> None:
        super().__init__(pool_of, seconds)
        self._dies_s = dies_s
        self.writing: list[int] = []
        """Steps whose updates have begun."""

    def launch(self, node: Node, step: int) -> None:
        """See Runner."""
        if any(state.endswith(".train") for state in node.weights_written):
            self.writing.append(step)
        super().launch(node, step)

    def wait(self) -> list[Finished]:
        """See Runner. Raises _Died when the next end comes after the fault."""
        if self.next_end_s > self._dies_s:
            self.now_s = max(self.now_s, self._dies_s)
            raise _Died
        return super().wait()


def faulted_run(
    dataflow: Dataflow,
    *,
    pool_of: Mapping[str, str | tuple[str, ...]],
    seconds: Seconds,
    steps: int,
    faults: Sequence[tuple[float, str]],
    checkpoint_every: int,
    costs: RecoveryCosts,
    budget: Budget,
) -> FaultedRun:
    """Run `steps` steps while pools die.

    faults: (time in steps of the undisturbed run, pool), in order; a time counts work, not recoveries. Raises
    RuntimeError when the budget is spent.
    """
    run = _Run(dataflow, pool_of, seconds, steps, checkpoint_every, costs)
    calm_s = run.to_the_end(float("inf"), save_s=0.0)
    step_s = calm_s / steps
    run = _Run(dataflow, pool_of, seconds, steps, checkpoint_every, costs)
    for at, pool in faults:
        if run.until(at * step_s):
            break
        wait_s = budget.take(run.furthest)
        if wait_s is None:
            raise RuntimeError(f"the fault at step {at:g} is one more than recovery.retries allows")
        run.recover(pool, wait_s)
    run.to_the_end(float("inf"), save_s=costs.save_s)
    return FaultedRun(calm_s=calm_s, seconds=run.now_s, recoveries=run.recoveries, replayed=run.replayed)


class _Run:
    def __init__(
        self,
        dataflow: Dataflow,
        pool_of: Mapping[str, str | tuple[str, ...]],
        seconds: Seconds,
        steps: int,
        checkpoint_every: int,
        costs: RecoveryCosts,
    ) -> None:
        self._dataflow, self._pool_of, self._seconds, self._steps = dataflow, pool_of, seconds, steps
        self._every, self._costs = checkpoint_every, costs
        learning = [n for n in dataflow if any(state.endswith(".train") for state in n.weights_written)]
        self._learning = {pool for node in learning for pool in Clock(pool_of, seconds).pools_of(node)}
        self.now_s = 0.0
        self.lost_s = 0.0
        """In recoveries."""
        self.done = self.furthest = self.saved = self.recoveries = self.replayed = 0
        self._writing: list[int] = []

    def until(self, work_s: float) -> bool:
        """Run until so many seconds were spent outside recoveries; whether the run has ended before."""
        self.to_the_end(work_s + self.lost_s, save_s=self._costs.save_s)
        return self.done == self._steps

    def to_the_end(self, dies_s: float, *, save_s: float) -> float:
        """Run to the last step, or until a pool dies; the clock then."""
        clock = _Faulty(self._pool_of, self._seconds, dies_s)
        clock.now_s = self.now_s

        def ended(report: StepReport) -> None:
            self.done = report.step + 1
            self.furthest = max(self.furthest, self.done)
            if self._saves_after(report.step):
                clock.now_s += save_s
                self.saved = self.done

        try:
            run_steps(
                self._dataflow,
                clock,
                start=self.done,
                stop=self._steps,
                on_step=ended,
                barrier=self._saves_after,
            )
        except _Died:
            pass
        self.now_s, self._writing = clock.now_s, clock.writing
        return self.now_s

    def recover(self, pool: str, wait_s: float) -> None:
        """The pool that died is built anew, and all go back to where a step ended."""
        costs, began = self._costs, self.now_s
        self.now_s += costs.notice_s + wait_s + costs.rebuild_s + costs.sync_s
        if pool in self._learning or any(step >= self.done for step in self._writing):
            self.now_s += costs.restore_s
            self.replayed += self.done - self.saved
            self.done = self.saved
        self.recoveries += 1
        self.lost_s += self.now_s - began

    def _saves_after(self, step: int) -> bool:
        return bool(self._every) and (step + 1) % self._every == 0


def every_nth_step(steps: int, every: int, pools: Sequence[str], draw: Callable[[], float]) -> list[tuple[float, str]]:
    """One fault in each `every` steps, at a time that `draw` ([0, 1)) gives, in the pools by turns."""
    count = steps // every
    return [((k + draw()) * every, pools[k % len(pools)]) for k in range(count)]


def as_json(run: FaultedRun) -> dict[str, Any]:
    """For a benchmark's line."""
    return {
        "throughput": round(run.throughput, 4),
        "recoveries": run.recoveries,
        "replayed_steps": run.replayed,
        "seconds": round(run.seconds),
    }
