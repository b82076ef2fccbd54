"""What a policy or value loss is averaged over: the weighting of long and short responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rlhf_dist.algorithms.contract import Rows

if TYPE_CHECKING:
    from torch import Tensor

TokenAverage = Literal["tokens", "rows", "rows_with_tokens", "groups"]
TOKEN_AVERAGES: tuple[str, ...] = ("tokens", "rows", "rows_with_tokens", "groups")


def averaged(per_token: Tensor, rows: Rows, average: TokenAverage, row_divisor: float) -> Tensor:
    """A per-token loss [T] in the shape its average asks for, still unreduced.

    tokens                  [T] as it is: every token of the batch weighs the same (what implementations of DAPO do)
    rows                    [B] mean over the row's tokens (GRPO, arXiv 2402.03300, eq. 3)
    rows_with_tokens        [B] the same; rows without a counted token are left out of the count, too
    groups                  [G] mean over the tokens of the group: every prompt weighs the same (DAPO, arXiv 2503.14476,
                            eq. 12 as it is printed, its sum over one prompt's responses inside the expectation)
    rows, row_divisor = c   [B] sum over the row's tokens / c, the same c for all rows (Dr. GRPO, arXiv 2503.20783);
                            c = 1 is the log-prob of the whole response, as in REINFORCE over sequences
    """
    if average == "tokens":
        return per_token
    if average == "groups":
        tokens = rows.sum_groups(rows.sum_tokens(rows.mask))
        return rows.sum_groups(rows.sum_tokens(per_token)) / tokens.clamp(min=1)
    return rows.sum_tokens(per_token) / row_divisor if row_divisor else rows.mean_tokens(per_token)


def check_average(average: str, row_divisor: float = 0.0) -> None:
    """Raises ValueError for an average that is not known, or a divisor that it would not use."""
    if average not in TOKEN_AVERAGES:
        raise ValueError(f"average must be one of {', '.join(TOKEN_AVERAGES)}, got {average!r}")
    if row_divisor < 0 or (row_divisor and average not in ("rows", "rows_with_tokens")):
        raise ValueError(
            f"row_divisor must be > 0 with an average over rows, else 0; got {row_divisor} with {average!r}"
        )
