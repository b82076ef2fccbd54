"""`make chaos`: faults of every kind, each against a run that nothing disturbed.

    table of faults ──> run with the fault (chaos_run.py) ──ended by it? ──> a second launch with resume=auto
                              │ events: when the fault was, when the run ended, what it said
                              └──> compared with the undisturbed run: weights to the last bit, rows of every step
                                   and looked for: its processes, shared memory, temporary files

A run that recovers by itself ends with code 0 and needs no second launch; the line of each fault says which it was
(`itself`, `resumed`). Where root allows, every run has a mount namespace with a /dev/shm and a /tmp of its own.

    python -m benchmarks.chaos                       the table
    python -m benchmarks.chaos --only kill,stop      some kinds
    python -m benchmarks.chaos --mode episodes       another kind of run (chaos_modes.py)
    python -m benchmarks.chaos --together 1          a run for each; else those that it recovers from share one
    python -m benchmarks.chaos --random 7 --minutes 60     random faults of the table, until the time is over

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.chaos_machines import PLACED, launch_on_machines
from benchmarks.chaos_modes import MODES, Mode
from benchmarks.chaos_run import Fault
from benchmarks.chaos_traces import MARK, alone, corrupt_newest, end_marked, left_behind, rows, weights
from controller.record.metrics import read_metrics
from rlhf_dist.testing.tiny_model import save_llama
from tests.runs.machines import refusal

ENDS = ("error", "preempted")
"""With which of its lines a run says why it ends."""
ANNOUNCED = "recovery: "
"""With which a run says that it has noticed."""
STARTS_AGAIN = "recovery: starting all processes again"
OUTCOMES = "outcomes.jsonl"
LIMIT_S = 420.0
"""Longest that one run may take (`--limit`); it is then killed, and the fault counts as not recovered."""
STEPS = 4
SETTINGS = (
    "task=none",
    "model.dtype=float32",
    "data.prompts_per_step=4",
    f"steps={STEPS}",
    "actor.rollout.engine=transformers",
    "actor.rollout.max_response_tokens=8",
    "output.checkpoint_every=1",
    "recovery.retries=20",
    "recovery.backoff_s=0.1",
    "output.keep_checkpoints=0",
    "output.rollouts_every=1",
    "output.rollout_rows=1000",
    "resume=auto",
)
RULE = "reward.function=rlhf_dist.rewards:share_of_digits"


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
    """Weights; in a mode that is not exact: bounds were kept."""
    rows_lost: int = 0
    rows_doubled: int = 0
    left: list[str] = field(default_factory=list)


def main() -> int:
    """Run the table, or random faults of it; 0 where every fault was recovered from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="kinds of faults that contain one of these words, e.g. kill,stop")
    parser.add_argument("--mode", choices=MODES, default="sync", help="kind of run (benchmarks/chaos_modes.py)")
    parser.add_argument("--random", type=int, metavar="SEED", help="random faults of the table, for --minutes")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="longest that one run may take")
    parser.add_argument("--keep", metavar="FOLDER", help="keep all there, for a table in several calls")
    parser.add_argument("--together", type=int, default=4, metavar="N", help="faults a run, one after the other")
    parsed = parser.parse_args()
    words = parsed.only.split(",") if parsed.only else [""]
    mode = MODES[parsed.mode]
    table = [fault for fault in mode.table if any(word in fault.kind for word in words)]
    if (why_not := refusal()) is not None:
        table = [fault for fault in table if fault.nodes == 1]
        print(f"no faults of nodes: {why_not}")
    chosen = table if parsed.random is None else _random(table, 60 * parsed.minutes, parsed.random)
    place = Path(tempfile.mkdtemp(prefix="chaos-")) if parsed.keep is None else Path(parsed.keep).absolute()
    try:
        outcomes = list(Chaos(place / parsed.mode, mode, parsed.limit).run(chosen, parsed.together))
    finally:
        if parsed.keep is None:
            shutil.rmtree(place, ignore_errors=True)
    if parsed.keep is not None and parsed.random is None:
        outcomes = kept(place / parsed.mode / OUTCOMES)
    report = summary(outcomes)
    print(json.dumps(report))
    ok = report["recovered"] == len(outcomes) == report["identical"] and not report["left_behind"]
    return 0 if ok and not report["rows_lost"] and not report["rows_doubled"] else 1


