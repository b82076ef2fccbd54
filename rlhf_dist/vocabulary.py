"""What a recipe is written with, as tables for people: role ops, host ops and losses, read from the code itself."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from rlhf_dist import transforms
from rlhf_dist.algorithms import losses
from rlhf_dist.algorithms.loss import LossFunction
from rlhf_dist.dataflow.host import HostOp
from rlhf_dist.dataflow.op_settings import defaults
from rlhf_dist.roles import KINDS, Columns, OpSpec, ops_of
from rlhf_dist.weights import Weights, weight_ops_of

_ROWS = {"keep": "", "drop": ", fewer rows", "derive": ", rows made of those"}


def describe_ops() -> str:
    """Tables of role ops, host ops and losses: what is called, what it reads and writes, what it is."""
    role_ops = [
        (f"{interface.__name__}.{name}", _touched(spec, getattr(interface, name)), getattr(interface, name))
        for interface in KINDS
        for name, spec in ops_of(interface).items()
    ]
    host_ops = [
        (name, f"{_reads(op)} -> {_columns(op.writes, defaults(op.function))}{_ROWS[op.rows]}", op)
        for name, op in _public(transforms)
        if isinstance(op, HostOp)
    ]
    of_weights = [
        (f"ROLE.{name}", f"weights: {spec.reads} -> {spec.writes}", getattr(Weights, name))
        for name, spec in weight_ops_of(Weights).items()
    ]
    made = [(name, _settings(make), make) for name, make in _public(losses) if isinstance(make, LossFunction)]
    return "\n\n".join(
        f"{title}\n{_table(rows)}"
        for title, rows in (
            ("ops of roles (rlhf_dist.roles)", role_ops),
            ("weights of roles with a model (rlhf_dist.weights)", of_weights),
            ("host ops (rlhf_dist.transforms)", host_ops),
            ("losses (rlhf_dist.algorithms), for loss=", made),
        )
    )


def _public(module: ModuleType) -> list[tuple[str, Any]]:
    return [(name, getattr(module, name)) for name in module.__all__]


def _touched(spec: OpSpec, function: Any) -> str:
    settings = defaults(function)
    return f"{_columns(spec.reads, settings)} -> {_columns(spec.writes, settings)}"


def _columns(columns: Columns, settings: Mapping[str, Any]) -> str:
    # A function says which columns for each call: with the defaults where it needs no other setting.
    try:
        names = columns(settings) if callable(columns) else columns
    except KeyError:
        return "what its loss reads"
    return ", ".join(names) or "nothing"


def _reads(op: HostOp[Any, Any]) -> str:
    settings = defaults(op.function)
    return " | ".join(_columns(names, settings) for names in op.read_of(settings))


def _settings(loss: LossFunction[Any]) -> str:
    parameters = loss.signature.parameters.values()
    return ", ".join(str(parameter.replace(annotation=parameter.empty)) for parameter in parameters)


def _table(rows: list[tuple[str, str, Any]]) -> str:
    lines = []
    for name, what, documented in rows:
        text = textwrap.fill(" ".join((inspect.getdoc(documented) or "").split()), 108)
        lines.append(f"  {name}\n      {what}\n{textwrap.indent(text, '      ')}")
    return "\n".join(lines)
