"""Seconds to write the page of a large run, and to open it in a browser where there is one.

make bench-report            1,000 steps, 100 rollouts each, about 1,000 characters a response (100 MB of text)
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from controller.record.metrics import MetricsWriter
from controller.report.page import write_report
from rlhf_dist.batch import Batch, Column

METRICS = 120


def main() -> None:
    """Make the run, write its page, say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100, help="rollouts a step")
    parser.add_argument("--words", type=int, default=160, help="words a response, of about six characters")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        texts = make_run(run, arguments.steps, arguments.rows, arguments.words)
        started, processor = time.perf_counter(), time.process_time()
        write_report([run], run / "report.html")
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
        size = (run / "report.html").stat().st_size
        count = arguments.steps * arguments.rows
        print(f"{arguments.steps} steps, {count:,} rollouts, {texts / 1e6:.0f} MB of text")
        print(f"written in {seconds:.1f} s ({processor:.1f} s of one core), {size / 1e6:.1f} MB")
        _open(run / "report.html")


def make_run(folder: Path, steps: int, rows: int, words: int) -> int:
    """A run's folder; returns the characters of its responses."""
    random, texts = np.random.default_rng(0), 0
    vocabulary = np.array(
        ["".join(chr(97 + c) for c in random.integers(0, 26, n)) for n in random.integers(2, 9, 5000)]
    )
    with MetricsWriter(folder) as writer:
        (folder / "config.yaml").write_text("name: run\ndata:\n  a: 1\nplacement:\n  a: 1\noutput:\n  a: 1\n")
        for step in range(steps):
            writer.write(step, {f"actor/metric_{k}": float(random.normal()) for k in range(METRICS)})
            said = [" ".join(vocabulary[random.integers(0, 5000, words)]) for _ in range(rows)]
            texts += sum(map(len, said))
            Batch(
                {
                    "prompt": Column.strings([f"question {k // 4 + step * 25 % 2000}" for k in range(rows)]),
                    "response": Column.strings(said),
                    "rewards": Column(random.random(rows).astype(np.float32)),
                    "policy_version": Column.ragged([[step] * words] * rows, dtype=np.int32),
                }
            ).write_parquet(folder / f"rollouts/step_{step:06d}.parquet")
    return texts


def _open(page: Path) -> None:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        print("no Chromium here to open it with")
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab = browser.new_page()
        started = time.perf_counter()
        tab.goto(page.as_uri(), timeout=120_000)
        tab.wait_for_selector("#rows .row", timeout=120_000)
        print(f"opened in {time.perf_counter() - started:.1f} s, up to the last step's rollouts")
        search = tab.get_by_label("search rollouts")
        started = time.perf_counter()
        search.fill("no such text")
        search.press("Enter")
        while " files" not in (said := tab.locator("#rows p.soft").first.inner_text()) or not _whole(said):
            tab.wait_for_timeout(50)
        print(f"searched in {time.perf_counter() - started:.1f} s: {said}")
        browser.close()


def _whole(said: str) -> bool:
    """Whether `... 7 of 9 files` says that it is through."""
    words = said.split(", ")[-1].split()
    return words[0] == words[2]


if __name__ == "__main__":
    main()
