"""The HTML file: one skeleton, one chart library, our scripts, and blocks of compressed data. Nothing comes from
elsewhere, and the page's policy forbids it.

Everything that comes from a run (texts of models, data, settings, names) is JSON, compressed, in base64: no character
of it can end a script or begin a tag. The scripts put it on the screen as text nodes only. Scripts run by their hashes,
so that even a text that became HTML would not run.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from controller.report.compare import final_numbers, settings_that_differ
from controller.report.payload import run_payload
from controller.report.rollouts import BUDGET_BYTES, blocks, list_rollouts
from controller.report.run_files import RunFiles, read_run

SCRIPTS = ("dom.js", "load.js", "charts.js", "graph.js", "overview.js", "step.js", "rollouts.js", "main.js")


def write_report(folders: Sequence[Path], target: Path, budget: int = BUDGET_BYTES) -> None:
    """Write the page of one run, or of several over each other, in one atomic step.

    budget: bytes of rollouts of all runs, before compression. Raises ConfigError for what is no run.
    """
    runs = [read_run(folder) for folder in folders]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(page(runs, _blocks(runs, budget // len(runs))))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def page(runs: Sequence[RunFiles], found: Iterable[tuple[str, bytes]], *, live: bool = False) -> Iterator[str]:
    """The page's text, in pieces. found: blocks by name, each of them gzip; live: the page asks for them instead."""
    from jinja2 import Environment

    folder = files("controller.report") / "page"
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    library = plotly()
    template = Environment(autoescape=True).from_string((folder / "page.html").read_text(encoding="utf-8"))
    yield from template.generate(
        title=", ".join(run.name for run in runs),
        mode="live" if live else "file",
        policy=_policy((script, library), live=live),
        style=(folder / "style.css").read_text(encoding="utf-8"),
        script=script,
        blocks=((name, base64.b64encode(data).decode()) for name, data in _with_library(found, library)),
    )


def plotly() -> str:
    """The chart library, as its wheel brings it."""
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _with_library(found: Iterable[tuple[str, bytes]], library: str) -> Iterator[tuple[str, bytes]]:
    yield "library", packed_text(library)
    yield from found


def _policy(scripts: Sequence[str], *, live: bool) -> str:
    """Content-Security-Policy: our scripts by their hashes; no other source of anything but the page's own server."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}; base-uri 'none'; form-action 'none'"
    )


def _blocks(runs: Sequence[RunFiles], budget: int) -> Iterator[tuple[str, bytes]]:
    """Rollouts of every run, and last the data that lists them."""
    payloads = []
    for number, run in enumerate(runs):
        listed, unreadable = list_rollouts(run.folder)
        entries = []
        for at, block in enumerate(blocks(listed, budget)):
            yield f"r{number}f{at}", packed(block.columns)
            entries.append({**block.entry, "block": f"r{number}f{at}"})
        payloads.append(run_payload(run, entries, unreadable))
    yield "data", packed(data_of(runs, payloads))


def data_of(runs: Sequence[RunFiles], payloads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page begins with: its runs, and of several what differs."""
    several = len(runs) > 1
    return {
        "runs": list(payloads),
        "differ": settings_that_differ(runs) if several else [],
        "final": final_numbers(runs) if several else [],
    }


def packed(data: Any) -> bytes:
    """Plain data as compressed JSON."""
    return packed_text(json.dumps(data, separators=(",", ":"), allow_nan=False, default=str))


def packed_text(text: str) -> bytes:
    """Text, compressed; the same text gives the same bytes."""
    return gzip.compress(
        text.encode("utf-8", "surrogatepass"), compresslevel=4, mtime=0
    )  # 6 takes twice as long for 5 % less