class Chaos:
    """Runs faults in a folder."""

    def __init__(self, place: Path, mode: Mode = MODES["sync"], limit_s: float = LIMIT_S) -> None:
        """limit_s: longest that one run may take."""
        self.place, self.mode, self.limit_s = place, mode, limit_s
        place.mkdir(parents=True, exist_ok=True)
        model, data = place / "model", place / "sums.jsonl"
        if not model.exists():
            save_llama(model, hidden=128)
        sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
        data.write_text("\n".join(map(json.dumps, sums)))
        self.settings = [f"model.path={model}", f"data.train.path={data}", f"output.root={place / 'runs'}"]
        self.settings += [*SETTINGS, *mode.settings, *([RULE] if mode.recipe == "grpo" else [])]

    def run(self, faults: Iterable[Fault], together: int = 1) -> Iterator[Outcome]:
        """The outcome of each fault, as it is there; a line of each is printed. together: faults a run has at most."""
        if not weights(self.place / "runs/twin"):  # kept by an earlier call
            twin, said, _ = self.launch("twin", ())
            if twin != 0:
                raise RuntimeError(f"the undisturbed run failed, code {twin}: {said[-500:]}")
        for number, bundle in enumerate(_bundles(faults, together)):
            for outcome in self.some(f"fault-{number}-{secrets.token_hex(2)}", bundle):
                print(line_of(outcome), flush=True)
                with (self.place / OUTCOMES).open("a") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
                yield outcome

    def some(self, name: str, faults: Sequence[Fault]) -> list[Outcome]:
        """Run with faults, one after the other, launch again where one ended the run, and compare."""
        nodes = max(fault.nodes for fault in faults)
        code, said, left = self.launch(name, faults, nodes)
        outcomes = [Outcome(fault=fault) for fault in faults]
        spans = self.spans(name)
        for outcome, span in zip(outcomes, spans, strict=False):
            outcome.happened = True
            _judge(outcome, span, said)
        last = outcomes[max(len(spans) - 1, 0)]
        last.left = left
        if code not in (0, None):
            last.said = next((text for text in reversed(said.splitlines()) if text.startswith(ENDS)), last.said)
            last.how = ""
            if last.fault.corrupts:
                corrupt_newest(self.place / "runs" / name)
            again, said, left = self.launch(name, (), nodes)
            last.left += left
            last.how = "resumed" if again == 0 else ""
            last.said += "" if again == 0 else f" | again: {said.strip().splitlines()[-1] if said.strip() else ''}"
            last.recovery_s = round(time.time() - spans[-1][0]["at"], 1) if spans else None
            code = again
        for outcome in outcomes[: len(spans)] if code == 0 else ():
            outcome.how = outcome.how or "itself"
            self.compare(name, outcome)
        return outcomes

    def launch(self, name: str, faults: Sequence[Fault], nodes: int = 1) -> tuple[int | None, str, list[str]]:
        """A run: its exit code (None: it did not end and was killed), what it printed, and what it left behind."""
        mark, spec = secrets.token_hex(8), self.place / f"{name}.json"
        events, output = self.place / f"{name}.events", self.place / f"{name}.out"
        wanted = [setting for fault in faults for setting in fault.settings]
        placed = PLACED if nodes > 1 else ()
        arguments = ["run", self.mode.recipe, *self.settings, f"name={name}", *placed, *wanted]
        spec.write_text(
            json.dumps({"arguments": arguments, "events": str(events), "faults": [asdict(fault) for fault in faults]})
        )
        if nodes > 1:
            code, said = launch_on_machines(
                spec, events, output, nodes=nodes, action=faults[0].action if faults else "", limit_s=self.limit_s
            )
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
                code: int | None = process.wait(self.limit_s)
            except subprocess.TimeoutExpired:
                code = None
            except BaseException:
                end_marked(mark)
                raise
        with events.open("a") as file:
            file.write(json.dumps({"event": "gone", "at": time.time()}) + "\n")
        left = left_behind(mark, own) if code is not None else [f"the run, after {self.limit_s:g} s"]
        end_marked(mark)
        shutil.rmtree(own, ignore_errors=True)
        return code, output.read_text()[began:], left

    def spans(self, name: str) -> list[list[dict[str, Any]]]:
        """Events of the first launch, from each fault to the next."""
        found: list[list[dict[str, Any]]] = []
        for text in (self.place / f"{name}.events").read_text().splitlines():
            event = json.loads(text)
            if event["event"] == "fault":
                found.append([])
            if found:
                found[-1].append(event)
            if event["event"] == "gone":
                break
        return found

    def compare(self, name: str, outcome: Outcome) -> None:
        """Weights and rows against the undisturbed run; where they cannot be the same, rows are counted, and weights
        are no older than they may be."""
        mine, twin = self.place / "runs" / name, self.place / "runs/twin"
        metrics = list(read_metrics(mine))
        if self.mode.exact:
            outcome.identical = weights(mine) == weights(twin) and bool(weights(twin))
        else:
            outcome.identical = bool(weights(mine)) and all(row["actor/staleness"] <= 1 for row in metrics)
        outcome.rows_doubled = sum(count - 1 for count in Counter(row["step"] for row in metrics).values())
        for step in range(STEPS):
            have, want = rows(mine, step), rows(twin, step)
            if not self.mode.exact:
                have, want = Counter({"": have.total()}), Counter({"": want.total()})
            outcome.rows_lost += sum((want - have).values())
            outcome.rows_doubled += sum((have - want).values())


