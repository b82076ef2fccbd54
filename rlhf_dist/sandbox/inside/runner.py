"""The first process of a sandbox: warm, confined, it waits for a program, runs it in processes of its own, and reports.

    host                          first process (1)                  program
      program, input  ------->  fork                  ----------->  limits, run
                                watch: output, seconds, memory
      result          <-------  end all but itself

With tests there are two: the code, and the checker, which reads its tests from the host's pipe itself. The first
process never has them, nor has the code, which is forked before they come. What a program does to itself is its own
loss: the first process cannot be signalled, and none can be read or traced.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import sys
from typing import Any

from . import checker, program
from .confine import SCRATCH, confine
from .frames import read_frame, write_frame
from .supervise import Streams, Watched, watch

WARM = (
    *("math", "random", "re", "json", "itertools", "functools", "collections", "heapq", "bisect", "string", "typing"),
    *("dataclasses", "copy", "decimal", "fractions", "datetime", "operator", "statistics", "array", "io", "traceback"),
)
"""Imported before there is a program, so that no program waits for them."""


def main() -> None:
    """Serve the host on stdin and stdout until it has gone."""
    settings = json.loads(sys.argv[1])
    sys.path[:] = [path for path in sys.path if path != settings["inside"]] + settings["packages"]
    folder = settings["scratch"]
    if settings["isolated"]:
        folder = SCRATCH
        confine(settings)
    for name in WARM:
        __import__(name)
    host_in, host_out = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    write_frame(host_out, {"ready": True})
    runs = 0
    while True:
        job = read_frame(host_in)
        if job is None:
            os._exit(0)
        runs += 1
        place = f"{folder}/{runs}"
        os.mkdir(place)
        result = _run(job, settings, place, host_in)
        write_frame(host_out, result | {"again": _emptied(folder)})


def _run(job: dict[str, Any], settings: dict[str, Any], folder: str, host_in: int) -> dict[str, Any]:
    limits = settings["limits"] | job.get("limits", {})
    for name, text in job.get("files", {}).items():
        with open(os.path.join(folder, os.path.basename(name)), "w", encoding="utf-8") as file:
            file.write(text)
    pipes = [os.pipe() for _ in range(4)]
    (in_read, in_write), (out_read, out_write), (err_read, err_write), (report_read, report_write) = pipes
    theirs = (in_read, out_write, err_write, report_write)
    tested = job["kind"] == "tests"
    ours_to_test, theirs_to_test = socket.socketpair() if tested else (None, None)
    worker = os.fork()
    if not worker:
        keep = theirs_to_test.fileno() if theirs_to_test is not None else report_write
        program.enter(limits, folder, in_read, out_write, err_write, (keep,))
        if theirs_to_test is not None:
            checker.serve_code(job["code"], theirs_to_test)
        elif job["kind"] == "command":
            program.run_command(job["argv"], report_write)
        else:
            program.run_program(job["code"], report_write)
    waited = worker
    if ours_to_test is not None:
        waited = os.fork()
        if not waited:
            kept = (host_in, report_write, ours_to_test.fileno())
            program.enter(limits, "/", in_read, out_write, err_write, kept)
            checker.run_tests(host_in, report_write, ours_to_test)
    for descriptor in theirs:
        os.close(descriptor)
    for end in (ours_to_test, theirs_to_test):
        if end is not None:
            end.close()
    stdin = job.get("stdin", "").encode("utf-8", "surrogatepass")
    streams = Streams(in_write, out_read, err_read, report_read)
    seen = watch(waited, worker, streams, stdin, limits, host_in, settings["isolated"])
    for descriptor in (out_read, err_read, report_read):
        os.close(descriptor)
    return _result(seen, limits)


def _emptied(folder: str) -> bool:
    """Whether all that a program left could be removed, so that the next one has room: it may have made it hard."""
    try:
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    except (OSError, RecursionError):
        return False
    return True


def _result(seen: Watched, limits: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    try:
        said = json.loads(bytes(seen.written["report"]) or b"{}")
        report = said if isinstance(said, dict) else {}
    except ValueError:
        pass  # a program may write to what it reports on; it gains nothing
    code = os.waitstatus_to_exitcode(seen.status)
    text = str(report.get("text", ""))
    if seen.exceeded:
        outcome, text = seen.exceeded, _limit(seen.exceeded, limits)
    elif seen.out_of_cpu:
        outcome, text = "timeout", f"took more than cpu_s={limits['cpu_s']:g}"
    elif code < 0:
        outcome, text = "killed", f"ended by {_signal(-code)}"
    elif code == program.OUT_OF_MEMORY:
        outcome, text = "memory", text or "MemoryError"
    elif code:
        outcome, text = "error", text or f"exit code {code}"
    else:
        outcome = "ok"
    return {
        "outcome": outcome,
        "text": text,
        "stdout": base64.b64encode(seen.written["stdout"]).decode(),
        "stderr": base64.b64encode(seen.written["stderr"]).decode(),
        "verdict": report.get("verdict"),
        "wall_s": seen.wall_s,
        "cpu_s": seen.cpu_s,
    }


def _limit(exceeded: str, limits: dict[str, Any]) -> str:
    name = {"timeout": "wall_s", "memory": "memory_bytes", "output": "output_bytes"}[exceeded]
    return (
        f"took more than {name}={limits[name]:g}" if exceeded == "timeout" else f"took more than {name}={limits[name]}"
    )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
