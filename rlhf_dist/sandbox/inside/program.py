"""The process that runs untrusted code: its standard streams are the pipes it was given, its ends are reports."""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import traceback
import types
from typing import Any, NoReturn

from .confine import die_with_parent, limit

SOURCE = "<program>"
OUT_OF_MEMORY = 99
"""Exit code of a program that ended by MemoryError."""
_first = 0
"""The process that `enter` made the program's."""


def enter(limits: dict[str, Any], folder: str, stdin: int, stdout: int, stderr: int, keep: tuple[int, ...]) -> None:
    """Make this (just forked) process the program's: its streams, its folder, its limits, no other descriptor."""
    global _first
    _first = os.getpid()
    os.setsid()
    die_with_parent()
    for number, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, number)
    keep_sorted = sorted({0, 1, 2, *keep})
    for low, high in zip(keep_sorted, [*keep_sorted[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(low + 1, high)
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = folder
    limit(limits)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))


def run_command(argv: list[str], report: int) -> NoReturn:
    """Become the command."""
    try:
        os.set_inheritable(report, False)
        os.execvp(argv[0], argv)
    except OSError as error:
        end(report, f"{argv[0]} cannot be started: {error.strerror}", 127)


def run_program(code: str, report: int) -> NoReturn:
    """Run the code as the main module, and end as Python would."""
    sys.path.insert(0, os.getcwd())
    try:
        execute(code, "__main__")
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as leaving:
        code_ = leaving.code
        if code_ not in (None, 0):
            text = f"exit code {code_}" if isinstance(code_, int) else str(code_)
            end(report, text, code_ & 255 if isinstance(code_, int) else 1)
    except BaseException as error:
        end(report, *failed(error))
    end(report, "", 0)


def execute(code: str, name: str) -> dict[str, Any]:
    """The globals of the code, run as a module of that name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    sys.argv = [SOURCE]
    exec(compile(code, SOURCE, "exec"), module.__dict__)
    return module.__dict__


def failed(error: BaseException) -> tuple[str, int]:
    """What is said of an exception, and the exit code that goes with it; the traceback goes to stderr."""
    try:
        traceback.print_exception(error)
    except BaseException:  # of the error's own __str__
        pass
    return describe(error), OUT_OF_MEMORY if isinstance(error, MemoryError) else 1


def describe(error: BaseException) -> str:
    """An exception in one line, with the line of the program."""
    try:
        text = str(error).strip().partition("\n")[0]
    except BaseException:
        text = "?"
    lines = [number for frame, number in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == SOURCE]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"[:500]


def end(report: int, text: str, code: int) -> NoReturn:
    """End this process, its output flushed, with a line about why."""
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        if not code:
            text, code = describe(error), 1
    try:
        if os.getpid() == _first:  # and not a copy of it that the program made
            os.write(report, json.dumps({"text": text, "code": code}).encode())
    finally:
        os._exit(code)
