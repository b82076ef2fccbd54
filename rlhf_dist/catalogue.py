"""What a recipe is made from: papers, and the settings of the file that each one is.

    PAPERS = {
        "dpo": Paper(title="DPO", year=2023, arxiv="2305.18290", rows=(45,), needs=("PREF", "REF")),
        "ipo": Paper(title="IPO", ..., settings={"algorithm.kind": "ipo", "algorithm.beta": 0.1}),
    }

The entry of the file's own name is the file as it is; any other is a *variant*, launched as `dpo/ipo`: the same graph
under other settings. A family's package has the entries of the files of stages that stand in it. Imports nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

Status = Literal["exact", "outline", "study"]
ROWS = range(1, 206)
"""Numbers of the catalogue of published systems and algorithms that recipes are written from."""
CODES = frozenset(
    "ROLL PREF RM CRIT REF RMT ADV VER SFT EVAL PLACE JUDGE FILT PAIR XLM SNAP AUX TURN MRM SAMP TOK BRANCH MIX SHAPE "
    "HID TREE PAIRJ ALT CO STATE PFX".split()
)
"""What the catalogue calls the capabilities of an engine."""
ARXIV = r"\d\d(0[1-9]|1[0-2])\.\d{4,5}"
"""A preprint's number since 2007: year, month, count."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One published method, and how it is launched here. Raises ValueError for what cannot be."""

    title: str
    """What the field calls the method."""
    year: int
    """When it came out: of a preprint the year of its first version, which its number begins with."""
    arxiv: str | None = None
    """Number of the preprint, YYMM.NNNNN; None where there is none, or where we are not sure of it."""
    rows: tuple[int, ...] = ()
    """Numbers of the catalogue; none for a method that it lacks."""
    status: Status = "exact"
    """`exact`: the formula is the paper's. `outline`: its shape is, and `assumed` says what is not. `study`: a
    comparison or measurement."""
    needs: tuple[str, ...]
    """Capabilities, by the catalogue's codes."""
    assumed: str = ""
    """What is not from the paper: constants that our source of it lacks, parts that stand for others."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the file, by their keys; those of the command line decide over them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        wrong = [row for row in self.rows if row not in ROWS]
        if wrong:
            raise ValueError(f"{self.title}: rows of the catalogue are {ROWS[0]} to {ROWS[-1]}, got {wrong[0]}")
        if self.arxiv is not None:
            self._check_number(self.arxiv)
        strange = sorted(set(self.needs) - CODES)
        if strange or not self.needs:
            raise ValueError(f"{self.title}: needs= has at least one of {', '.join(sorted(CODES))}, got {self.needs}")
        if self.status not in get_args(Status):
            raise ValueError(f"{self.title}: status is one of {', '.join(get_args(Status))}, got {self.status!r}")
        if self.status == "outline" and not self.assumed:
            raise ValueError(f"{self.title}: an outline says in assumed= what is not the paper's")

    def _check_number(self, number: str) -> None:
        if not re.fullmatch(ARXIV, number):
            raise ValueError(f"{self.title}: arxiv= is a number like 2402.03300, without a version, got {number!r}")
        first = 2000 + int(number[:2])
        if self.year != first:
            raise ValueError(f"{self.title}: year= is the preprint's, {first} for {number}, got {self.year}")


def papers_of(module: Any) -> Mapping[str, Paper]:
    """What a recipe's module declares; nothing where it is silent. Raises ValueError for anything but papers."""
    found = getattr(module, "PAPERS", {})
    if not isinstance(found, Mapping) or not all(isinstance(one, Paper) for one in found.values()):
        raise ValueError(f"{getattr(module, '__name__', module)}: PAPERS maps names to Paper(...)")
    return found
