"""Scores of reasoning-gym's own verifiers. The answer column holds JSON: {"dataset": name, "entry": {...}}."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def reasoning_gym(prompt: str, response: str, answer: str) -> float:
    """The library's score in [0, 1] for the response's final answer; some data sets give partial credit."""
    row = _row(answer)
    final = final_answer(response, numeric=_is_number(row["entry"].get("answer")))
    return float(_scorer(row["dataset"])(final, row["entry"]))


def reasoning_gym_solved(prompt: str, response: str, answer: str) -> float:
    """1.0 where the library's score is full, else 0.0."""
    return float(reasoning_gym(prompt, response, answer) >= 1.0)


def final_answer(response: str, *, numeric: bool) -> str:
    """What the response gives as its answer.

    The text in its last <answer>...</answer>; without one, the last number where the answer is a number
    (`numeric`), else its last line that is not empty. "" where there is none.
    """
    tagged = _TAGGED.findall(response)
    if tagged:
        return str(tagged[-1]).strip()
    if numeric:
        found = _NUMBER.findall(response)
        return str(found[-1]).replace(",", "").lstrip("+") if found else ""
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def answer_json(dataset: str, entry: dict[str, Any]) -> str:
    """The answer column's text for one entry of a data set. Raises ValueError if JSON cannot hold the entry."""
    try:
        return json.dumps({"dataset": dataset, "entry": entry})
    except (TypeError, ValueError) as error:
        raise ValueError(f"entries of reasoning-gym's {dataset!r} cannot be kept as JSON: {error}") from error


@functools.cache
def _scorer(dataset: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym as library

    scorer: Callable[[str, dict[str, Any]], float] = library.get_score_answer_fn(dataset)
    return scorer


@functools.lru_cache(maxsize=4096)
def _row(answer: str) -> dict[str, Any]:
    try:
        row = json.loads(answer)
        if not (isinstance(row["dataset"], str) and isinstance(row["entry"], dict)):
            raise TypeError("dataset must be a name and entry an object")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'the answer column must hold JSON {{"dataset": ..., "entry": {{...}}}} for the reasoning_gym reward, '
            f"got {answer[:80]!r}; a reasoning-gym generator writes it"
        ) from error
    return dict(row)


def _is_number(text: object) -> bool:
    return isinstance(text, str) and _NUMBER.fullmatch(text.strip()) is not None
