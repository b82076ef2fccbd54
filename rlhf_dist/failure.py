"""What the controller is told when an op has no reply: plain text and places, so that nothing needs unpickling."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MOST_TEXT = 4000
"""Characters of an error's own text; some carry a whole compiler's output. The worker's log has all of it."""


class FailureKind(StrEnum):
    """What kind of failure it is, which says whether trying again can help. Said once, where it is raised: by an
    exception's `failure_kind`, or by what the worker knows of a library's exception."""

    INFRASTRUCTURE = "infrastructure"
    """A process, node or connection: the step is replayed."""
    DATA = "data"
    """A row that cannot be what the data says it is: it would be so again."""
    CODE = "code"
    """A reward, recipe, loss or library raised: it would do so again."""
    OUT_OF_MEMORY = "out of memory"
    """The rows that a role took at once do not fit: fewer may."""
    NUMERICS = "numerics"
    """Not finite, or not what it must be: it would be so again."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A place in a traceback; whoever shows it reads the line itself from the file."""

    file: str
    line: int
    function: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no reply of a rank."""

    lost: bool
    """The process died or does not answer; False: the op raised."""
    text: str
    frames: tuple[Frame, ...] = ()
    """Of the user's own files, outermost first."""
    of_peer: bool = False
    """It says that another rank is gone or does not come, so the cause is to be looked for there."""
    at_s: float = 0.0
    """When it was raised, in seconds since the epoch by its node's clock; 0 where that is not known."""

    kind: FailureKind = FailureKind.CODE
    """Of a process that is lost: infrastructure, whatever it says here."""

    def __post_init__(self) -> None:
        if self.lost:
            object.__setattr__(self, "kind", FailureKind.INFRASTRUCTURE)

    @property
    def secondary(self) -> bool:
        """Whether something else may have come first: another process's end, or this one's."""
        return self.lost or self.of_peer


def text_of(error: BaseException) -> str:
    """`KeyError: 'nope'`, whatever the exception's own methods do."""
    try:
        text = ": ".join(part for part in (type(error).__name__, str(error)) if part)
        text = "\n".join([text, *map(str, getattr(error, "__notes__", ()))])
    except Exception as broken:  # a user's __str__ may raise anything
        text = f"{type(error).__name__} (its text cannot be made: {type(broken).__name__})"
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."


def failure_of_call(error: Exception) -> Failure:
    """What an error of Ray says about a remote call: the call raised (before its method could catch it), what it
    raised cannot be unpickled here, the process could not be made, or it is gone.

    Told apart by attribute and name: this package knows nothing of Ray.
    """
    cause = getattr(error, "cause", None)
    name = type(error).__name__
    in_text = name == "UnserializableException" or "isn't serializable" in str(cause)
    if in_text or "raised in its creation task" in str(error):
        # Ray's text ends with the traceback, whose last line is the exception's own.
        return Failure(lost=False, text=str(cause or error).strip().splitlines()[-1])
    if cause is not None:
        return Failure(lost=False, text=text_of(cause))
    return Failure(lost=True, text=f"its process died or stopped answering ({name})")
