"""The keyword settings of an op in a recipe: its own, and `out`, `every` and `after` that all have."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args

from rlhf_dist.algorithms.contract import Average, Loss, loss_name
from rlhf_dist.algorithms.loss import LossFunction
from rlhf_dist.algorithms.outputs import Head, OverVocabulary, argument_of, described, key_of, kind_of, known
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.dataflow.state_value import StateValue, states_read

EVERY_OP = ("out", "every", "after")
"""Settings that all ops have, of which the op itself hears nothing."""
RANDOM = "rng"
"""Not a setting: the random generator that a host op is given."""


def check_known(line: str, op: str, kwargs: Mapping[str, Any]) -> None:
    """Raises GraphError for `out`, `every` or `after` that is a state's number: they shape the graph."""
    for key in EVERY_OP:
        if states_read(kwargs.get(key)):
            raise GraphError(f"{line}: {op} needs {key}= before it runs, got {kwargs[key]}")


def output_names(line: str, out: Any, writes: tuple[str, ...], op: str) -> dict[str, str]:
    """The op's own column name -> the recipe's, from its `out` setting."""
    if out is None:
        return {}
    if isinstance(out, str):
        if len(writes) != 1:
            raise GraphError(f"{line}: {op} writes {', '.join(writes) or 'nothing'}; out= must be a mapping")
        return {writes[0]: out}
    unknown = [name for name in out if name not in writes]
    if unknown:
        raise GraphError(f"{line}: {op} does not write {unknown[0]!r}; it writes {', '.join(writes)}")
    return dict(out)


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Settings of an op that have a value of their own."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def check_loss(
    line: str,
    op: str,
    loss: Any,
    outputs: tuple[str, ...],
    heads: Sequence[Head] = (),
    teachers: Collection[str] = (),
) -> None:
    """Raises GraphError for what is no loss, or one that asks for what the role's model does not give.

    outputs: kinds that it gives; empty where a user's own op does not say. heads: of the role. teachers: roles of the
    recipe that are language models.
    """
    if isinstance(loss, LossFunction):
        raise GraphError(f"{line}: {op} got loss={loss.name}, which is not called; write loss={loss.name}()")
    if not isinstance(loss, Loss):
        raise GraphError(
            f"{line}: {op} needs a loss, something with reads, outputs and average that is called with (model, rows), "
            f"such as ppo_clip() or a function under @loss; got {loss!r}"
        )
    name, outputs_text = loss_name(loss), described(outputs, heads)
    if loss.average not in get_args(Average):
        raise GraphError(f"{line}: {name} averages over {loss.average!r}; it can be {', '.join(get_args(Average))}")
    for output in loss.outputs:
        if not known(output):
            raise GraphError(f"{line}: {name} asks for {output!r}, which is no output; a model gives {outputs_text}")
        if kind_of(output) == "heads":
            gives = argument_of(output) in [head.name for head in heads]
        else:
            gives = not outputs or kind_of(output) in outputs
        if not gives:
            role = op.partition(".")[0]
            remedy = f"; give the class of {role} heads = (Head(name={argument_of(output)!r}),)"
            raise GraphError(
                f"{line}: {op} cannot give {name} the output {key_of(output)!r} that it asks for; its model gives "
                f"{outputs_text}{remedy if kind_of(output) == 'heads' else ''}"
            )
        if isinstance(output, OverVocabulary) and output.teacher is not None and output.teacher not in teachers:
            raise GraphError(
                f"{line}: {name} asks for distributions of {output.teacher!r}, which is no role of this recipe with a "
                f"language model; it has {', '.join(teachers) or 'none'}"
            )


def terms_of(
    line: str, op: str, function: Callable[..., Any], given: Sequence[Any], kwargs: Mapping[str, Any], batch: type
) -> list[tuple[Any, Loss, Any]]:
    """(batch, loss, weight) of each term of an update. Raises GraphError for what is none.

    `actor.update_actor([(pairs, dpo(0.1)), (experts, nll(), 0.5)])`: one optimizer step on the weighted sum, each loss
    averaged over its own batch.
    """
    if "loss" not in inspect.signature(function).parameters:
        raise GraphError(f"{line}: {op} takes one batch; terms (batch, loss, weight) are for updates")
    if "loss" in kwargs:
        raise GraphError(f"{line}: {op} got terms and loss=; each term has its loss: [(batch, loss, weight), ...]")
    if not given:
        raise GraphError(f"{line}: {op} got no terms; give [(batch, loss, weight), ...]")
    terms = []
    for term in given:
        if not isinstance(term, tuple) or len(term) not in (2, 3) or not isinstance(term[0], batch):
            raise GraphError(f"{line}: a term of {op} is (batch, loss) or (batch, loss, weight), got {term!r}")
        weight = term[2] if len(term) == 3 else 1.0
        if isinstance(weight, bool) or not isinstance(weight, int | float | StateValue):
            raise GraphError(f"{line}: the weight of a term of {op} is a number, got {weight!r}")
        terms.append((term[0], term[1], weight))
    return terms


def check_settings(line: str, op: str, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raises GraphError for a setting that the op does not have, lacks, or needs to know before it runs."""
    parameters = inspect.signature(function).parameters
    keywords = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.name != RANDOM]
    if taken := [name for name in keywords if name in EVERY_OP]:
        raise GraphError(
            f"{line}: {op} has a setting {taken[0]!r} of its own, and out=, every= and after= of a call say what it "
            "writes and at which steps it runs; give its parameter another name"
        )
    for name in kwargs:
        if name not in (*keywords, *EVERY_OP):
            near = difflib.get_close_matches(name, keywords, n=1)
            raise GraphError(
                f"{line}: {op} has no setting {name!r}; it has {', '.join(keywords) or 'none'}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    for p in parameters.values():
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in (*kwargs, RANDOM):
            raise GraphError(f"{line}: {op} needs the setting {p.name!r}")
        if isinstance(kwargs.get(p.name), StateValue) and p.annotation in (int, "int"):
            raise GraphError(
                f"{line}: {op} needs {p.name} before it runs, because it decides on rows or steps; got "
                f"{kwargs[p.name]}, which changes from step to step"
            )


def check_heads(line: str, op: str, settings: Mapping[str, Any], interface: Any) -> None:
    """Raises GraphError where `compute_heads` is asked for a head that the role does not have."""
    if not op.endswith(".compute_heads"):
        return
    heads, names = getattr(interface, "heads", ()), settings["names"]
    if isinstance(names, str) or not names:
        raise GraphError(f"{line}: {op} needs names, a tuple of heads, got {names!r}; write names=('quality',)")
    for name in names:
        if name not in [head.name for head in heads]:
            has = ", ".join(head.name for head in heads) or "none"
            raise GraphError(f"{line}: {op} asks for the head {name!r}; {interface.__name__} has {has}")
