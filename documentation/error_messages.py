"""Every error message that the code can raise, read from its sources: the page `errors.md`.

    raise ValueError(f"{key} must be above 0, got {value}")     ->     "<key> must be above 0, got <value>"

What stands in a message is followed as far as reading can: texts put together by `+`, both sides of a condition, names
that were given a text before, functions of the same package that return one, and exceptions whose class says the rest.
A part that is known at run time only becomes `<its expression>`.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rlhf_dist", "controller", "workers", "recipes")
DEPTH = 4
"""How many functions a message is followed through."""
ALTERNATIVES = 12
"""Most texts of one message: each condition in it doubles them."""

Text = str
HOLE = re.compile(r"<[^<>\n]*>")


@dataclass(frozen=True, kw_only=True)
class Message:
    """One text of one `raise`."""

    module: str
    line: int
    kind: str
    """Class of the exception."""
    text: Text
    """With `<expression>` where something is known at run time only."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """What this message looks like when it is raised."""
        parts = HOLE.split(self.text)
        return re.compile(".*?".join(re.escape(part) for part in parts), re.DOTALL)

    @property
    def said(self) -> int:
        """Characters that are always the same."""
        return len(HOLE.sub("", self.text))


@dataclass
class _Module:
    name: str
    tree: ast.Module
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    constants: dict[str, ast.expr] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name here -> (module, name there); the name there is empty for a module."""


def error_messages(root: Path = ROOT) -> list[Message]:
    """Of all packages, by module and line."""
    sources = _Sources(root)
    return [message for name in sorted(sources.modules) for message in sources.messages(name)]


def raises(tree: ast.AST) -> Iterator[ast.Raise]:
    """Every `raise` that says what it raises."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None)


def best_match(text: str, messages: Iterable[Message]) -> Message | None:
    """The message that `text` is, or holds; of several the one with most words of its own."""
    found = [message for message in messages if message.said >= 8 and message.pattern.search(text)]
    return max(found, key=lambda message: message.said, default=None)


def errors_page(messages: list[Message]) -> str:
    """The page, a section for each module."""
    lines = [HEAD.format(count=len(messages))]
    module = ""
    for message in messages:
        if message.module != module:
            module = message.module
            lines += ["", f"## {module}", ""]
        passed_on = "" if message.said else " (passes on what was raised before)"
        lines.append(f"- `{message.kind}` {_code(message.text)}{passed_on}")
    return "\n".join(lines) + "\n"


HEAD = """# Every error message

