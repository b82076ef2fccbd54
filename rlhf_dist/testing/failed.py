"""How a check fails."""

from __future__ import annotations


class CheckFailed(AssertionError):
    """What does not hold, in one line; an AssertionError, so that test runners count it as a failure."""

    def __init__(self, subject: str, what: str) -> None:
        """subject: the recipe's or loss's name. what: the rule, the value and, where it is known, the remedy."""
        super().__init__(subject, what)
        self.subject = subject
        self.what = " ".join(what.split())

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}"
