"""What a loss may ask of a model: names, functions over the vocabulary, and heads of the user's own.

    log_probs, entropy     [T]       of the response tokens                             language models
    values                 [T]       the value head before each response token          value models
    scores                 [B]       the value head at the last token of each row       value models
    hidden                 [T, H]    the states that response tokens are predicted from
    heads.NAME             [T] [B]   a head of the role's own (`Head`), [., K] with K outputs
    log_probs_at.COLUMN    [T, k]    log pi of the token ids in COLUMN [T, k], and of all others  language models
    OverVocabulary         [T]       a function of whole distributions, a chunk at a time        language models

Only names and numbers are here: no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

PLAIN = ("log_probs", "entropy", "values", "scores", "hidden")
"""Outputs without an argument."""
WITH_ARGUMENT = ("heads", "log_probs_at")
"""Kinds of output that are written `kind.argument`."""
OF_LANGUAGE_MODELS = ("log_probs", "entropy", "hidden", "log_probs_at", "over_vocabulary")
OF_VALUE_MODELS = ("values", "scores", "hidden")
"""Kinds that a role's model gives besides its heads."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear head (no bias) on a role's trunk, trained with it; a role's class lists them: `heads = (Head(...),)`."""

    name: str
    outputs: int = 1
    """K numbers; with 1 the output has no dim for them."""
    at: Literal["token", "last_token"] = "token"
    """One answer before each response token [T, K], or one at the last token of each row [B, K]."""
    scale: float = 0.0
    """Standard deviation of the weights at the start; 0: the head says 0 until it is trained."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a head's name must be a Python name, got {self.name!r}")
        if self.outputs < 1 or self.scale < 0:
            raise ValueError(f"head {self.name} needs outputs >= 1 and scale >= 0, got {self.outputs} and {self.scale}")
        if self.at not in ("token", "last_token"):
            raise ValueError(f"head {self.name} answers at 'token' or 'last_token', got at={self.at!r}")


@dataclass(frozen=True, kw_only=True)
class OverVocabulary:
    """`model.over_vocabulary[name]`: what `function` makes of the distribution before each response token.

        function(log_p [t, V], teacher_log_p [t, V] if there is a teacher, each of `reads` [t, ...]) -> [t] or [t, K]

    It sees one chunk of tokens at a time (`engine.logit_chunk_tokens`), in float32, and runs again in the backward
    pass: logits of a whole batch are never there. It is differentiable in log_p.
    """

    name: str
    function: Callable[..., Any]
    reads: tuple[str, ...] = ()
    """Columns with one entry a response token."""
    teacher: str | None = None
    """A role with a frozen language model: its head is read from its folder by every rank of this role."""
    hidden: str = "hidden"
    """Column with the teacher's last states [T, H], as its `compute_hidden` writes it; only with a teacher."""


Output = str | OverVocabulary


def key_of(output: Output) -> str:
    """What an output is called where all of them have a name."""
    return f"over_vocabulary.{output.name}" if isinstance(output, OverVocabulary) else output


def kind_of(output: Output) -> str:
    """`heads` of `heads.quality`; the output itself where it has no argument."""
    return key_of(output).partition(".")[0]


def argument_of(output: Output) -> str:
    """`quality` of `heads.quality`; empty where it has none."""
    return key_of(output).partition(".")[2]


def known(output: Any) -> bool:
    """Whether it is an output at all, whoever may give it."""
    if isinstance(output, OverVocabulary):
        return True
    if not isinstance(output, str):
        return False
    return output in PLAIN or (kind_of(output) in WITH_ARGUMENT and bool(argument_of(output)))


def columns_for(outputs: Iterable[Output]) -> tuple[str, ...]:
    """Columns that the model needs to give these."""
    found: dict[str, None] = {}
    for output in outputs:
        if isinstance(output, OverVocabulary):
            found |= dict.fromkeys((*output.reads, *((output.hidden,) if output.teacher else ())))
        elif kind_of(output) == "log_probs_at":
            found[argument_of(output)] = None
    return tuple(found)


def described(kinds: Iterable[str], heads: Iterable[Head]) -> str:
    """Kinds of output and heads, for messages."""
    written = {"log_probs_at": "log_probs_at.COLUMN", "over_vocabulary": "OverVocabulary(...)"}
    return ", ".join([*(written.get(kind, kind) for kind in kinds), *(f"heads.{head.name}" for head in heads)])
