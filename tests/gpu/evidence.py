"""Everything marked `gpu`, run on the GPU that is here, as one JSON file: `make gpu-evidence`.

    python -m tests.gpu.evidence [--output gpu-evidence.json] [PATH ...]

The file says what the GPU and the libraries are, and of each test its outcome, its seconds and why it was skipped or
failed. Tests that need vLLM, Ray or DeepSpeed are skipped, by name, where these are not installed. Exit code 1 where
one failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
_LIBRARIES = ("rlhf-dist", "transformers", "vllm", "ray", "deepspeed")
_MOST_TEXT = 500
"""Characters of a reason."""


class Recorder:
    """A pytest plugin: one entry for each test, and for each file that could not be read."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported has failed."""
        if report.failed:
            self.tests[report.nodeid] = {"outcome": "failed", "seconds": 0.0, "reason": _last_line(report.longreprtext)}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Setup, call and teardown of a test, one after the other: what is worst of them counts."""
        entry = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "reason": ""})
        entry["seconds"] = round(entry["seconds"] + report.duration, 3)
        if report.failed:
            entry |= {"outcome": "failed", "reason": _last_line(report.longreprtext)}
        elif report.skipped and entry["outcome"] == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            entry |= {"outcome": "skipped", "reason": str(reason).removeprefix("Skipped: ")}


def machine() -> dict[str, Any]:
    """The GPU, and what runs on it; `device` null where there is none."""
    found: dict[str, Any] = {"device": None, "driver": None, "nccl": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
            "capability": [properties.major, properties.minor],
        }
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        found["driver"] = asked.stdout.split()[0] if asked.stdout else None
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {**found, "torch": torch.__version__, "cuda": torch.version.cuda, "libraries": _installed()}


def _installed() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _last_line(text: str) -> str:
    """What was raised, of a traceback."""
    raised = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (raised[0] if raised else text.strip().splitlines()[-1] if text.strip() else "")[:_MOST_TEXT]


def main(arguments: list[str] | None = None) -> int:
    """Run, write the file and say where it is."""
    parser = argparse.ArgumentParser(description="run everything marked gpu and write what came of it")
    parser.add_argument(
        "paths", metavar="PATH", nargs="*", default=[str(Path(__file__).parent)], help="default: tests/gpu"
    )
    parser.add_argument("--output", default="gpu-evidence.json")
    asked = parser.parse_args(arguments)
    recorder, begun = Recorder(), datetime.now(UTC)
    options = ["-m", "gpu", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    pytest.main([*asked.paths, *options, "--timeout", "600", "--continue-on-collection-errors"], plugins=[recorder])
    counts = Counter(entry["outcome"] for entry in recorder.tests.values())
    evidence = {
        "when": begun.isoformat(timespec="seconds"),
        **machine(),
        "counts": {outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "tests": [{"name": name, **entry} for name, entry in recorder.tests.items()],
    }
    Path(asked.output).write_text(json.dumps(evidence, indent=2) + "\n")
    said = ", ".join(f"{count} {outcome}" for outcome, count in evidence["counts"].items())
    print(f"{said}; wrote {asked.output}")
    return int(counts["failed"] > 0 or not recorder.tests)


if __name__ == "__main__":
    sys.exit(main())
