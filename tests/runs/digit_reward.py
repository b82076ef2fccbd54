"""Rewards for the tests: graded, so that even a random model's groups differ."""

from __future__ import annotations


def digits(prompt: str, response: str, answer: str) -> float:
    """Share of characters that are digits; 0 for an empty response."""
    return sum(character.isdigit() for character in response) / max(len(response), 1)


def letters(prompt: str, response: str, answer: str) -> float:
    """Share of characters that are letters."""
    return sum(character.isalpha() for character in response) / max(len(response), 1)
