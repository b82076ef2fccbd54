"""Code that a response holds, run against tests in a sandbox: stdin/stdout pairs, calls of a function, or asserts.

The answer of a row is its tests, as the field has them:

    {"inputs": ["1 2\\n"], "outputs": ["3\\n"]}                      a program; its output is compared here, outside
    {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}         a function of that name
    ["assert add(1, 2) == 3", ...]                                 asserts, a test each (MBPP's test_list)
    {"test": "def check(candidate): ...", "entry_point": "add"}    asserts, one test (HumanEval)
    assert add(1, 2) == 3                                          plain text: asserts, one test

What a program is compared with never enters the sandbox; asserts do, in a process that the code cannot reach.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_dist.sandbox import Limits, Result, Sandbox
from rlhf_dist.sandbox.isolation import Isolation

_FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "py", "python3", "")
_CALL = """
def _plain(value):
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
assert _plain({name}(*{arguments!r})) == {expected!r}
"""
FORMS = "tests are inputs and outputs, with or without fn_name; a list of asserts; test and entry_point; or a text"


@dataclass(frozen=True)
class Tests:
    """What a row's answer asks of code: programs to run, or asserts to hold; one of the two."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    """Of the program, one for each input."""
    asserts: tuple[str, ...] = ()
    """Sources, each run against the code on its own."""

    def __len__(self) -> int:
        return len(self.inputs) + len(self.asserts)


class CodeTests:
    """A reward: which of a row's tests the response's code passes."""

    def __init__(
        self,
        *,
        score: Literal["share", "all"] = "share",
        limits: Limits | None = None,
        row_s: float = 15.0,
        packages: Sequence[str] = (),
        isolation: Isolation = "auto",
    ) -> None:
        """`score`: the share of tests passed, or 1 for all and else 0 (then tests after a failure are not run).

        `row_s`: no further test of a row is started after so many seconds; those left have not been passed.
        `packages` and `isolation` as `Sandbox` takes them.
        """
        if score not in ("share", "all"):
            raise ValueError(f"score must be share or all, got {score!r}")
        self._score, self._limits, self._row_s = score, limits or Limits(), row_s
        self._packages, self._isolation = tuple(packages), isolation
        self._made: tuple[Sandbox, ThreadPoolExecutor] | None = None

    async def __call__(self, response: str, answer: str) -> dict[str, float]:
        """reward, passed (share of tests), no_code (1 where the response holds none), timed_out (1 where a test did).

        Raises ValueError for an answer that is no tests, RuntimeError where nothing isolates programs on this machine.
        """
        tests, code = read_tests(answer), extract_code(response)
        if not code:
            return self._scores(0, len(tests), no_code=True)
        if self._made is None:
            most = max(8, os.cpu_count() or 1)
            sandbox = Sandbox(self._limits, most=most, packages=self._packages, isolation=self._isolation)
            self._made = sandbox, ThreadPoolExecutor(most, "code-tests")
        sandbox, threads = self._made
        passed, late = await asyncio.get_running_loop().run_in_executor(threads, self._run, sandbox, code, tests)
        return self._scores(passed, len(tests), timed_out=late)

    def _run(self, sandbox: Sandbox, code: str, tests: Tests) -> tuple[int, bool]:
        """How many tests passed, and whether time ran out for one."""
        until, whole = time.monotonic() + self._row_s, self._score == "all"

        def go_on(number: int, result: Result) -> bool:
            return time.monotonic() < until and (not whole or _passed(result, tests, number))

        if tests.inputs:
            results = sandbox.run_each(code, tests.inputs, go_on=go_on)
        else:
            results = sandbox.test_each(code, tests.asserts, go_on=go_on)
        if results[0].outcome == "refused":
            raise RuntimeError(f"code is not run: {results[0].text}")
        passed = sum(_passed(result, tests, number) for number, result in enumerate(results))
        stopped = len(results) < len(tests) and time.monotonic() >= until
        return passed, stopped or any(result.outcome == "timeout" for result in results)

    def _scores(self, passed: int, tests: int, *, no_code: bool = False, timed_out: bool = False) -> dict[str, float]:
        share = passed / tests
        reward = share if self._score == "share" else float(passed == tests)
        return {"reward": reward, "passed": share, "no_code": float(no_code), "timed_out": float(timed_out)}


code_tests = CodeTests()
"""The share of tests passed."""
code_solved = CodeTests(score="all")
"""1.0 where all tests are passed."""


def extract_code(response: str) -> str:
    """The last fenced block of Python or of no language; a response without fences that is Python itself; or ""."""
    blocks = [code for language, code in _FENCED.findall(response) if language.lower() in _PYTHON]
    if blocks:
        return textwrap.dedent(str(blocks[-1]))
    if "```" in response:
        return ""  # of another language, or cut before its end
    try:
        compile(response, "<response>", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return ""
    return response.strip()


def read_tests(answer: str) -> Tests:
    """Tests in any of the forms above. Raises ValueError naming what is wrong with them."""
    try:
        given = json.loads(answer) if answer.lstrip()[:1] in ("{", "[") else answer
    except json.JSONDecodeError as error:
        raise ValueError(f"tests start as JSON and are none ({error}), got {_short(answer)}") from error
    tests = _asserts(given) if isinstance(given, (str, list)) else _mapping(given)
    if not len(tests):
        raise ValueError(f"a row needs at least one test, got {_short(answer)}; {FORMS}")
    return tests


def same_output(stdout: str, expected: str) -> bool:
    """Whether lines are the same, white space at their ends and empty lines at the end aside."""
    return _lines(stdout) == _lines(expected)


def _asserts(given: str | list[Any]) -> Tests:
    sources = [given] if isinstance(given, str) else given
    if not all(isinstance(source, str) for source in sources):
        raise ValueError(f"a list of tests must hold texts, got {_short(json.dumps(given))}; {FORMS}")
    return Tests(asserts=tuple(source for source in sources if source.strip()))


def _mapping(given: dict[str, Any]) -> Tests:
    if isinstance(given.get("test"), str):
        name = given.get("entry_point")
        return Tests(asserts=(given["test"] + (f"\ncheck({name})\n" if name else ""),))
    inputs, outputs = given.get("inputs"), given.get("outputs")
    if not (isinstance(inputs, list) and isinstance(outputs, list)) or len(inputs) != len(outputs):
        raise ValueError(f"inputs and outputs must be lists of one length, got {_short(json.dumps(given))}; {FORMS}")
    name = given.get("fn_name")
    if name is None:
        return Tests(inputs=tuple(map(_text, inputs)), outputs=tuple(map(_text, outputs)))
    if not str(name).isidentifier():
        raise ValueError(f"fn_name must be the name of a function, got {name!r}")
    calls = []
    for arguments, expected in zip(inputs, outputs, strict=True):
        if not isinstance(arguments, list):
            raise ValueError(
                f"with fn_name, each of inputs is a list of arguments, got {_short(json.dumps(arguments))}"
            )
        calls.append(_CALL.format(name=name, arguments=arguments, expected=expected))
    return Tests(asserts=tuple(calls))


def _passed(result: Result, tests: Tests, number: int) -> bool:
    return result.ok and (not tests.inputs or same_output(result.stdout, tests.outputs[number]))


def _text(value: Any) -> str:
    """A program's text; some data sets have it as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
