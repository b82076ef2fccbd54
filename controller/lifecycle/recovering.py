"""Recovery inside a run: from a failure to pools that stand where one step ended, so that the next can be run again.

    a node fails ── infrastructure? ── no ──> the run ends, with the row kept        (data, code, numerics)
         | yes, within the budget                     (out of memory: once a role, with half of its tokens at a time)
    survey     every process is asked to give the step up; who died, or says nothing for too long, is dead
    newest     where to go back to: the last step, if no process that learns is dead or has begun to learn since;
               else the newest copy in memory or checkpoint; else the start, with pools that learn built anew
    rebuild    dead pools, elsewhere if need be; the others keep their processes, and are connected to the new ones
    restore    roles, states and positions in the data; then a verified sync, and only then a step   (domains.py)

Each part may fail as a step does: then it begins anew, and the budget counts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from controller.cluster.pool import SIGNALS, ClusterError, NoRoom
from controller.execution.failed_calls import NodeError, WorkerLost
from controller.lifecycle.checkpoint import Checkpoint
from controller.lifecycle.memory_copies import MemoryCopies
from controller.lifecycle.session import Session
from controller.lifecycle.step_end import StepEnd
from controller.recovery.budget import Budget
from controller.recovery.domains import Domains, Health
from rlhf_dist.compose import Launch
from rlhf_dist.failure import Failure, FailureKind, failure_of_call
from rlhf_dist.placement.roles import HOST_POOL
from rlhf_dist.role_kinds import has_training_engine, role_with_base

E = TypeVar("E", bound=Exception)
RECOVERABLE = (NodeError, ClusterError)
"""What a run can recover from, if it is of the right kind."""
MOST_TEXT = 250
"""Characters of a failure in a recovery's line: Ray's own texts go on about its settings."""
SOURCES = {
    "processes": "living processes",
    "memory": "copies in memory",
    "checkpoint": "the checkpoint",
    "start": "the start",
    "replicas": "other replicas",
}
FIRST_CAUSE_S = 5.0
"""Longest wait for the word that a process died, whose peers failed with an error of another kind before it."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """One that came to its end."""

    what: str
    """The failure, in a line."""
    pools: tuple[str, ...]
    """Built anew."""
    failed_at: int
    """Steps done when it happened."""
    back_to: int
    source: str
    """`processes`, `memory`, `checkpoint` or `start`: where the state came from; `replicas`: no step was given up."""
    seconds: float
    """From the failure to the first node of a step."""

    def __str__(self) -> str:
        rebuilt = f"pool {', '.join(self.pools)} rebuilt, " if self.pools else ""
        return (
            f"recovered in {self.seconds:.1f} s: {rebuilt}back to {self.back_to} of {self.failed_at} steps done "
            f"(from {SOURCES[self.source]}), after: {self.what}"
        )


class Recoveries:
    """Decides whether a run may recover, and brings its pools back."""

    def __init__(self, session: Session, phase: Callable[[str], None]) -> None:
        """phase: hears what begins."""
        self._session, self._phase = session, phase
        config = session.launch.run.recovery
        self.domains = Domains(session.pools, silent_s=config.settle_s, clock=time.monotonic)
        self._budget = Budget(config.retries, config.window_steps, config.backoff_s)
        self._halved: set[str] = set()
        self.copies = MemoryCopies(session)
        self.done: list[Recovery] = []

    def admit(self, error: NodeError | ClusterError, furthest: int) -> None:
        """Return once a recovery may begin, after the back-off; raises `error` where the run must end."""
        cause = error.cause if isinstance(error, WorkerLost) else None
        if not self._session.launch.run.recovery.retries or (cause is not None and cause.fatal):
            raise error
        kind = self._kind(error)
        if kind is FailureKind.OUT_OF_MEMORY and isinstance(error, NodeError):
            self._halve(error)
            return
        if kind is not FailureKind.INFRASTRUCTURE:
            raise error
        wait_s = self._budget.take(furthest)
        if wait_s is None:
            raise with_reason(error, self._spent())
        if wait_s:
            self._phase(f"recovery: waiting {wait_s:g} s, the last one did not get further")
            time.sleep(wait_s)

    def survey(self, error: Exception) -> tuple[str, ...]:
        """Have every process give up the step; the pools that are dead. Bounded by `recovery.settle_s`."""
        domains, replies = self.domains, self._session.cluster.replies
        self._phase("recovery: asking every process to give up the step")
        domains.abandoned()
        cause = error.cause if isinstance(error, WorkerLost) else None
        if cause is not None and cause.pool:
            domains.died(cause.pool)  # A process that is stopped does not answer either: nobody waits for that.
        elif cause is not None and (watch := self._session.cluster.watch) is not None:
            for name in watch.pools_at(cause.node):  # nor do those of a node that is gone
                domains.died(name)
        asked = {
            process.abandon.remote(): name
            for name in domains.those(Health.SUSPECT)
            for process in self._pool(name).processes
        }
        left = dict(asked)
        while left and domains.those(Health.SUSPECT):
            ready = replies.ready(list(left), 1.0)
            for ref, answer in zip(ready, replies.get(ready, 60.0), strict=True):
                name = left.pop(ref)
                if isinstance(answer, (Exception, Failure)):
                    domains.died(name)
                elif name not in left.values():
                    domains.answered(name)
            left = {ref: name for ref, name in left.items() if domains.health(name) is Health.SUSPECT}
            domains.tick()
        if not domains.those(Health.DEAD):
            # All are there: what failed is between them, and nobody knows what state it is in.
            for name in getattr(error, "pools", ()):
                domains.died(name)
        return domains.those(Health.DEAD)

    def newest(
        self, end: StepEnd | None, written: Collection[str], last_checkpoint: Callable[[], Checkpoint | None]
    ) -> tuple[int, str, StepEnd | Checkpoint | None]:
        """Steps done that all go back to, and where from. written: states that steps since `end` have written, or may
        have. last_checkpoint: reads all of its files, and is asked where it is needed."""
        if end is not None and self._is_whole(end, written):
            return end.done, "processes", end
        checkpoint = last_checkpoint()
        copy = self.copies.newest(self.domains.those(Health.DEAD))
        if copy is not None and (checkpoint is None or copy.done >= checkpoint.step):
            return copy.done, "memory", copy
        if checkpoint is not None:
            return checkpoint.step, "checkpoint", checkpoint
        for role in self._session.model_roles:
            self.domains.died(self._session.groups[role].pool.name)
        return 0, "start", None

    def rebuild(self) -> tuple[str, ...]:
        """Start dead pools anew; their names."""
        dead = self.domains.those(Health.DEAD)
        incarnations = {name: self.domains.rebuild(name) for name in dead}
        if dead:
            limit_s = self._session.launch.run.ray.ready_timeout_s
            self._phase(f"recovery: rebuilding pool {', '.join(dead)} (room for it is waited for up to {limit_s:g} s)")
            try:
                self._session.rebuild(dead, self._phase)
            except ClusterError:
                for name in dead:
                    self.domains.died(name)
                raise
        for name, incarnation in incarnations.items():
            self.domains.up(name, incarnation)
        return dead

    def synced(self, done: int) -> None:
        """All roles hold the state of `done` steps; have what generates verify that of its weights, and serve again."""
        self.domains.goal(done)
        incarnations = {name: self.domains.incarnation(name) for name in self._session.pools}
        self._session.sync(done)
        for name in self.domains.those(Health.CATCHING_UP):
            self.domains.verified(name, incarnations[name], done)
        assert self.domains.serving, "every pool was caught up above"

    def resize(self, pool: str, slots: int, done: int) -> None:
        """Give a pool of teams another size between two steps, and its new processes the weights of `done` steps.

        Raises NoRoom, with nothing changed; any other error is one to recover from.
        """
        try:
            self._session.change_pool(pool, slots, (), self._phase)
            self.domains.died(pool)
            self.domains.up(pool, self.domains.rebuild(pool))
            self.synced(done)
        except NoRoom:
            raise
        except RECOVERABLE:
            self.domains.died(pool)
            raise

    def summary(self) -> dict[str, Any]:
        """For summary.json; empty where there was none."""
        if not self.done:
            return {}
        said = [
            {
                "what": one.what,
                "pools": list(one.pools),
                "failed_at": one.failed_at,
                "back_to": one.back_to,
                "from": one.source,
                "seconds": round(one.seconds, 2),
            }
            for one in self.done
        ]
        return {"recoveries": said, "recovery_s": round(sum(one.seconds for one in self.done), 2)}

    # --- within ----------------------------------------------------------------------------------------
    def _kind(self, error: NodeError | ClusterError) -> FailureKind:
        pools = error.pools if isinstance(error, NodeError) else self._session.pools
        if error.kind is FailureKind.CODE and not isinstance(error, NoRoom) and self._died(pools):
            return FailureKind.INFRASTRUCTURE
        return error.kind

    def _died(self, names: Collection[str]) -> bool:
        """Whether a process of these pools is gone: then an error of its peers is its doing, whatever they call it."""
        replies = self._session.cluster.replies
        asked = [
            process.phase.options(concurrency_group=SIGNALS).remote()
            for name in names
            if name in self._session.cluster.pools
            for process in self._pool(name).processes
        ]
        deadline = time.monotonic() + FIRST_CAUSE_S
        while asked and time.monotonic() < deadline:
            ready = replies.ready(asked, 0.5)
            if any(
                isinstance(answer, Exception) and failure_of_call(answer).lost for answer in replies.get(ready, 60.0)
            ):
                return True
            asked = [ref for ref in asked if ref not in ready]
        return False

    def _pool(self, name: str) -> Any:
        return self._session.cluster.pools[name]

    def _is_whole(self, end: StepEnd, written: Collection[str]) -> bool:
        """Whether what the processes hold is the state of that step's end, or can be made so."""
        session, dead = self._session, set(self.domains.those(Health.DEAD))
        learning = session.model_roles
        if dead & {session.groups[role].pool.name for role in learning}:
            return False
        if HOST_POOL in dead and end.has_references:
            return False  # The values died with the process that made them.
        rollouts = {f"{role}.rollout" for role in session.launch.dataflow.generating}
        learned = {state for state in written if state.split(".")[0] in learning}
        return not (learned | end.written) - rollouts

    def _halve(self, error: NodeError) -> None:
        """Give the role half as many tokens at a time; raises `error` for one that has had that, or has no engine."""
        launch, role = self._session.launch, error.role
        if role in self._halved:
            tokens = launch.roles[role_with_base(launch, role) or role].engine.micro_batch_tokens
            raise with_reason(error, f"{role} takes {tokens} tokens at a time already, half of what it began with")
        if role not in launch.roles or not has_training_engine(launch, role):
            raise error
        self._halved.add(role)
        self._session.launch, tokens = with_half(launch, role)
        self._phase(
            f"recovery: {role} ran out of memory; from now on it takes at most {tokens} tokens at a time, which "
            f"changes no gradient ({role}.engine.micro_batch_tokens={tokens})"
        )
        for name in error.pools:
            self.domains.died(name)

    def _spent(self) -> str:
        config = self._session.launch.run.recovery
        return (
            f"the run has recovered {config.retries} times in {config.window_steps} steps (recovery.retries) and ends; "
            "resume=auto goes on from its last checkpoint"
        )


def shortened(text: str) -> str:
    """A failure's text as part of a line."""
    line = text.splitlines()[0]
    return line if len(line) <= MOST_TEXT else f"{line[:MOST_TEXT]}..."


def with_reason(error: E, why: str) -> E:
    """The error with why the run ends of it, in its one line."""
    error.args = (f"{error}; {why}", *error.args[1:])
    return error


def with_half(launch: Launch, role: str) -> tuple[Launch, int]:
    """The launch with half the tokens a micro-batch for the engine that `role` uses, and how many those are."""
    owner = role_with_base(launch, role) or role
    config: Any = launch.roles[owner]
    tokens = max(1, config.engine.micro_batch_tokens // 2)
    changed = replace(config, engine=replace(config.engine, micro_batch_tokens=tokens))
    return replace(launch, roles={**launch.roles, owner: changed}), tokens
