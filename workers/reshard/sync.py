"""One verified weight sync, as every rank that sends or receives goes through it.

    meet      all ranks there, connections open                                  (link.py, by the caller)
    agree     one version, the same routes
    expect    each source rank adds up the checksum of what it holds of every target box; one all-reduce
              (the same sums as last time on every rank, where that may be: nothing to move)
    exchange  chunks                                                             (exchange.py)
    verify    each target rank checksums what it now holds, against what is expected
    commit    all ranks succeeded, or all raise

A failure in any phase is an error on every rank: at once where the ranks can still talk, within the link's
time-out where not. Whoever holds the target then has half a version and must refuse to serve it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from rlhf_dist.failure import FailureKind
from rlhf_dist.reshard.checksum import box_checksum, word_bytes
from rlhf_dist.reshard.layout import Box
from rlhf_dist.reshard.rounds import RankRounds, rounds_of
from rlhf_dist.reshard.routes import Routes
from rlhf_dist.reshard.shards import Shards
from workers.reshard.exchange import exchange
from workers.reshard.link import Link, SyncStopped


class SyncFailed(RuntimeError):
    """What arrived is not what was sent, or the ranks do not agree; raised on every rank of the sync."""

    failure_kind = FailureKind.NUMERICS


@dataclass(frozen=True)
class SyncReport:
    """One sync on one rank."""

    version: int
    parameters: int
    """Parameters of the routes."""
    bytes_received: int
    """From other processes."""
    seconds: float
    phase_seconds: Mapping[str, float] = field(default_factory=dict)


def check_changed(version: int, last: object, now: object) -> None:
    """Raise SyncFailed if a trained version has the checksums of the last sync (None: there was none)."""
    if last == now:
        raise SyncFailed(
            f"version {version} was trained since the last sync and must differ from it in some weight, got the same "
            "bits in all; does the trainer hand out stale shards, or is the learning rate too small for rollout.dtype?"
        )


@dataclass
class WeightSync:
    """The part of one rank in all syncs of the same routes. Every rank calls `run` alike; see the module's picture."""

    routes: Routes
    rank: int
    bucket_bytes: int
    link: Link | None
    """None: one rank alone."""

    def __post_init__(self) -> None:
        digests = int(self.routes.source.digest[:15], 16) ^ int(self.routes.target.digest[:15], 16)
        self._digest = digests ^ self.bucket_bytes
        self._rounds: RankRounds = rounds_of(self.routes, self.rank, self.bucket_bytes)
        self._boxes = _TargetBoxes(self.routes, self.rank)
        self._last: torch.Tensor | None = None
        """Checksums of the last sync that succeeded."""

    @property
    def buffer_bytes(self) -> int:
        """Memory that this rank's messages take."""
        return self._rounds.buffer_bytes

    def run(
        self,
        version: int | None,
        source: Shards,
        target: Shards,
        *,
        prepare: Callable[[], None] | None = None,
        finish: Callable[[int], None] | None = None,
        must_change: bool = False,
        skip_unchanged: bool = False,
    ) -> SyncReport:
        """Move `version` of the source into the target, verified; the link has met. version None: what the others say.

        source, target: this rank's shards ({} on a rank without). prepare: called before the first element is
        written. finish(version): called after the last, before the checksums are taken: makes the target ready to
        run. must_change: some weight was trained since the last sync, so equal bits are an error. skip_unchanged: equal
        bits need not move again. Raises SyncFailed or SyncStopped, whatever failed and wherever.
        """
        clock = _Clock()
        try:
            version, comparable = self._agree(version)
            clock.lap("agree")
            expected = self._expect(source)
            clock.lap("expect")
            if skip_unchanged and comparable and self._last is not None and torch.equal(self._last, expected):
                return SyncReport(version, 0, 0, clock.total, clock.laps)
            if prepare:
                prepare()
            received = exchange(self._rounds, source, target, self.link)
            clock.lap("exchange")
        except Exception as error:
            # Peers that wait for this rank's elements can be told in no other way.
            if self.link:
                self.link.fail(error)
            if isinstance(error, SyncFailed | SyncStopped):
                raise
            raise SyncFailed(f"version {version} failed on rank {self.rank} before all was sent: {error!r}") from error
        failure: Exception | None = None
        try:
            if finish:
                finish(version)
                clock.lap("finish")
            self._verify(version, expected, target)
            if must_change and self._last is not None:
                check_changed(version, self._last.tolist(), expected.tolist())
            clock.lap("verify")
        except Exception as error:  # noqa: BLE001 - whatever it was, the other ranks must learn of it
            failure = error
        self._commit(version, failure)
        clock.lap("commit")
        self._last = expected
        return SyncReport(version, len(self.routes.transfers), received, clock.total, clock.laps)

    def _agree(self, version: int | None) -> tuple[int, bool]:
        """The version of all ranks, and whether all of them remember the same last sync."""
        if not self.link:
            assert version is not None, "a rank alone knows what it syncs"
            return version, True
        self.link.phase = "agree"
        last = -1 if self._last is None else hash(tuple(self._last.tolist())) & (1 << 62) - 1
        told = self.link.all_gather([-1 if version is None else version, self._digest, last])
        versions = {rank: values[0] for rank, values in enumerate(told) if values[0] >= 0}
        for what, given in (("version", versions), ("routes", {rank: values[1] for rank, values in enumerate(told)})):
            if len(set(given.values())) != 1:
                each = ", ".join(f"rank {rank}: {value}" for rank, value in given.items())
                raise SyncFailed(f"all ranks must sync one {what}, got {each or 'none'}")
        return versions[min(versions)], last >= 0 and len({values[2] for values in told}) == 1

    def _expect(self, source: Shards) -> torch.Tensor:
        """[parameter boxes] int64 checksums of every distinct target box, from the ranks that hold its parts."""
        sums = self._boxes.of_source(source)
        if not self.link:
            return sums
        self.link.phase = "expect"
        return self.link.all_reduce_sum(sums)

    def _verify(self, version: int, expected: torch.Tensor, target: Shards) -> None:
        if self.link:
            self.link.phase = "verify"
        wrong = self._boxes.wrong(expected, target)
        if wrong:
            few = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
            raise SyncFailed(
                f"version {version}: checksums of what arrived must equal the sender's, on rank {self.rank} "
                f"{len(wrong)} parameters differ: {few}"
            )

    def _commit(self, version: int, failure: Exception | None) -> None:
        if self.link:
            self.link.phase = "commit"
            told = [failed for [failed] in self.link.all_gather([int(failure is not None)])]
        else:
            told = [int(failure is not None)]
        if failure is not None:
            raise (
                failure
                if isinstance(failure, SyncFailed)
                else SyncFailed(f"version {version} failed on rank {self.rank}: {failure!r}")
            ) from failure
        if any(told):
            ranks = [rank for rank, failed in enumerate(told) if failed]
            raise SyncFailed(f"version {version} failed on ranks {ranks}; see their errors")


