"""Checkpoints on their way to a store, from a thread of its own: no upload delays a step or ends a run.

add(checkpoint) ──> the newest that waits ──> thread: store.put, each file again after 1, 2, 4 ... s if it fails,
                    (an older one that          │      `output.store_retry_s` in all
                     waits is left out)         └──> done, or given up: said, and in the summary
close() ──────────> waits for what is on its way
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from controller.lifecycle.checkpoint import Checkpoint
from controller.lifecycle.checkpoint_store import CheckpointStore, StoreError
from rlhf_dist.failure import text_of

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
INTERRUPTED_S = 60.0
"""Longest that a run which ends early waits for an upload."""


class Uploads:
    """A context manager; on the way out it waits until all is there or given up."""

    def __init__(self, store: CheckpointStore, *, keep: int, retry_s: float, tell: Callable[[str], None]) -> None:
        """keep: checkpoints that stay in the store, 0 for all. retry_s: longest that one upload is tried again.
        tell: shows a line to people."""
        self.place = store.place
        self._store, self._keep, self._retry_s, self._tell = store, keep, retry_s, tell
        self._changed = threading.Condition()
        self._waiting: Checkpoint | None = None
        self._moving: Checkpoint | None = None
        self._closed = threading.Event()
        self._dropped: list[Path] = []
        self._told = False
        self._progress_s = time.monotonic()
        self.done: list[int] = []
        """Steps whose checkpoints have arrived."""
        self.failed: list[int] = []
        """Steps whose checkpoints have not."""
        self._thread = threading.Thread(target=self._work, name="checkpoint-uploads", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Checkpoint) -> None:
        """Upload it, once the one before has arrived; returns at once."""
        with self._changed:
            if self._waiting is not None:
                self._tell(f"the checkpoint after {self._waiting.step} steps is not copied: one before it is under way")
                self.failed.append(self._waiting.step)
            self._waiting = checkpoint
            self._changed.notify_all()

    def add_missing(self, checkpoint: Checkpoint) -> None:
        """Upload what a run goes on from, where an earlier attempt did not arrive."""
        try:
            if checkpoint.step not in self._store.steps():
                self.add(checkpoint)
        except StoreError as error:
            self._tell(f"the checkpoint after {checkpoint.step} steps is in {checkpoint.folder} alone: {error}")

    def in_use(self, folder: Path) -> bool:
        """Whether the files of a checkpoint are needed still; if so, they are removed once they are not."""
        with self._changed:
            used = any(one is not None and one.folder == folder for one in (self._waiting, self._moving))
            if used:
                self._dropped.append(folder)
            return used

    def __enter__(self) -> Uploads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if kind is None else INTERRUPTED_S)

    def close(self, wait_s: float | None = None) -> None:
        """Wait for what is on its way: `wait_s` at most, or as long as the next file arrives in time."""
        deadline = None if wait_s is None else time.monotonic() + wait_s
        with self._changed:
            left = self._waiting or self._moving
            if left is not None:
                self._tell(f"waiting for the checkpoint after {left.step} steps to reach {self._store.place}")
            while self._waiting or self._moving:
                until = self._progress_s + self._retry_s + LONGEST_WAIT_S if deadline is None else deadline
                rest = min(1.0, until - time.monotonic())
                if rest <= 0:
                    break
                self._changed.wait(rest)
            given_up = [one for one in (self._moving, self._waiting) if one is not None]
            self._waiting = None
            self._closed.set()
            self._changed.notify_all()
        for one in given_up:
            self.failed.append(one.step)
            where = f"in {one.folder} alone: {self._store.place} took too long"
            self._tell(f"the checkpoint after {one.step} steps is {where}")

    def _work(self) -> None:
        while not self._closed.is_set():
            with self._changed:
                while self._waiting is None and not self._closed.is_set():
                    self._changed.wait(1.0)
                self._moving, self._waiting = self._waiting, None
            if self._moving is not None:
                self._upload(self._moving)
            with self._changed:
                self._moving = None
                dropped, self._dropped = self._dropped, []
                self._changed.notify_all()
            for folder in dropped:
                shutil.rmtree(folder, ignore_errors=True)

    def _upload(self, checkpoint: Checkpoint) -> None:
        deadline = time.monotonic() + self._retry_s
        self._told, self._progress_s = False, time.monotonic()
        try:
            self._store.put(checkpoint, lambda part: self._retried(part, checkpoint.step, deadline))
        except StoreError as error:
            if not self._closed.is_set():
                self.failed.append(checkpoint.step)
                self._tell(f"the checkpoint after {checkpoint.step} steps is in {checkpoint.folder} alone: {error}")
            return
        self.done.append(checkpoint.step)
        try:
            self._store.keep(self._keep)
        except StoreError as error:
            self._tell(f"older checkpoints stay where they are: {error}")

    def _retried(self, part: Callable[[], None], step: int, deadline: float) -> None:
        """Run `part` until it passes. Raises its last error at the deadline."""
        wait_s = FIRST_WAIT_S
        while True:
            try:
                part()
                self._progress_s = time.monotonic()
                return
            except Exception as error:  # whatever the library raises
                if self._closed.is_set() or time.monotonic() + wait_s > deadline:
                    raise
                left_s, why = deadline - time.monotonic(), " ".join(text_of(error).split())[:200]
                if not self._told:  # many files may fail for one reason
                    self._told = True
                    self._tell(f"the checkpoint after {step} steps, on its way: {why}; tried again for {left_s:.0f} s")
            self._closed.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
