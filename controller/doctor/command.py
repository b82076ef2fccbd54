"""The command `doctor`: every check within its time, a line each, whatever the others do.

    subject open ──> check 1 in a thread, waited for at most its limit ──> line ──> check 2 ... ──> JSON, exit code

Exit code 0 with warnings, 1 where a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from controller.cluster.termination import terminate_as_interrupt
from controller.doctor.catalogue import CHECKS
from controller.doctor.finding import Check, Finding, State, failed, skipped
from controller.doctor.rank_pool import NoRanks
from controller.doctor.subject import Subject, open_subject
from controller.doctor.versions import packages
from rlhf_dist.failure import text_of
from rlhf_dist.typed import ConfigError, unknown

_COLOURS: dict[State, str] = {"ok": "32", "skipped": "2", "warning": "33", "failed": "31"}
_MOST_TEXT = 300
"""Characters of an error in a line."""


def doctor_command(arguments: argparse.Namespace, address: str | None) -> int:
    """Run the checks on the cluster at `address` (None: one of its own). Raises ClusterError."""
    checks, deadline = chosen(arguments.only), time.monotonic() + arguments.limit
    with open_subject(address, arguments.folder, packages()) as subject, terminate_as_interrupt():
        return report(subject, checks, deadline, arguments.format == "json")


def chosen(names: str | None) -> list[Check]:
    """All checks, or those that are named, with commas. Raises ConfigError for another name."""
    wanted = [name.strip() for name in names.split(",")] if names else []
    known = [check.name for check in CHECKS]
    for name in wanted:
        if name not in known:
            raise ConfigError(unknown(name, known, "check"))
    return [check for check in CHECKS if not wanted or check.name in wanted]


def report(subject: Subject, checks: Sequence[Check], deadline: float, as_json: bool) -> int:
    """Run them and print what is found, line by line or as one JSON object; the exit code."""
    found: list[dict[str, Any]] = []
    for check in checks:
        if sys.stdout.isatty() and not as_json:
            print(f"{'...':<7}  {check.name}", end="\r", flush=True)
        started = time.monotonic()
        finding = examine(check, subject, deadline)
        found.append({"name": check.name, **asdict(finding), "seconds": round(time.monotonic() - started, 2)})
        if not as_json:
            print(line(check.name, finding, sys.stdout), flush=True)
    bad = any(one["state"] == "failed" for one in found)
    if as_json:
        print(json.dumps({"ok": not bad, "cluster": subject.about, "checks": found}, indent=2))
    else:
        counts = {state: sum(one["state"] == state for one in found) for state in _COLOURS}
        print(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    return int(bad)


def examine(check: Check, subject: Subject, deadline: float) -> Finding:
    """What one check says; `deadline`: of all together, on the monotonic clock."""
    if not subject.nodes and check.name != "nodes":
        return skipped("no node answers")
    left = deadline - time.monotonic()
    if left <= 0:
        return failed("the time for all checks was over", f"run again with --only {check.name}, or a longer --limit")
    return _within(check, subject, min(left, check.limit_s))


def _within(check: Check, subject: Subject, limit_s: float) -> Finding:
    """The finding, or why there is none within `limit_s`."""
    findings: list[Finding] = []

    def run() -> None:
        try:
            findings.append(check.run(subject))
        except NoRanks as error:
            findings.append(skipped(str(error)))
        except Exception as error:  # noqa: BLE001 - a check that raises has failed, and the others go on
            text = " ".join(text_of(error).split())
            findings.append(failed(text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}...", check.advice))

    thread = threading.Thread(target=run, name=check.name, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not findings:
        if subject.pool is not None:
            subject.pool.end()
        return failed(f"no answer within {limit_s:.0f} s", check.advice)
    return findings[0]


def line(name: str, finding: Finding, stream: TextIO) -> str:
    """One line for a person."""
    width = max(len(check.name) for check in CHECKS)
    state = f"{finding.state:<7}"
    if stream.isatty() and not os.environ.get("NO_COLOR"):
        state = f"\033[{_COLOURS[finding.state]}m{state}\033[0m"
    return f"{state}  {name:<{width}}  {finding.found}" + (f" -> {finding.advice}" if finding.advice else "")
