"""What crosses between the controller and a worker process: instructions out, small records back.

Token data is never in here. A `Fetch` says where rows lie in the object store and the worker pulls
them itself; a `Reply` carries references to what the worker stored, plus row counts and lengths.

    controller                         worker                          object store
      Call + [Fetch]  ----------->       pull rows  <------------------  columns of earlier ops
                                         run the op
      Reply  <--------------------       store columns  -------------->  columns of this op
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms.outputs import Head
from rlhf_dist.batch import Batch, IntArray
from rlhf_dist.metrics import Metrics


@dataclass(frozen=True, eq=False)
class Fetch:
    """Rows of one column group, to be pulled by the worker."""

    names: Mapping[str, tuple[str, ...]]
    """Column as the op sees it -> its name inside each of the objects."""
    refs: tuple[Any, ...]
    """Object references; nested in a record, so Ray does not resolve them on the way."""
    object_of: npt.NDArray[np.int32]
    """[B] index into refs."""
    row_of: npt.NDArray[np.int32]
    """[B] row inside that object."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """The rows of one batch that one rank is given."""

    num_rows: int
    fetches: tuple[Fetch, ...] = ()
    row_index: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    """[B] positions of these rows in the whole batch: randomness hangs on them, never on placement."""
    mini_batch: IntArray | None = None
    """[B] mini-batch of each row, for updates."""
    ids: Mapping[str, IntArray] = field(default_factory=dict)
    """[B] what the controller knows of each row and the op reads: `row_id`, `parent_id`."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a process keeps of a call, so that people may look inside: files that it writes itself."""

    inputs: str = ""
    """Folder of the step's calls (`saved_calls.py`); empty: none are kept."""
    due: bool = False
    """They are kept whatever happens; else only where the call fails."""
    part: int = 0
    of_rows: int | None = None
    streamed: bool = False
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    """See `saved_calls.SavedCall`, all five."""
    profile: str = ""
    """Folder for a trace of the call; empty: none is made."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """How the rows of a call are cut for those who take what is made of them while the call goes on."""

    ticket: str
    """Of the call: what is handed over is asked for by it."""
    of_row: IntArray
    """[B] the piece of each row: the same however rows are spread."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call(Given):
    """One op on one rank, with the rows of its first batch."""

    step: int
    node: str
    line: str
    """The recipe's line, for errors."""
    seed: int
    """The run's seed."""
    others: tuple[Given, ...] = ()
    """Rows of the op's other batches."""
    out: Mapping[str, str] = field(default_factory=dict)
    """The op's column name -> the recipe's, where they differ."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    look: Look | None = None
    wanted: int | None = None
    """Rows that an op is to keep which keeps the first `groups` on all ranks together; None: it has all rows."""
    pieces: Pieces | None = None
    """Whoever can hands over what it made of the rows of a piece as soon as it has (`WorkerContext.hand`); the reply
    has all of it again. None: nobody takes pieces."""

    @property
    def batches(self) -> tuple[Given, ...]:
        """All batches of the op, in its order."""
        return (self, *self.others)


@dataclass(frozen=True, eq=False)
class HeldState:
    """What the controller holds of a State."""

    numbers: Mapping[str, float]
    ref: Any = None
    """Object reference to all values; None where the numbers are all there is, or nothing has changed."""
    first: Mapping[str, Any] = field(default_factory=dict)
    """The other values that it starts with."""


def numbers_in(values: Mapping[str, Any]) -> dict[str, float]:
    """Those values that are numbers."""
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


@dataclass(frozen=True, kw_only=True, eq=False)
class OpResult:
    """What a worker's op returns: written columns, and more where it needs to."""

    columns: Batch
    parent: IntArray | None = None
    """[B'] input row of each output row, for ops that make or drop rows; None: rows are kept."""
    tokens: IntArray | None = None
    """[B'] prompt + response tokens, for ops that make rows or write token ids; None: those of what they come of."""
    groups: IntArray | None = None
    """[B'] group ids, for sources and ops that write them; None: those of the rows they come of."""
    metrics: Metrics = field(default_factory=dict)
    """Add up over answering ranks; an op whose ranks all know the same number reports it on rank 0 only."""
    state: Mapping[str, Any] | None = None
    """New values of a State, or how far a source has been drawn."""
    interrupted: bool = False
    """Generation that was asked to stop early; the worker keeps what it has and goes on when it is called again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reply:
    """The record of an op on one rank."""

    stored: tuple[tuple[tuple[str, ...], Any], ...]
    """(column names, object reference) of each column group, the same groups on every rank."""
    num_rows: int
    nbytes: int
    """Bytes stored."""
    seconds: float
    """Inside the op, pulling and storing included."""
    pull_seconds: float
    parent: IntArray | None = None
    tokens: IntArray | None = None
    groups: IntArray | None = None
    metrics: Metrics = field(default_factory=dict)
    state: Mapping[str, float] | None = None
    """Those of them that are numbers."""
    held: Any = None
    """Object reference to all of them, where there are others."""
    interrupted: bool = False


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """Where a role worker finds itself."""

    role: str
    rank: int
    """Rank in the pool, and in its process group where there is one for all."""
    world: int
    device: str
    """`cpu`, `cuda:0`, ..."""
    seed: int
    sums_weights: bool = False
    """Whether the recipe mixes weights of other roles into this one's, which are kept in float32 then."""
    total_steps: int = 0
    """Steps of the run, for schedules."""
    folder: str = ""
    """The run's folder, which all workers share; for what must be looked at after a failure."""
    peers: Mapping[str, Any] = field(default_factory=dict)
    """Role -> worker of this process, those that were started before."""
    nodes: tuple[int, ...] = ()
    """[world] which machine each rank of the pool is on; empty for one machine."""
    team: tuple[int, ...] = ()
    """Ranks of the pool that share a process group with this one, itself among them; empty: all do."""
    sync_timeout_s: float = 300.0
    """Longest a weight sync may take."""
    frozen_folders: Mapping[str, str] = field(default_factory=dict)
    """Role that is never trained -> the folder that its model is in."""
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    """Role with a model, and source -> the folder of the tokenizer that makes its token ids."""
    heads: tuple[Head, ...] = ()
    """Heads of the role's own."""
    memory: Any = None
    """The arbiter of this process's device (`workers/memory/arbiter.py`). None: nothing limits its engines."""
    phase: Callable[[str], None] = lambda text: None
    """To be told what of the start-up begins: people see it."""
    hand: Callable[[Call, int, OpResult], None] = lambda call, piece, result: None
    """To be given what became of the rows of one of `call.pieces`."""
    here: bool = False
    """A person is at a debugger: functions that have a process of their own are called in this one."""

    @property
    def group_rank(self) -> int:
        """Rank in the process group."""
        return self.team.index(self.rank) if self.team else self.rank

    @property
    def group_world(self) -> int:
        """Ranks of the process group."""
        return len(self.team) or self.world


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """How the ranks of two pools find each other: plain data from the controller, the same for all of them."""

    address: str
    """Of training rank 0's machine, as all others reach it."""
    port: int
    """A free port there."""
    secret: str = field(default="", repr=False)
    """What the keys of the meeting begin with."""
    senders: int
    """Training ranks; they are ranks 0 .. senders - 1 of the bridge."""
    receivers: int
    """Generation ranks, behind them."""
    nodes: tuple[int, ...] = ()
    """[senders + receivers] machine of each rank; empty for one machine."""
    timeout_s: float = 300.0
    """Longest a sync may take, and the wait for the other side to connect."""

    @property
    def world(self) -> int:
        """Ranks of both sides."""
        return self.senders + self.receivers
