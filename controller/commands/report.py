"""`rlhf-dist report`, `compare` and `watch`: one page of a run, of several, of one that goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from controller.commands.registry import Commands


def register(commands: Commands) -> None:
    """`report`, `compare` and `watch`."""
    report = commands.add(
        "report", report_command, "write a run as one HTML page that needs no network",
        "report runs/ppo", "report runs/ppo --output ppo.html --rollouts 20",
    )  # fmt: skip
    report.add_argument("run", metavar="RUN", type=Path, help="the run's folder, e.g. runs/ppo")
    report.add_argument("--output", metavar="FILE", type=Path, help="default: RUN/report.html")
    compare = commands.add(
        "compare", compare_command, "write several runs as one HTML page",
        "compare runs/ppo runs/grpo --output both.html", "compare runs/ppo runs/grpo --format json",
    )  # fmt: skip
    compare.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the runs' folders")
    compare.add_argument(
        "--output", metavar="FILE", type=Path, default=Path("compare.html"), help="default: compare.html"
    )
    compare.add_argument(
        "--format", choices=("html", "json"), default="html", help="json: what differs, and the last numbers, on stdout"
    )
    for parser in (report, compare):
        parser.add_argument(
            "--rollouts", metavar="MEGABYTES", type=float, default=256.0,
            help="most of the rollouts' texts that the page holds, before compression; default: 256",
        )  # fmt: skip
    watch = commands.add(
        "watch", watch_command, "serve the page of a run that goes on, to this machine", "watch runs/ppo --port 8080"
    )
    watch.add_argument("run", metavar="RUN", type=Path, help="the run's folder, e.g. runs/ppo")
    watch.add_argument("--port", type=int, default=0, help="default: a free one")


def report_command(arguments: argparse.Namespace) -> int:
    """Write the page. Raises ConfigError for a folder that is no run, or a page that cannot be written."""
    target = arguments.output or arguments.run / "report.html"
    return _write([arguments.run], target, arguments.rollouts)


def compare_command(arguments: argparse.Namespace) -> int:
    """Write the page of several runs. Raises ConfigError, as `report_command`."""
    if arguments.format == "html":
        return _write(arguments.runs, arguments.output, arguments.rollouts)
    from controller.report.compare import final_numbers, settings_that_differ
    from controller.report.run_files import read_run

    runs = [read_run(folder) for folder in arguments.runs]
    said = {"runs": [str(run.folder) for run in runs], "settings": settings_that_differ(runs)}
    print(json.dumps({**said, "last": final_numbers(runs)}, indent=2))
    return 0


def watch_command(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C. Raises ConfigError for a folder that is no run, or a port that is taken."""
    from controller.report.server import serve

    serve(arguments.run, arguments.port)
    return 0


def _write(runs: list[Path], target: Path, megabytes: float) -> int:
    from controller.report.page import write_report
    from rlhf_dist.typed import ConfigError

    if megabytes < 0:
        raise ConfigError(f"--rollouts must be at least 0 megabytes, got {megabytes:g}")
    try:
        write_report(runs, target, int(megabytes * 1e6))
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror or error}); set --output") from error
    print(target)
    return 0
