"""What this process keeps of a call for people who look inside: its rows, and a trace of it (`wire.Look`).

pull rows ── op ──┬─ written, where the step is due ──> inputs/step_N/NODE/part_K (rlhf_dist/saved_calls.py)
                  └─ failed ──> the same without outputs, with why
             └ torch.profiler around it in a profiled step, where the process has torch (profiles.py)
"""

from __future__ import annotations

import sys
import traceback
from bdb import BdbQuit
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_dist.batch import Batch
from rlhf_dist.failure import text_of
from rlhf_dist.saved_calls import SavedCall, SavedRows, write_call
from rlhf_dist.wire import Call, OpResult
from workers.failures import is_of_peer
from workers.states import write_state


@dataclass
class Seen:
    """What came of a call."""

    result: OpResult | None = None


@contextmanager
def looked_at(
    call: Call,
    batches: Sequence[Batch],
    *,
    who: str,
    rank: int,
    worker: Any = None,
    state: Mapping[str, Any] | None = None,
) -> Iterator[Seen]:
    """Around an op. who: the process, `main-0`. worker: of the role. state: values of a State before the call."""
    seen, look = Seen(), call.look
    if look is None:
        yield seen
        return
    with ExitStack() as around:
        if look.profile and "torch" in sys.modules:  # a process without it runs plain functions
            from workers.profiles import profiled

            around.enter_context(profiled(Path(look.profile) / who, call.node))
        try:
            yield seen
        except BdbQuit:
            raise
        except (Exception, SystemExit) as error:
            if look.inputs and not is_of_peer(error):
                _keep_of_failure(call, batches, rank, worker, state, error)
            raise
    if look.inputs and look.due and seen.result is not None and not seen.result.interrupted:
        _keep(call, batches, rank, worker, state, seen.result, "")


def _keep_of_failure(
    call: Call,
    batches: Sequence[Batch],
    rank: int,
    worker: Any,
    state: Mapping[str, Any] | None,
    error: BaseException,
) -> None:
    try:
        _keep(call, batches, rank, worker, state, None, text_of(error))
    except Exception:  # what failed is the news: that its rows cannot be kept, after it, stands in the log
        print(f"the inputs of {call.node} could not be kept", file=sys.stderr)
        traceback.print_exc()


def _keep(
    call: Call,
    batches: Sequence[Batch],
    rank: int,
    worker: Any,
    state: Mapping[str, Any] | None,
    result: OpResult | None,
    failure: str,
) -> None:
    look = call.look
    assert look is not None, "asked before"
    generates = getattr(worker, "generation", worker) if worker is not None else None
    saved = SavedCall(
        step=call.step,
        node=call.node,
        line=call.line,
        part=look.part,
        rank=rank,
        of_rows=look.of_rows,
        streamed=look.streamed,
        numbers=look.numbers,
        given=look.given,
        weights_step=getattr(generates, "weights_step", None),
        failure=failure,
        batches=tuple(
            SavedRows(columns=batch, row_index=given.row_index, mini_batch=given.mini_batch)
            for batch, given in zip(batches, call.batches, strict=True)
        ),
        outputs=None if result is None else _as_the_recipe_says(call, result.columns),
        parent=None if result is None else result.parent,
    )
    write_call(Path(look.inputs), saved, None if state is None else lambda folder: write_state(folder, state))


def _as_the_recipe_says(call: Call, columns: Batch) -> Batch:
    return columns.rename(**{new: old for old, new in call.out.items()}) if call.out else columns
