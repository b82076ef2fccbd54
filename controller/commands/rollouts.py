"""`rlhf-dist rollouts RUN`: what a run's policies wrote, episodes turn by turn. Loads no torch, ray or vllm.

runs/NAME/rollouts/step_000003.parquet       rows that trained (every output.rollouts_every steps)
runs/NAME/episodes/lost_actor_rank_0.jsonl   episodes that were lost, with tracebacks (--lost)
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from controller.commands.registry import Commands
from rlhf_dist.typed import ConfigError

MARGIN = 46
"""Columns in front of a text."""
STYLES = {"prompt": "cyan", "model": "bold green", "environment": "yellow"}


def register(commands: Commands) -> None:
    """`rollouts`."""
    rollouts = commands.add(
        "rollouts", rollouts_command, "page through what a run's policies wrote, episodes turn by turn",
        "rollouts runs/ppo --step 10", "rollouts runs/tool_grpo --lost",
    )  # fmt: skip
    rollouts.add_argument("run", metavar="RUN", help="the run's folder, e.g. runs/tool_grpo")
    rollouts.add_argument("--step", type=int, metavar="S", help="the step (the last one that was kept)")
    rollouts.add_argument("--rows", type=int, metavar="N", help="rows to show (all)")
    rollouts.add_argument("--outcome", metavar="NAME", help="only episodes that ended so, e.g. length")
    rollouts.add_argument("--lost", action="store_true", help="episodes that were lost, with why, instead")


def rollouts_command(arguments: argparse.Namespace) -> int:
    """Print the rows, in a pager where somebody looks on. Raises ConfigError for a run or step that has none."""
    from rich.console import Console

    folder = Path(arguments.run)
    if not folder.is_dir():
        raise ConfigError(f"{folder} must be the folder of a run; there is no such folder")
    if arguments.rows is not None and arguments.rows < 1:
        raise ConfigError(f"--rows must be at least 1, got {arguments.rows}")
    lines = lost_lines(folder, arguments.step) if arguments.lost else kept_lines(folder, arguments.step)
    chosen = [row for row in lines if arguments.outcome in (None, row.outcome)]
    if not chosen:
        raise ConfigError(f"no episodes with outcome {arguments.outcome!r}; there are {_outcomes(lines)}")
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        _print(console, chosen[: arguments.rows])
        return 0
    with console.pager(styles=True):
        _print(console, chosen[: arguments.rows])
    return 0


class Shown:
    """One row as it is shown."""

    def __init__(self, title: str, outcome: str, pieces: Sequence[Mapping[str, Any]], below: str = "") -> None:
        self.title, self.outcome, self.pieces, self.below = title, outcome, pieces, below


def kept_lines(folder: Path, step: int | None) -> list[Shown]:
    """Rows that were kept of a step, None for the last."""
    from rlhf_dist.batch import Batch

    files = {int(file.stem.split("_")[1]): file for file in sorted((folder / "rollouts").glob("step_*.parquet"))}
    if not files:
        raise ConfigError(
            f"{folder}/rollouts has no rows; a run keeps some every output.rollouts_every steps, one line by line none"
        )
    at = max(files) if step is None else step
    if at not in files:
        raise ConfigError(
            f"no rows of step {at} were kept in {folder}/rollouts; those of step {_ranges(sorted(files))} were"
        )
    batch = Batch.read_parquet(files[at])
    rows = [batch.row(row) for row in range(batch.num_rows)]
    return [_kept(at, number, len(rows), row) for number, row in enumerate(rows, start=1)]


def lost_lines(folder: Path, step: int | None) -> list[Shown]:
    """Episodes that were lost, at one step or all."""
    found = []
    for entry in _lost(folder):
        if step in (None, entry["step"]):
            place = f"step {entry['step']}, group {entry['group_id']}, copy {entry['copy']}"
            tries = f", {entry['attempts']} attempts" if entry["attempts"] > 1 else ""
            title = f"{place}: {entry['outcome']} in turn {entry['turn']}{tries}: {entry['detail']}"
            found.append(Shown(title, entry["outcome"], entry["transcript"], entry["traceback"]))
    if not found:
        raise ConfigError(f"no lost episodes in {folder}/episodes{'' if step is None else f' at step {step}'}")
    return found


def _lost(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((folder / "episodes").glob("lost_*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _kept(step: int, number: int, rows: int, row: Mapping[str, Any]) -> Shown:
    outcome = row.get("outcome") or ("finished" if row.get("finished", 1) else "length")
    reward = f", reward {row['rewards']:g}" if "rewards" in row else ""
    turns = f", {row['turns']} turns" if "turns" in row else ""
    branch = f", branch {row['branch']}" if row.get("branch") else ""
    title = f"step {step}, row {number} of {rows}: group {row.get('group_id', '?')}{branch}, {outcome}{turns}{reward}"
    return Shown(title, outcome, json.loads(row["transcript"]) if "transcript" in row else _flat(row))


def _flat(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of one turn."""
    versions = row.get("policy_version", [])
    response = {"who": "model", "text": row.get("raw_response", row.get("response", "")), "trains": True, "turn": 0}
    if len(versions):
        response |= {"version": int(versions[0]), "tokens": len(versions)}
    return [{"who": "prompt", "text": row.get("prompt", ""), "trains": False}, response]


def _print(console: Any, rows: Sequence[Shown]) -> None:
    from rich.text import Text

    for row in rows:
        console.print(row.title, style="bold", markup=False)
        for piece in row.pieces:
            for number, line in enumerate(_visible(str(piece["text"])).split("\n")):
                head = _head(piece) if number == 0 else ""
                console.print(Text(f"{head:<{MARGIN}}").append(line, STYLES[piece["who"]]))
        if row.below:
            console.print(row.below, markup=False)
        console.print()


def _head(piece: Mapping[str, Any]) -> str:
    said = [f"  {piece['who']}"]
    if "turn" in piece:
        said.append(f"turn {piece['turn']}")
    if "tokens" in piece:
        said.append(f"{piece['tokens']} tokens" + ("" if piece["trains"] else ", masked"))
    if "version" in piece:
        said.append(f"v{piece['version']}")
    if piece.get("reward") is not None:
        said.append(f"reward {piece['reward']:g}")
    return " ".join(said[:1]) + (" " + ", ".join(said[1:]) if said[1:] else "")


def _visible(text: str) -> str:
    """Control characters as escapes, so that they cannot move the cursor."""
    return re.sub(r"[^\n]", lambda one: one[0] if one[0].isprintable() else repr(one[0])[1:-1], text)


def _outcomes(rows: Sequence[Shown]) -> str:
    names = [row.outcome for row in rows]
    return ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))


def _ranges(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:8]))
    return f"{shown}, ... {steps[-1]}" if len(steps) > 8 else shown
