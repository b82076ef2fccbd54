"""`make chaos`: faults of every kind, one to a run, each against a run that nothing disturbed.

    table of faults ──> run with the fault (chaos_run.py) ──ended by it? ──> a second launch with resume=auto
                              │ events: when the fault was, when the run ended, what it said
                              └──> compared with the undisturbed run: weights to the last bit, rows of every step
                                   and looked for: its processes, shared memory, temporary files

A run that recovers by itself ends with code 0 and needs no second launch; the line of each fault says which it was
(`itself`, `resumed`). Where root allows, every run has a mount namespace with a /dev/shm and a /tmp of its own.

    python -m benchmarks.chaos                       the table
    python -m benchmarks.chaos --only kill,stop      some kinds
    python -m benchmarks.chaos --random 3600 --seed 7     random faults of the table, until the time is over

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.chaos_machines import PLACED, launch_on_machines
from benchmarks.chaos_run import Fault
from benchmarks.chaos_traces import MARK, alone, corrupt_newest, end_marked, left_behind, rows, weights
from controller.record.metrics import read_metrics
from rlhf_dist.testing.tiny_model import save_llama
from tests.runs.machines import refusal

LIMIT_S = 420.0
"""Longest that one run may take; it is then killed, and the fault counts as not recovered."""
STEPS = 4
SETTINGS = (
    "task=none",
    "model.dtype=float32",
    "data.prompts_per_step=4",
    f"steps={STEPS}",
    "actor.rollout.engine=transformers",
    "actor.rollout.max_response_tokens=8",
    "placement.pools.main.slots=2",
    "reward.function=rlhf_dist.rewards:share_of_digits",
    "output.checkpoint_every=1",
    "output.keep_checkpoints=0",
    "output.rollouts_every=1",
    "output.rollout_rows=1000",
    "resume=auto",
)
GENERATE, FORWARD, UPDATE, SYNC = "generate_sequences", "compute_ref_log_prob", "update_actor", "reshard"

TABLE = (
    Fault(kind="kill trainer in generate", action="SIGKILL", op=GENERATE, step=2, says="signal 9"),
    Fault(kind="kill trainer in forward", action="SIGKILL", op=FORWARD, step=2, says="signal 9"),
    Fault(kind="kill trainer in update", action="SIGKILL", op=UPDATE, step=2, says="signal 9"),
    Fault(kind="kill trainer in sync", action="SIGKILL", op=SYNC, step=2, says="signal 9"),
    Fault(kind="kill trainer in save", action="SIGKILL", op=r"actor\.save", step=2, says="signal 9"),
    Fault(kind="kill trainer in start-up", action="SIGKILL", op="host role", says="signal 9"),
    Fault(kind="kill first rank in update", action="SIGKILL", rank=0, op=UPDATE, step=2, says="signal 9"),
    Fault(kind="kill host process", action="SIGKILL", pool="host", rank=0, op="reward", step=2, says="signal 9"),
    Fault(kind="stop trainer in generate", action="SIGSTOP", op=GENERATE, step=2, says="is stopped"),
    Fault(kind="stop trainer in forward", action="SIGSTOP", op=FORWARD, step=2, says="is stopped"),
    Fault(kind="stop trainer in update", action="SIGSTOP", op=UPDATE, step=2, says="is stopped"),
    Fault(kind="stop trainer in sync", action="SIGSTOP", op=SYNC, step=2, says="is stopped"),
    Fault(kind="crash of a trainer", action="SIGSEGV", op=UPDATE, step=2, says="signal 11"),
    Fault(kind="memory limit of a trainer", action="limit:1000000", op=GENERATE, step=2, says="alloc|memory"),
    Fault(kind="kill raylet", action="SIGKILL", pool="raylet", op=UPDATE, step=2, says="raylet.*signal 9"),
    Fault(kind="kill Ray's head", action="SIGKILL", pool="gcs", op=UPDATE, step=2, says="head.*signal 9"),
    Fault(kind="kill driver", action="SIGKILL", pool="driver", op=UPDATE, step=2, says=""),
    Fault(kind="notice to driver", action="SIGTERM", pool="driver", op=UPDATE, step=2, says="preempted"),
    Fault(kind="full disk", action="file:40000", op=UPDATE, step=1, says="File too large|space"),
    Fault(kind="cut network of a node", action="cut", op=UPDATE, step=2, nodes=2, says="node .* does not answer|gone"),
    Fault(kind="kill of a node", action="power off", op=UPDATE, step=2, nodes=2, says="node .* does not answer|gone"),
    Fault(kind="corrupted checkpoint", action="SIGKILL", op=UPDATE, step=3, corrupts=True, says="signal 9"),
)
"""Operations are those of GRPO: nodes of the graph, `host role` at the start."""


@dataclass(kw_only=True)
class Outcome:
    """What came of one fault."""

    fault: Fault
    happened: bool = False
    """The moment that it waited for came."""
    notice_s: float | None = None
    """From the fault to the end of the run that it hit, or to its recovery."""
    recovery_s: float | None = None
    """From the fault to the run's end, a second launch included, beyond what the undisturbed run took from there."""
    how: str = ""
    """`itself`, `resumed`; empty: not at all."""
    said: str = ""
    named: bool = False
    """The message says what died, and how."""
    identical: bool = False
    rows_lost: int = 0
    rows_doubled: int = 0
    left: list[str] = field(default_factory=list)