def _judge(outcome: Outcome, span: Sequence[dict[str, Any]], said: str) -> None:
    """What the run did and said from the fault on. said: all that it printed."""
    began = span[0]["at"]
    notes = [event for event in span if event["event"] == "note"]
    again = next((event for event in notes if STARTS_AGAIN in event["text"]), None)
    recovered = next((event for event in notes if event["text"].startswith("recovered")), None)
    if again is not None:  # what dies before the first step is started again, and that step is its recovery
        recovered = next((event for event in notes if event["text"].endswith("first step")), None)
    ended = next((event for event in span if event["event"] in ("ends", "gone")), None)
    word = next(
        (
            event
            for event in notes
            if event["text"].startswith(("recovered", "preempted")) or ANNOUNCED in event["text"]
        ),
        None,
    )
    noticed = word or ended
    if noticed is not None:
        outcome.notice_s = round(noticed["at"] - began, 1)
    if recovered is not None:
        outcome.said, outcome.recovery_s = (again or recovered)["text"], round(recovered["at"] - began, 1)
    outcome.named = not outcome.fault.says or re.search(outcome.fault.says, outcome.said or said, re.I) is not None


def _bundles(faults: Iterable[Fault], together: int) -> Iterator[list[Fault]]:
    """Up to `together` that a run takes one after the other; those that end it stand alone."""
    bundle: list[Fault] = []
    for fault in faults:
        if fault.alone:
            yield [fault]
            continue
        bundle.append(fault)
        if len(bundle) == together:
            yield bundle
            bundle = []
    if bundle:
        yield bundle


def _random(table: Sequence[Fault], seconds: float, seed: int) -> Iterator[Fault]:
    chosen, until = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < until:
        fault = chosen.choice(table)
        step = min(fault.step, chosen.randrange(1, STEPS))
        yield fault if fault.corrupts else replace(fault, step=step)  # an older checkpoint must be there


def line_of(outcome: Outcome) -> str:
    """One fault for people."""
    how = outcome.how or ("not recovered" if outcome.happened else "did not happen")
    same = "identical" if outcome.identical else "NOT identical"
    notice = "-" if outcome.notice_s is None else f"{outcome.notice_s:g} s"
    named = "" if outcome.named else "; NOT NAMED"
    left = f"; left behind: {', '.join(outcome.left)}" if outcome.left else ""
    lost = f", {outcome.rows_lost} rows lost, {outcome.rows_doubled} doubled"
    return f"{outcome.fault.kind:28} {how:13} noticed in {notice}; {same}{lost}{named}{left}\n    {outcome.said[:300]}"


def kept(file: Path) -> list[Outcome]:
    """The last outcome of each kind of fault."""
    last: dict[str, Outcome] = {}
    for line in file.read_text().splitlines():
        told = json.loads(line)
        outcome = Outcome(**{**told, "fault": Fault(**told["fault"])})
        last[outcome.fault.kind] = outcome
    return list(last.values())


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
