"""Mathematical equality of the response's final answer and the given one, by the library math-verify."""

from __future__ import annotations

import threading

TIMEOUT_S = 3
"""Longest that parsing, and comparing, may take each; some expressions would take for ever to simplify."""


def math_verify(prompt: str, response: str, answer: str) -> dict[str, float]:
    """reward 1.0 if math-verify finds the two equal, else 0.0; timed_out 1.0 if it ran out of time (reward 0.0).

    The answer is LaTeX or a plain expression. Raises ValueError if nothing mathematical is found in the
    answer, RuntimeError outside a process's main thread (the library's time limit is a signal there).
    """
    import math_verify as library
    from math_verify.errors import TimeoutException

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math_verify must run in the main thread of its process: its time limit is a signal")
    gold = library.parse(answer, parsing_timeout=TIMEOUT_S) or library.parse(f"${answer}$", parsing_timeout=TIMEOUT_S)
    if not gold:
        raise ValueError(f"math-verify finds no mathematical expression in the answer {answer!r}")
    try:
        parsed = library.parse(response, parsing_timeout=TIMEOUT_S, raise_on_error=True)
        equal = library.verify(gold, parsed, timeout_seconds=TIMEOUT_S, raise_on_error=True)
    except TimeoutException:
        return {"reward": 0.0, "timed_out": 1.0}
    except Exception:
        # A response that the library cannot read is a wrong response, not a failure of ours.
        equal = False
    return {"reward": float(equal), "timed_out": 0.0}
