"""The checkpoints of a run that goes on: begun between two steps, written beside the next, published once complete.

begin ──> every role has copied what it holds ──> advance, at each step's end ──> published, uploaded
                                                      ├─ leave    the run ends early
                                                      └─ settle   some who wrote it are dead
restore   roles, states and positions go on from one
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from controller.execution.failed_calls import NodeError
from controller.execution.ray_runner import RayRunner
from controller.lifecycle.checkpoint import (
    Checkpoint,
    CheckpointIncomplete,
    PendingCheckpoint,
    begin_checkpoint,
    checked,
    find_checkpoints,
    load_checkpoint,
)
from controller.lifecycle.run_folder import Beginning
from controller.lifecycle.session import Session
from controller.lifecycle.uploads import Uploads

STATES = "states"
"""Folder of a checkpoint with the values of states that are no numbers."""
PENDING_S = 60.0
"""Longest that a run which ends early waits for the checkpoint it is writing."""


class RunCheckpoints:
    """What a run has saved, and is saving."""

    def __init__(
        self, session: Session, beginning: Beginning, uploads: Uploads | None, tell: Callable[[str], None]
    ) -> None:
        """uploads: to a second place, if any. tell: hears what is lost."""
        self._session, self._beginning, self._uploads, self._tell = session, beginning, uploads, tell
        self._folder = beginning.folder / "checkpoints"
        self._pending: PendingCheckpoint | None = None
        self.saved = 0 if beginning.checkpoint is None else beginning.checkpoint.step
        """Step of the last complete one."""
        self.kept_at: int | None = None
        """Steps done of the last one that was begun or restored."""

    @property
    def last(self) -> int:
        """Step of the last one, complete or being written."""
        return self.saved if self._pending is None else self._pending.step

    def begin(self, done: int, runner: RayRunner, limit_s: float | None = None) -> None:
        """Have all roles and states save what they hold after `done` steps; returns once it is copied. limit_s: longest
        that each role may take for that, where it is not ray.call_timeout_s."""
        session = self._session
        self.advance(wait=True, limit_s=limit_s)
        self.kept_at = done
        self._pending = begin_checkpoint(
            self._folder,
            step=done,
            recipe=session.launch.recipe.name,
            ranks={role: session.groups[role].pool.size for role in session.model_roles},
            numbers=runner.numbers,
            settings=self._beginning.settings,
            sources=self._beginning.sources,
            save_role=lambda role, path: session.call_role(role, "save", done, limit_s=limit_s, folder=path),
            keep=session.launch.run.output.keep_checkpoints,
        )
        for name in session.states:
            session.save_state(runner.held_state(name), self._pending.partial / STATES / name)

    def advance(self, *, wait: bool, limit_s: float | None = None) -> None:
        """Make the one that is being written visible if it is complete; with `wait`, once it is."""
        if self._pending is None:
            return
        step, roles = self._pending.step, self._pending.roles
        # Beside what the next step already runs: the schedule must not stand still for a question.
        answers = [
            self._session.call_role(role, "saved", step, beside=True, limit_s=limit_s, wait=wait) for role in roles
        ]
        left = [answer[f"{role}/pending"] for role, answer in zip(roles, answers, strict=True)]
        if not any(left):
            self._publish(self._pending)
            self._pending = None

    def leave(self) -> None:
        """The run ends early: what was copied is written to its end, unless that takes longer than PENDING_S."""
        if self._pending is None:
            return
        step, deadline = self._pending.step, time.monotonic() + PENDING_S
        self._tell(f"the checkpoint after {step} steps is being written (interrupt again to leave without it)")
        try:
            while self._pending is not None and time.monotonic() < deadline:
                self.advance(wait=False, limit_s=deadline - time.monotonic())
                time.sleep(0.05)
        except Exception as error:  # What ended the run may have ended this too; it must not hide the first error.
            self._tell(f"the checkpoint after {step} steps is lost: {error}")

    def settle(self, dead: Collection[str]) -> None:
        """Finish the one under way, which may be the newest state there is; without a role of the `dead` pools it is
        lost, and those who live end their writing before its folder is used again."""
        if self._pending is None:
            return
        alive = [role for role in self._pending.roles if self._session.groups[role].pool.name not in dead]
        whole = len(alive) == len(self._pending.roles)
        try:
            for role in alive:
                self._session.call_role(role, "saved", self._pending.step, wait=True, limit_s=PENDING_S)
            if whole:
                self._publish(self._pending)
        except (NodeError, CheckpointIncomplete) as error:
            whole = False
            self._tell(f"the checkpoint after {self._pending.step} steps is lost: {error}")
        if not whole:
            self.kept_at = None
        self._pending = None

    def restore(self, checkpoint: Checkpoint, runner: RayRunner) -> None:
        """Have all roles, states and sources go on from a checkpoint."""
        session = self._session
        load_checkpoint(
            checkpoint,
            roles=session.model_roles,
            load_role=lambda role, path: session.call_role(role, "load", checkpoint.step, folder=path),
        )
        runner.numbers.update({name: dict(values) for name, values in checkpoint.numbers.items()})
        for folder in sorted((checkpoint.folder / STATES).glob("*")):
            runner.restore_state(folder.name, session.load_state(folder))
        self.kept_at = checkpoint.step

    def newest(self, furthest: int) -> Checkpoint | None:
        """The newest that is what was written, of at most `furthest` steps."""
        for found in reversed(find_checkpoints(self._folder)):
            if found.step <= furthest:
                one = checked(found, read=None)
                if isinstance(one, Checkpoint):
                    return one
                self._tell(f"damaged and left out: {one}")
        return None

    def _publish(self, pending: PendingCheckpoint) -> None:
        uploads = self._uploads
        complete = pending.finish() if uploads is None else pending.finish(uploads.in_use)
        self.saved = pending.step
        if uploads is not None:
            uploads.add(complete)