class _TargetBoxes:
    """Which checksums are taken: one for each distinct target box of each parameter."""

    def __init__(self, routes: Routes, rank: int) -> None:
        self._terms: list[tuple[int, str, int, tuple[slice, ...], Box, int]] = []
        """(slot, parameter, source shard, where in it, box, word) of what this rank answers for."""
        self._held: list[tuple[int, str, int, Box, int]] = []
        """(slot, parameter, target shard, box, word) of what it holds afterwards."""
        self._shape: dict[str, tuple[int, ...]] = {}
        self.slots = 0
        for name, t in routes.target.parameters.items():
            s = routes.source.parameters[name]
            self._shape[name] = s.shape
            width = word_bytes(s.__class__(s.shape, t.dtype, s.rank, s.start, s.stop), t)
            first, set_of = t.distinct
            for k, i in enumerate(np.flatnonzero(t.rank == rank).tolist()):
                self._held.append((self.slots + int(set_of[i]), name, k, t.box(i), width))
            first_s, set_s = s.distinct
            for k, i in enumerate(np.flatnonzero(s.rank == rank).tolist()):
                holders = s.rank[set_s == set_s[i]]
                for slot, j in enumerate(first.tolist()):
                    # Of several holders one answers, a different one for different boxes.
                    if holders[(self.slots + slot) % len(holders)] != rank:
                        continue
                    box = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(s.box(i), t.box(j), strict=True))
                    if all(a < b for a, b in box):
                        where = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, s.box(i), strict=True))
                        self._terms.append((self.slots + slot, name, k, where, box, width))
            self.slots += len(first)
        self._dtype = {name: getattr(torch, t.dtype) for name, t in routes.target.parameters.items()}

    def of_source(self, source: Shards) -> torch.Tensor:
        """[slots] this rank's summands, on the CPU."""
        sums = torch.zeros(self.slots, dtype=torch.int64)
        if self._terms:
            parts = [
                box_checksum(source[name][k][where], box, self._shape[name], width, self._dtype[name])
                for _, name, k, where, box, width in self._terms
            ]
            sums.index_add_(0, torch.tensor([term[0] for term in self._terms]), torch.stack(parts).cpu())
        return sums

    def wrong(self, expected: torch.Tensor, target: Shards) -> list[str]:
        """Parameters whose checksum on this rank is not the expected one."""
        if not self._held:
            return []
        sums = torch.stack(
            [box_checksum(target[name][k], box, self._shape[name], width) for _, name, k, box, width in self._held]
        ).cpu()
        differs = sums != expected[torch.tensor([term[0] for term in self._held])]
        return [term[1] for term, bad in zip(self._held, differs.tolist(), strict=True) if bad]


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.laps[phase] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return self._last - self._started
