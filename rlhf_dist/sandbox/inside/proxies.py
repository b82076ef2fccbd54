"""Calls between two processes that do not trust each other: plain values by value, other objects by handle.

Both ends may call: a function that a test hands over is called back. One end speaks at a time, as in one thread.
"""

from __future__ import annotations

import builtins
import importlib
import json
import socket
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

MESSAGE_BYTES = 64 << 20
OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"),
    *("neg", "abs", "invert", "lt", "le", "gt", "ge", "len", "contains", "getitem", "setitem", "delitem"),
    *("int", "float", "index", "enter", "exit"),
)
"""What a handle passes on, as its Python method of that name."""


class CodeEnded(BaseException):
    """The other process has gone. No `Exception`, so that a test's `except Exception` does not take it."""


class Peer:
    """One end of the connection."""

    def __init__(self, connection: socket.socket, *, calls_only: bool = False) -> None:
        """`calls_only`: the other end may call our functions, and read or change nothing of them."""
        self._connection, self._calls_only = connection, calls_only
        self._shown: dict[int, Any] = {}
        self._unread = b""

    def send(self, message: dict[str, Any]) -> None:
        """Raises CodeEnded if nobody reads, ValueError for what is too large."""
        text = json.dumps(message).encode()
        if len(text) > MESSAGE_BYTES:
            raise ValueError(f"a value of {len(text)} bytes is too large to hand to a test")
        try:
            self._connection.sendall(len(text).to_bytes(4, "big") + text)
        except OSError:
            raise CodeEnded from None

    def receive(self) -> dict[str, Any]:
        """The next message. Raises CodeEnded at the end."""
        count = int.from_bytes(self._read(4), "big")
        if count > MESSAGE_BYTES:
            raise CodeEnded
        message = json.loads(self._read(count))
        if not isinstance(message, dict):
            raise CodeEnded
        return message

    def serve(self) -> None:
        """Answer the other end until it has gone."""
        try:
            while True:
                self._answer(self.receive())
        except CodeEnded:
            return

    def request(self, handle: int, method: str, *arguments: Any, **named: Any) -> Any:
        """What calling `method` of the other end's object gives; its exception, raised here as a builtin one.

        Lists, dicts and sets among the arguments are as the call left them.
        """
        given = [self.encode(argument) for argument in arguments]
        call = {name: self.encode(value) for name, value in named.items()}
        self.send({"of": handle, "method": method, "arguments": given, "named": call})
        while True:
            answer = self.receive()
            if "of" in answer:
                self._answer(answer)
                continue
            if "raised" in answer:
                raise _exception(str(answer["raised"]), str(answer.get("text", "")))
            for argument, left in zip(arguments, answer.get("left", ()), strict=False):
                _leave(argument, None if left is None else self.decode(left))
            return self.decode(answer["value"])

    def encode(self, value: Any) -> Any:
        """As JSON: itself, or a tag and what is in it. Subclasses of plain types are those types."""
        if value is None or value is True or value is False:
            return value
        if isinstance(value, Remote):
            return ["back", object.__getattribute__(value, "_handle")]
        if isinstance(value, str):
            return str.__str__(value) if type(value) is str else "".join(value)
        if isinstance(value, int):
            return ["int", hex(value)]
        if isinstance(value, float):
            return ["float", float.hex(value)]
        if isinstance(value, complex):
            return ["complex", float.hex(value.real), float.hex(value.imag)]
        if isinstance(value, (bytes, bytearray)):
            return [type(value).__name__ if type(value) in (bytes, bytearray) else "bytes", value.hex()]
        for kind in (list, tuple, set, frozenset):
            if isinstance(value, kind):
                return [kind.__name__, [self.encode(item) for item in kind.__iter__(value)]]
        if isinstance(value, dict):
            return ["dict", [[self.encode(key), self.encode(item)] for key, item in dict.items(value)]]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        self._shown[id(value)] = value
        return ["object", id(value), isinstance(value, type), str(getattr(value, "__name__", type(value).__name__))]

    def decode(self, value: Any) -> Any:
        """What `encode` was given; a Remote for what stayed there."""
        if not isinstance(value, list):
            return value
        kind, inner = str(value[0]), value[1]
        if kind == "int":
            return int(inner, 16)
        if kind == "float":
            return float.fromhex(inner)
        if kind == "complex":
            return complex(float.fromhex(inner), float.fromhex(value[2]))
        if kind in ("bytes", "bytearray"):
            return bytes.fromhex(inner) if kind == "bytes" else bytearray.fromhex(inner)
        if kind in ("list", "tuple", "set", "frozenset"):
            return getattr(builtins, kind)(self.decode(item) for item in inner)
        if kind == "dict":
            return {self.decode(key): self.decode(item) for key, item in inner}
        if kind == "module" and inner.partition(".")[0] in sys.stdlib_module_names:
            return importlib.import_module(inner)
        if kind == "back":
            return self._shown[inner]
        return Remote(self, int(inner), str(value[3]))

    def _answer(self, asked: dict[str, Any]) -> None:
        try:
            arguments = [self.decode(argument) for argument in asked["arguments"]]
            named = {name: self.decode(value) for name, value in asked["named"].items()}
            if self._calls_only and asked["method"] != "__call__":
                raise TypeError("a function of the tests can be called, and nothing else")
            value = _called(self._shown[asked["of"]], str(asked["method"]), arguments, named)
            left = [self.encode(item) if isinstance(item, (list, dict, set)) else None for item in arguments]
            self.send({"value": self.encode(value), "left": left})
        except CodeEnded:
            raise
        except BaseException as error:
            known = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            self.send({"raised": known[0], "text": _text(error)})

    def _read(self, count: int) -> bytes:
        while len(self._unread) < count:
            try:
                part = self._connection.recv(1 << 16)
            except OSError:
                part = b""
            if not part:
                raise CodeEnded
            self._unread += part
        read, self._unread = self._unread[:count], self._unread[count:]
        return read


