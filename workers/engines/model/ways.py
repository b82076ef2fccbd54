"""The ways rows can go through a model of the library, from the fastest to the one that is exact by definition.

    shared    one long row, common beginnings once              own attention (attention.py)
    packed    one long row, every row with its prompt           own attention
    grid      [B, L], padded on the right                       the library's attention and masks
    alone     one row a pass, whole logits                      the library's attention; the truth, not for training

Which of them a family is exact under is not listed anywhere: `probe.py` tries them on the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way through a model."""

    rows: Literal["shared", "packed", "grid", "alone"]
    attention: str
    """The library's name of the attention implementation."""
    head: Literal["matrix", "library", "whole"] = "matrix"
    """Logits in chunks, by one matrix (`log_probs.Head`) or by the model's own code; or all at once."""

    @property
    def shares(self) -> bool:
        """What rows of a pass begin with goes through the model once, equal prompts and more (`prefixes.py`)."""
        return self.rows == "shared"

    @property
    def grid(self) -> bool:
        """Rows lie in [B, L]."""
        return self.rows in ("grid", "alone")

    def unshared(self) -> Way:
        """Every row with the whole of its own prompt."""
        return replace(self, rows="packed") if self.shares else self

    def __str__(self) -> str:
        rows = {
            "shared": "packed rows, prompts shared",
            "packed": "packed rows",
            "grid": f"padded rows with the library's {self.attention} attention",
            "alone": f"one row a pass with the library's {self.attention} attention",
        }[self.rows]
        head = {"matrix": "", "library": ", the model's own head in chunks", "whole": ", all logits at once"}[self.head]
        return rows + head


PACKED = Way(rows="packed", attention="packed")
"""What most families are exact under."""
ALONE = Way(rows="alone", attention="eager", head="whole")
"""The library's own forward of a row."""
