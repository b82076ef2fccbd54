"""1 where the response is the answer."""

from __future__ import annotations


def exact_match(prompt: str, response: str, answer: str) -> float:
    """1.0 if response and answer are equal without the white space around them, else 0.0."""
    return float(response.strip() == answer.strip())
