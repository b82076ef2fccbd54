"""The line under each field of a config dataclass, for people who read a YAML file."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any


@cache
def own_docs(cls: type) -> dict[str, str]:
    """Field -> the string literal under it, base classes included. Empty where the source cannot be read."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
        for statement, after in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    docs[statement.target.id] = " ".join(str(after.value.value).split())
    return docs


def field_docs(cls: type, prefix: str = "") -> dict[str, str]:
    """Every dotted key of a tree of dataclasses -> its line."""
    out: dict[str, str] = {}
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        key = f"{prefix}{item.name}"
        if item.name in own_docs(cls):
            out[key] = own_docs(cls)[item.name]
        kinds: tuple[Any, ...] = (hints[item.name], *typing.get_args(hints[item.name]))
        inner = next((kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)), None)
        if inner is not None and typing.get_origin(hints[item.name]) is not dict:
            out |= field_docs(inner, f"{key}.")
    return out


def annotate(yaml: str, docs: dict[str, str], column: int = 44) -> str:
    """Block-style YAML with the line of each key as a comment behind it."""
    lines: list[str] = []
    path: list[tuple[int, str]] = []
    for line in yaml.splitlines():
        text = line.lstrip()
        if text.startswith("-") or ":" not in text:
            lines.append(line)
            continue
        depth, name = len(line) - len(text), text.split(":", 1)[0].strip("'\"")
        path = [*(entry for entry in path if entry[0] < depth), (depth, name)]
        doc = docs.get(".".join(entry[1] for entry in path))
        lines.append(f"{line:<{column}}  # {doc}" if doc else line)
    return "\n".join(lines)
