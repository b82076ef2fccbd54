"""A reward to try a recipe with: graded, so that even the responses of an untrained model differ."""

from __future__ import annotations


def share_of_digits(prompt: str, response: str, answer: str) -> float:
    """Share of the response's characters that are digits; 0.0 for an empty one."""
    return sum(character.isdigit() for character in response) / max(len(response), 1)
