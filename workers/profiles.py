"""torch's profiler around one op of this process, and what the op did to memory.

runs/NAME/profile/step_000003/main-0/actor.update_actor.json.gz   for https://ui.perfetto.dev or chrome://tracing
                                     actor.update_actor.txt       operators by time, memory before, at most, after
"""

from __future__ import annotations

import resource
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

MOST_ROWS = 40
"""Operators in a table."""
MIB = 1 << 20


@contextmanager
def profiled(folder: Path, node: str) -> Iterator[None]:
    """Trace what runs inside, and write it; what an op that fails has done until then, too. A trace that cannot be
    written is a line in the log, no failure of the op."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.reset_peak_memory_stats()
    before = psutil.Process().memory_info().rss
    profiler = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
    profiler.start()
    try:
        yield
        if on_gpu:
            torch.cuda.synchronize()
    except BaseException:
        with suppress(Exception):  # a device that has failed says so again, of another place
            if on_gpu:
                torch.cuda.synchronize()
        raise
    finally:
        try:
            profiler.stop()
            _write(folder, node, profiler, before, on_gpu)
        except Exception:
            print(f"the profile of {node} could not be written", file=sys.stderr)
            traceback.print_exc()


def _write(folder: Path, node: str, profiler: torch.profiler.profile, before: int, on_gpu: bool) -> None:
    """before: bytes of the process's memory when it began."""
    after = psutil.Process().memory_info().rss
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f".{node}.partial.json.gz"
    profiler.export_chrome_trace(str(trace))
    trace.replace(folder / f"{node}.json.gz")
    operators = profiler.key_averages()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    said = [
        f"{node}: host memory of the process {before // MIB} MiB before, {after // MIB} MiB after; "
        f"{most // MIB} MiB at most since it started",
        *([torch.cuda.memory_summary()] if on_gpu else []),
        operators.table(sort_by=by, row_limit=MOST_ROWS),
        operators.table(sort_by="self_device_memory_usage" if on_gpu else "self_cpu_memory_usage", row_limit=MOST_ROWS),
    ]
    table = folder / f".{node}.partial.txt"
    table.write_text("\n\n".join(said), encoding="utf-8")
    table.replace(folder / f"{node}.txt")