Made from the sources when the site is built: {count} messages, by the module that raises them. `<...>` stands for what
is put in when it is raised. Search with the field above (`/` key), or with the browser on this page, for a few words
that are no number or name of yours. What to do stands in the message itself; for the usual causes see
[troubleshooting](troubleshooting.md). `--traceback` shows where a message came from."""


def _code(text: str) -> str:
    """As code on one line, whatever it contains."""
    one = " ".join(text.split())
    ticks = "`" * (max((len(run) for run in re.findall("`+", one)), default=0) + 1)
    space = " " if one[:1] == "`" or one[-1:] == "`" or not one else ""
    return f"{ticks}{space}{one}{space}{ticks}"


class _Sources:
    def __init__(self, root: Path) -> None:
        files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
        self.modules = {name: _read(name, file) for file in files for name in [_module_name(root, file)]}

    def messages(self, name: str) -> Iterator[Message]:
        module = self.modules[name]
        for scope, node in _in_scopes(module.tree, []):
            assert node.exc is not None
            texts = dict.fromkeys(self._raised(module, scope, node.exc))
            for text in texts or {"": None}:
                yield Message(module=name, line=node.lineno, kind=_kind(node.exc), text=text or _hole(node.exc))

    def _raised(self, module: _Module, scope: list[ast.AST], error: ast.expr) -> list[Text]:
        """Texts of an exception that is raised; empty for one that was caught before."""
        if isinstance(error, ast.IfExp):
            return self._raised(module, scope, error.body) + self._raised(module, scope, error.orelse)
        if (
            isinstance(error, ast.Call)
            and isinstance(error.func, ast.Attribute)
            and error.func.attr in ("of", "with_traceback")
        ):
            return self._raised(module, scope, error.func.value)
        if not isinstance(error, ast.Call):
            return self._text(module, scope, error, DEPTH) if isinstance(error, ast.Name) else []
        made = self._class_of(module, error.func)
        if made is not None:
            own = self._of_class(*made, error)
            if own:
                return own
        returned = self._function(module, scope, error.func)
        if returned is not None:  # raise _taken(folder, owner)
            of, function = returned
            return [text for one in _returns(function) for text in self._raised(of, [function], one)]
        texts = [self._text(module, scope, one, DEPTH) for one in error.args]
        said = [one for one in texts if _says_something(one)]
        return said[0] if said else (texts[0] if texts else [""])

    def _of_class(self, module: _Module, kind: ast.ClassDef, call: ast.Call) -> list[Text]:
        """What the class makes of the call's arguments: its `__str__`, else what it gives to `super().__init__`."""
        methods = {one.name: one for one in kind.body if isinstance(one, ast.FunctionDef)}
        if "__init__" not in methods:
            return []
        start = methods["__init__"]
        bound = _bound(start, call)
        if "__str__" in methods:
            shown = methods["__str__"]
            return [text for one in _returns(shown) for text in self._text(module, [shown, bound], one, DEPTH)]
        for node in ast.walk(start):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__init__":
                return [text for one in node.args[:1] for text in self._text(module, [start, bound], one, DEPTH)]
        return []

    def _text(self, module: _Module, scope: list[ast.AST], value: ast.expr, depth: int) -> list[Text]:
        """All texts that an expression may be."""
        match value:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.Constant(value=other):
                return ["" if other is None else str(other)]
            case ast.JoinedStr(values=parts):
                return _joined([self._text(module, scope, part, depth) for part in parts])
            case ast.FormattedValue(value=inner):
                if depth > 0 and isinstance(inner, ast.Constant | ast.JoinedStr | ast.IfExp):
                    return self._text(module, scope, inner, depth - 1)
                if isinstance(inner, ast.Call):
                    return self._text(module, scope, inner, depth)
                return self._name(module, scope, inner, depth) or [_hole(inner)]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return _joined([self._text(module, scope, left, depth), self._text(module, scope, right, depth)])
            case ast.IfExp(body=body, orelse=other):
                return self._text(module, scope, body, depth) + self._text(module, scope, other, depth)
            case ast.Call(func=ast.Attribute(value=template, attr="format")):
                return [HOLE.sub("<>", text) for text in self._text(module, scope, template, depth)]
            case ast.Call(func=function) if depth > 0:
                found = self._function(module, scope, function)
                if found is not None:
                    of, body = found
                    inside: list[ast.AST] = [body, _bound(body, value)]
                    texts = [text for one in _returns(body) for text in self._text(of, inside, one, depth - 1)]
                    return texts if _says_something(texts) else [_hole(value)]
                return [_hole(value)]
            case ast.Name() | ast.Attribute():
                return self._name(module, scope, value, depth) or [_hole(value)]
            case _:
                return [_hole(value)]

    def _name(self, module: _Module, scope: list[ast.AST], value: ast.expr, depth: int) -> list[Text]:
        """Texts that a name was given where it is looked at; empty where it is not known to be a text."""
        if depth <= 0:
            return []
        for frame in reversed(scope):
            if isinstance(frame, _Bound):
                if _own_name(value) in frame.given:  # `rule`, and `self.rule` of an exception that keeps it
                    return self._text(module, [], frame.given[_own_name(value)], depth - 1)
            elif isinstance(value, ast.Name):
                given = _assignments(frame).get(value.id, ())
                texts = [text for made in given for text in self._text(module, scope, made, depth - 1)]
                if _says_something(texts):
                    return texts
        if isinstance(value, ast.Name) and value.id in module.constants:
            texts = self._text(module, [], module.constants[value.id], depth - 1)
            return texts if _says_something(texts) else []
        return []

    def _function(
        self, module: _Module, scope: list[ast.AST], function: ast.expr
    ) -> tuple[_Module, ast.FunctionDef] | None:
        match function:
            case ast.Name(id=name) if name in module.functions:
                return module, module.functions[name]
            case ast.Name(id=name) if name in module.imported:
                there, own = module.imported[name]
                found = self.modules.get(there)
                return (found, found.functions[own]) if found and own in found.functions else None
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in module.functions:
                return module, module.functions[name]
            case ast.Attribute(value=ast.Name(id=name), attr=own) if name in module.imported:
                there, inner = module.imported[name]
                found = self.modules.get(f"{there}.{inner}" if inner else there)
                return (found, found.functions[own]) if found and own in found.functions else None
        return None

    def _class_of(self, module: _Module, function: ast.expr) -> tuple[_Module, ast.ClassDef] | None:
        if not isinstance(function, ast.Name):
            return None
        if function.id in module.classes:
            return module, module.classes[function.id]
        there, own = module.imported.get(function.id, ("", ""))
        found = self.modules.get(there)
        return (found, found.classes[own]) if found and own in found.classes else None


