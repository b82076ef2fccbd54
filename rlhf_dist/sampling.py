"""How responses are drawn: one frozen record that travels from the recipe to the generation engine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters of one generation call."""

    n: int = 1
    """Responses per prompt."""
    greedy: bool = False
    """Most likely token each time; temperature, top_p and top_k are then not used."""
    temperature: float = 1.0
    """Divides the logits; > 0."""
    top_p: float = 1.0
    """Nucleus; 1 for the whole vocabulary."""
    top_k: int = 0
    """Most likely tokens kept; 0 for all."""
    max_tokens: int = 64
    """A response is cut here."""
    stop: tuple[str, ...] = ()
    """Texts that end a response; the first that is drawn, and what stands behind it, is left out of its text."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n (responses per prompt) must be >= 1, got {self.n}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; use greedy=True for the most likely")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all), got {self.top_k}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop needs texts that are not empty, got {self.stop!r}")


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that is the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
