"""What a person sees of a run: a live table on a terminal, one line a step elsewhere; start-up phases before.

   4.2 s  actor: generation engine vllm
demo  step 12/100  ━━━━━╺━━━━━━━━━━━━━━━  0:00:41 left
  reward           0.41   first 0.12   ▁▂▂▃▅▅▆
  kl               0.02   first 0.00   ▁▁▂▂▃▃▃
  time             actor.update_actor ███████ 52 %   actor.generate_sequences ███ 24 %  ...
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

KEY_METRICS: tuple[tuple[str, str], ...] = (
    ("reward", r"(^|/)(reward|rewards)(/mean)?$"),
    ("cost", r"(^|/)(cost|costs)(/mean)?$"),
    ("accuracy", r"(^|/)(accuracy|heldout[^/]*)$"),
    ("kl", r"(^|/)(ref_kl|old_kl|kl)(/mean)?$"),
    ("response tokens", r"(^|/)response_(length|tokens)(/mean)?$"),
    ("tokens/s", r"(^|/)tokens_per_s$"),
    ("loss", r"(^|/)loss(/mean)?$"),
    ("grad norm", r"(^|/)grad_norm(/mean)?$"),
    ("entropy", r"(^|/)entropy(/mean)?$"),
)
"""What people look at first: label and the metrics' names it stands for."""

BARS = "▁▂▃▄▅▆▇█"
HISTORY = 24


class Display:
    """Progress of a run; a context manager. Never raises for a metric it does not know."""

    def __init__(
        self,
        run_name: str,
        total_steps: int,
        *,
        quiet: bool = False,
        lines: bool = False,
        console: Console | None = None,
    ) -> None:
        """lines: a line a step on a terminal too, which leaves it to whoever asks at a prompt there."""
        self._name, self._total, self._quiet, self._lines = run_name, total_steps, quiet, lines
        self._console = console or Console()
        self._live: Live | None = None
        self._history: dict[str, list[float]] = {}
        self._seconds: dict[str, float] = {}
        self._done = 0
        self._ended_s: list[float] = []
        """When each step was done; time left is told from the pace between them."""
        self._phase = ("", time.monotonic())
        self._started_s = time.monotonic()

    @property
    def live(self) -> bool:
        """Whether a table is redrawn in place: on a terminal, and not under CI."""
        return not (self._quiet or self._lines) and self._console.is_terminal and not os.environ.get("CI")

    def __enter__(self) -> Display:
        self._started_s = time.monotonic()
        if self.live:
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def step(self, step: int, metrics: Mapping[str, float], node_seconds: Mapping[str, float]) -> None:
        """Step `step` (from 0) is done: its metrics, and the seconds each node took."""
        self._done = step + 1
        self._ended_s.append(time.monotonic())
        for name, value in metrics.items():
            if math.isfinite(value):
                self._history.setdefault(name, []).append(float(value))
        for name, seconds in node_seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if self._live is None and not self._quiet:
            print(self._line(step, metrics, node_seconds), file=self._console.file, flush=True)

    def phase(self, text: str) -> None:
        """Something of the start-up begins: a line with the seconds since the start, and the table's head until a
        step is done."""
        self._phase = (text, time.monotonic())
        self.note(f"{time.monotonic() - self._started_s:6.1f} s  {text}")

    def note(self, text: str) -> None:
        """A line for people, above the table."""
        if self._live is not None:
            self._live.console.print(Text(text))
        elif not self._quiet:
            print(text, file=self._console.file, flush=True)

    def summary(self, rows: Mapping[str, object]) -> None:
        """The table at the end; shown even when quiet."""
        self._stop()
        table = Table(title=f"{self._name}: summary", title_justify="left", show_header=False, box=None)
        for name, value in rows.items():
            table.add_row(name, _number(value) if isinstance(value, float) else str(value))
        self._console.print(table)

    # --- drawing ---------------------------------------------------------------------------------------
    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, step: int, metrics: Mapping[str, float], node_seconds: Mapping[str, float]) -> str:
        parts = [f"step {step + 1}/{self._total}"]
        parts += [f"{label} {_number(metrics[name])}" for label, name in key_metrics(metrics)]
        parts += [f"{name} {share:.0%}" for name, share in _shares(node_seconds)[:3]]
        return "  ".join([*parts, f"left {_duration(self._left())}"])

    def _table(self) -> Group:
        (phase, since), now = self._phase, time.monotonic()
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self._name, style="bold"),
            f"step {self._done}/{self._total}",
            ProgressBar(total=max(self._total, 1), completed=self._done, width=30),
            Text(f"{_duration(self._left())} left" if self._ended_s else f"{phase} {_duration(now - since)}"),
        )
        metrics = Table.grid(padding=(0, 2))
        # Copies: the table is drawn from a thread of its own, while steps come in.
        history, seconds = dict(self._history), dict(self._seconds)
        for label, name in key_metrics(history):
            past = list(history[name])
            metrics.add_row(
                f"  {label}", Text(_number(past[-1]), style="bold"), f"first {_number(past[0])}", sparkline(past)
            )
        shares = Table.grid(padding=(0, 2))
        for name, share in _shares(seconds):
            bar = ProgressBar(total=1.0, completed=share, width=24)
            shares.add_row(f"  {name}", bar, f"{share:.0%}")
        return Group(head, metrics, shares)

    def _left(self) -> float | None:
        """Seconds to the last step at the pace of the last steps; None before the second is done, since neither
        start-up nor the first step, which warms everything up, is a pace."""
        steps = self._total - self._done
        if len(self._ended_s) < 2:
            return None if steps else 0.0
        ended = self._ended_s[-HISTORY:]
        return (ended[-1] - ended[0]) / (len(ended) - 1) * steps


def sparkline(values: Sequence[float], width: int = HISTORY) -> str:
    """The last `width` values as bars between their least and greatest; flat values are low bars."""
    shown = list(values)[-width:]
    least, span = min(shown, default=0.0), max(shown, default=0.0) - min(shown, default=0.0)
    return "".join(BARS[int((value - least) / span * (len(BARS) - 1)) if span else 0] for value in shown)


def key_metrics(metrics: Mapping[str, object]) -> list[tuple[str, str]]:
    """(label, name) of the metrics worth a row: one for each label, more where roles share it.

    The same numbers under a second name (an advantage op that reports the reward it was given) are one row.
    """
    found: list[tuple[str, str]] = []
    for label, pattern in KEY_METRICS:
        matching = [name for name in metrics if re.search(pattern, name)]
        names = [
            name
            for at, name in enumerate(matching)
            if not any(_last(name) == _last(other) and metrics[name] == metrics[other] for other in matching[:at])
        ]
        found += [(label if len(names) == 1 else name, name) for name in names[:3]]
    return found


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _shares(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Nodes and their share of the time of all nodes, largest first; nodes below 0.5 % are left out."""
    total = sum(seconds.values())
    shares = [(name, value / total) for name, value in seconds.items()] if total > 0 else []
    return sorted((entry for entry in shares if entry[1] >= 0.005), key=lambda entry: -entry[1])[:8]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