class Remote:
    """An object of the other process."""

    def __init__(self, peer: Peer, handle: int, name: str) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_handle", handle)
        object.__setattr__(self, "__name__", name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _ask(self, "__call__", *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __iter__(self) -> Iterator[Any]:
        return _iterate(_ask(self, "iter"))

    def __eq__(self, other: object) -> bool:
        """Never equal to a plain value: what it says of itself is no evidence."""
        return isinstance(other, Remote) and bool(_ask(self, "__eq__", other) is True)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(_ask(self, "hash"))

    def __bool__(self) -> bool:
        return bool(_ask(self, "bool"))

    def __str__(self) -> str:
        return str(_ask(self, "str"))

    def __repr__(self) -> str:
        return str(_ask(self, "repr"))


def _operator(name: str) -> Callable[..., Any]:
    def passed_on(self: Remote, *arguments: Any) -> Any:
        return _ask(self, name, *arguments)

    return passed_on


for _name in OPERATORS:
    setattr(Remote, f"__{_name}__", _operator(f"__{_name}__"))


def names_of(namespace: dict[str, Any], peer: Peer) -> dict[str, Any]:
    """What a module shows to its tests: all names but private ones."""
    return {name: peer.encode(value) for name, value in namespace.items() if not name.startswith("_")}


def tested(names: dict[str, Any], peer: Peer) -> dict[str, Any]:
    """The names of the code as its tests see them. Those of builtins and of the standard library mean what they always
    mean: tests that say `abs` or `math.isclose` are not answered by the code."""
    found = {}
    for name, value in names.items():
        if name in sys.stdlib_module_names:
            found[name] = importlib.import_module(name)
        elif not hasattr(builtins, name):
            found[name] = peer.decode(value)
    return found


def _ask(remote: Remote, method: str, *arguments: Any, **named: Any) -> Any:
    peer: Peer = object.__getattribute__(remote, "_peer")
    return peer.request(object.__getattribute__(remote, "_handle"), method, *arguments, **named)


def _iterate(iterator: Any) -> Iterator[Any]:
    while True:
        try:
            value = _ask(iterator, "next")
        except StopIteration:
            return
        yield value


def _called(target: Any, method: str, arguments: list[Any], named: dict[str, Any]) -> Any:
    plain: dict[str, Callable[..., Any]] = {"getattr": getattr, "setattr": setattr, "hash": hash, "bool": bool}
    plain |= {"str": str, "repr": repr, "iter": iter, "next": next}
    if method in plain:
        return plain[method](target, *arguments)
    if method == "__call__":
        return target(*arguments, **named)
    if not hasattr(type(target), method):
        raise TypeError(f"a {type(target).__name__!r} has no {method}")
    return getattr(target, method)(*arguments, **named)


def _exception(name: str, text: str) -> BaseException:
    """A builtin exception of that name; AssertionError is the checker's own, so that of the code is a RuntimeError."""
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, AssertionError):
        return RuntimeError(f"{name}: {text}")
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and its like take more
        return RuntimeError(f"{name}: {text}")


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:
        return "?"


def _leave(argument: Any, left: Any) -> None:
    if isinstance(argument, list) and isinstance(left, list):
        argument[:] = left
    elif isinstance(argument, (dict, set)) and isinstance(left, type(argument)):
        argument.clear()
        argument.update(left)