class _Bound(ast.AST):
    """A scope of names that a call was given."""

    def __init__(self, given: dict[str, ast.expr]) -> None:
        super().__init__()
        self.given = given


def _read(name: str, file: Path) -> _Module:
    module = _Module(name, ast.parse(file.read_text(encoding="utf-8")))
    statements = [*_statements(module.tree)]
    while statements:
        node = statements.pop()
        statements += _statements(node)
        match node:
            case ast.FunctionDef():
                module.functions.setdefault(node.name, node)
            case ast.ClassDef():
                module.classes.setdefault(node.name, node)
            case ast.ImportFrom(module=str(there), level=0):
                module.imported |= {one.asname or one.name: (there, one.name) for one in node.names}
            case ast.Import():
                module.imported |= {one.asname or one.name: (one.name, "") for one in node.names}
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            module.constants[node.targets[0].id] = node.value
    return module


def _module_name(root: Path, file: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Statements, handlers and cases right inside a statement: quicker than all its nodes."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        yield from getattr(node, block, ())


def _in_scopes(node: ast.AST, scope: list[ast.AST]) -> Iterator[tuple[list[ast.AST], ast.Raise]]:
    """Every raise, with the functions it stands in."""
    for child in _statements(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            yield scope, child
        inside = [*scope, child] if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else scope
        yield from _in_scopes(child, inside)


@functools.cache
def _assignments(function: ast.AST) -> dict[str, list[ast.expr]]:
    """Name -> what the function gives it."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.NamedExpr):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
    return found


def _own_name(value: ast.expr) -> str:
    match value:
        case ast.Name(id=name) | ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name
    return ""


def _bound(function: ast.FunctionDef, call: ast.Call) -> _Bound:
    """The arguments of a call by the names that the function has for them."""
    names = [one.arg for one in function.args.args if one.arg != "self"]
    given = dict(zip(names, call.args, strict=False))
    return _Bound(given | {one.arg: one.value for one in call.keywords if one.arg is not None})


def _says_something(texts: list[Text]) -> bool:
    return any(HOLE.sub("", text).strip() for text in texts)


def _returns(function: ast.FunctionDef) -> list[ast.expr]:
    """What it returns, but for None: the message of what is well."""
    found = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    return [one for one in found if one is not None and not (isinstance(one, ast.Constant) and one.value is None)]


def _joined(parts: list[list[Text]]) -> list[Text]:
    """Every way to put one text of each part behind the other; after ALTERNATIVES of them only the first of each."""
    texts = [""]
    for part in parts:
        both = [before + after for before in texts for after in part]
        texts = both if len(both) <= ALTERNATIVES else [before + part[0] for before in texts]
    return texts


def _hole(value: ast.expr) -> Text:
    """`<...>` of an expression, short enough to read."""
    text = ast.unparse(value).replace("<", "").replace(">", "").replace("\n", " ")
    return f"<{text if len(text) <= 40 else text[:37] + '...'}>"


def _kind(error: ast.expr) -> str:
    while (
        isinstance(error, ast.Call) and isinstance(error.func, ast.Attribute) and isinstance(error.func.value, ast.Call)
    ):
        error = error.func.value  # ClusterError(text).of(kind)
    return ast.unparse(error.func if isinstance(error, ast.Call) else error)
