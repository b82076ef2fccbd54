"""Mathematical equality of the response's final answer and the given one, by the library math-verify."""

from __future__ import annotations

import functools
import logging
from typing import Any

from rlhf_dist.rewards.time_limit import OutOfTime, time_limit

TIMEOUT_S = 5.0
"""Longest that reading and comparing one response may take; some expressions would simplify for ever."""


def math_verify(prompt: str, response: str, answer: str) -> dict[str, float]:
    """reward 1.0 if math-verify finds the two equal, else 0.0; timed_out 1.0 if it ran out of time (reward 0.0).

    The answer is LaTeX or a plain expression. Raises ValueError if nothing mathematical is found in the
    answer, RuntimeError outside a process's main thread (the time limit is a signal).
    """
    library = _library()
    gold = _parsed_answer(answer)
    try:
        with time_limit(TIMEOUT_S):
            # timeout 0: its own limit fires once only, and can be lost (see time_limit).
            parsed = library.parse(response, parsing_timeout=0)
            equal = bool(library.verify(gold, parsed, timeout_seconds=0))
    except OutOfTime:
        return {"reward": 0.0, "timed_out": 1.0}
    return {"reward": float(equal), "timed_out": 0.0}


@functools.lru_cache(maxsize=4096)
def _parsed_answer(answer: str) -> list[Any]:
    library = _library()
    try:
        with time_limit(TIMEOUT_S):
            gold = library.parse(answer, parsing_timeout=0) or library.parse(f"${answer}$", parsing_timeout=0)
    except OutOfTime:
        raise ValueError(f"math-verify cannot read the answer {answer!r} within {TIMEOUT_S} s") from None
    if not gold:
        raise ValueError(f"math-verify finds no mathematical expression in the answer {answer!r}")
    return list(gold)


@functools.cache
def _library() -> Any:
    """The library, warm: its first use imports and builds a parser for seconds, which is no row's fault."""
    import math_verify as library

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limit is off
    library.verify(
        library.parse("$\\frac{1}{2}$", parsing_timeout=0), library.parse("0.5", parsing_timeout=0), timeout_seconds=0
    )
    return library