def main() -> int:
    """Run the table, or random faults of it; 0 where every fault was recovered from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="kinds of faults that contain one of these words, e.g. kill,stop")
    parser.add_argument("--random", type=float, metavar="SECONDS", help="random faults of the table for so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FOLDER", help="keep the runs there")
    parsed = parser.parse_args()
    words = parsed.only.split(",") if parsed.only else [""]
    table = [fault for fault in TABLE if any(word in fault.kind for word in words)]
    if (why_not := refusal()) is not None:
        table = [fault for fault in table if fault.nodes == 1]
        print(f"no faults of nodes: {why_not}")
    place = Path(tempfile.mkdtemp(prefix="chaos-")) if parsed.keep is None else Path(parsed.keep).absolute()
    place.mkdir(parents=True, exist_ok=True)
    try:
        outcomes = list(Chaos(place).run(table, parsed.random, parsed.seed))
    finally:
        if parsed.keep is None:
            shutil.rmtree(place, ignore_errors=True)
    report = summary(outcomes)
    print(json.dumps(report))
    ok = report["recovered"] == len(outcomes) == report["identical"] and not report["left_behind"]
    return 0 if ok and not report["rows_lost"] and not report["rows_doubled"] else 1


class Chaos:
    """Runs faults in a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place
        model, data = place / "model", place / "sums.jsonl"
        if not model.exists():
            save_llama(model, hidden=128)
        sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
        data.write_text("\n".join(map(json.dumps, sums)))
        self.settings = [f"model.path={model}", f"data.train.path={data}", f"output.root={place / 'runs'}", *SETTINGS]

    def run(self, table: Sequence[Fault], seconds: float | None, seed: int) -> Iterator[Outcome]:
        """The outcome of each fault, as it is there; a line of each is printed."""
        if not weights(self.place / "runs/twin"):  # kept by an earlier call
            twin, said, _ = self.launch("twin", None)
            if twin != 0:
                raise RuntimeError(f"the undisturbed run failed, code {twin}: {said[-500:]}")
        for number, fault in enumerate(table if seconds is None else _random(table, seconds, seed)):
            outcome = self.one(f"fault-{number}-{secrets.token_hex(2)}", fault)
            print(line_of(outcome), flush=True)
            yield outcome

    def one(self, name: str, fault: Fault) -> Outcome:
        """Run with a fault, launch again where that ended the run, and compare."""
        outcome = Outcome(fault=fault)
        code, said, left = self.launch(name, fault, fault.nodes)
        events = self.events(name)
        outcome.said = next(
            (text for text in reversed(said.splitlines()) if text.startswith(("error", "preempted"))), ""
        )
        outcome.left = left
        outcome.happened = "fault" in events
        ended = events.get("said") if code == 0 else events.get("ends", events.get("gone"))
        if outcome.happened and ended is not None:
            outcome.notice_s = round(ended - events["fault"], 1)
        outcome.named = not fault.says or re.search(fault.says, said, re.IGNORECASE) is not None
        outcome.how = "itself" if code == 0 else ""
        if code not in (0, None):
            if fault.corrupts:
                corrupt_newest(self.place / "runs" / name)
            again, said, left = self.launch(name, None, fault.nodes)
            outcome.left += left
            outcome.how = "resumed" if again == 0 else ""
            outcome.said += "" if again == 0 else f" | again: {said.strip().splitlines()[-1] if said.strip() else ''}"
        if outcome.how and outcome.happened:
            outcome.recovery_s = round(time.time() - events["fault"], 1)
            self.compare(name, outcome)
        return outcome

    def launch(self, name: str, fault: Fault | None, nodes: int = 1) -> tuple[int | None, str, list[str]]:
        """A run: its exit code (None: it did not end and was killed), what it printed, and what it left behind."""
        mark, spec = secrets.token_hex(8), self.place / f"{name}.json"
        events, output = self.place / f"{name}.events", self.place / f"{name}.out"
        arguments = ["run", "grpo", *self.settings, f"name={name}", *(PLACED if nodes > 1 else ())]
        spec.write_text(
            json.dumps(
                {"arguments": arguments, "events": str(events), "fault": None if fault is None else asdict(fault)}
            )
        )
        if nodes > 1:
            code, said = launch_on_machines(spec, events, output, "" if fault is None else fault.action)
            return code, said, []  # what is left of a machine ends with it
        own = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))  # short: Ray's sockets are below it
        (own / "tmp").mkdir()
        (own / "shm").mkdir()
        environment = {**os.environ, MARK: mark, "TMPDIR": str(own / "tmp"), "RAY_TMPDIR": str(own / "ray")}
        environment["RAY_raylet_start_wait_time_s"] = "120"
        with output.open("a") as printed:
            began = printed.tell()
            process = subprocess.Popen(
                [*alone(own), sys.executable, "-m", "benchmarks.chaos_run", str(spec)],
                stdout=printed,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                code = None
            except BaseException:
                end_marked(mark)
                raise
        with events.open("a") as file:
            file.write(json.dumps({"event": "gone", "at": time.time()}) + "\n")
        left = left_behind(mark, own)
        end_marked(mark)
        shutil.rmtree(own, ignore_errors=True)
        return code, output.read_text()[began:], left

    def events(self, name: str) -> dict[str, float]:
        """What happened -> when, of the first launch; `said`: the first note after the fault."""
        found: dict[str, float] = {}
        for text in (self.place / f"{name}.events").read_text().splitlines():
            event = json.loads(text)
            what = "said" if event["event"] == "note" and "fault" in found else event["event"]
            found.setdefault(what, event["at"])
            if event["event"] == "gone":
                break
        return found

    def compare(self, name: str, outcome: Outcome) -> None:
        """Weights and rows against the undisturbed run."""
        mine, twin = self.place / "runs" / name, self.place / "runs/twin"
        outcome.identical = weights(mine) == weights(twin) and bool(weights(twin))
        steps = [row["step"] for row in read_metrics(mine)]
        outcome.rows_doubled = sum(count - 1 for count in Counter(steps).values())
        for step in range(STEPS):
            have, want = rows(mine, step), rows(twin, step)
            outcome.rows_lost += sum((want - have).values())
            outcome.rows_doubled += sum((have - want).values())


def _random(table: Sequence[Fault], seconds: float, seed: int) -> Iterator[Fault]:
    chosen, until = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < until:
        fault = chosen.choice(table)
        yield Fault(**{**asdict(fault), "step": min(fault.step, chosen.randrange(1, STEPS)) if fault.step else 0})


def line_of(outcome: Outcome) -> str:
    """One fault for people."""
    how = outcome.how or ("not recovered" if outcome.happened else "did not happen")
    same = "identical" if outcome.identical else "NOT identical"
    notice = "-" if outcome.notice_s is None else f"{outcome.notice_s:g} s"
    named = "" if outcome.named else "; NOT NAMED"
    left = f"; left behind: {', '.join(outcome.left)}" if outcome.left else ""
    lost = f", {outcome.rows_lost} rows lost, {outcome.rows_doubled} doubled"
    return f"{outcome.fault.kind:28} {how:13} noticed in {notice}; {same}{lost}{named}{left}\n    {outcome.said[:300]}"


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The JSON line."""
    notices = [one.notice_s for one in outcomes if one.notice_s is not None]
    recoveries = [one.recovery_s for one in outcomes if one.recovery_s is not None]
    return {
        "faults": dict(Counter(one.fault.kind for one in outcomes)),
        "recovered": sum(bool(one.how) and one.happened for one in outcomes),
        "by_itself": sum(one.how == "itself" and one.happened for one in outcomes),
        "identical": sum(one.identical for one in outcomes),
        "named": sum(one.named for one in outcomes),
        "median_notice_s": median(notices) if notices else None,
        "worst_notice_s": max(notices, default=None),
        "median_recovery_s": median(recoveries) if recoveries else None,
        "worst_recovery_s": max(recoveries, default=None),
        "rows_lost": sum(one.rows_lost for one in outcomes),
        "rows_doubled": sum(one.rows_doubled for one in outcomes),
        "left_behind": sum(len(one.left) for one in outcomes),
    }


if __name__ == "__main__":
    sys.exit(main())
