"""Tests of code, and code that wants to pass them without being right."""
# ruff: noqa: E501  programs stand in one line

import pytest

from rlhf_dist.sandbox import Sandbox

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\nassert add(2, 2) == 4"


@pytest.mark.parametrize(
    "code, tests",
    [
        (ADD, TESTS),
        (ADD, "import math\nassert math.isclose(add(0.1, 0.2), 0.3)"),
        (ADD, "def check(candidate):\n    for n in range(9):\n        assert candidate(n, n) == 2 * n\ncheck(add)"),
        ("add = lambda a, b=1, *, c=0: a + b + c", "assert add(1, c=3) == 5"),
        ("def f(x): return x", "for x in (None, True, 2**99, 1.5, 1j, 'é', b'a', [1], (1,), {1}, {1: (2,)}): assert f(x) == x and type(f(x)) is type(x)"),  # fmt: skip
        ("def f(x): x.append(1)", "a = []\nf(a)\nassert a == [1]"),
        ("def f(x): raise KeyError('a')", "try:\n    f(1)\n    assert False\nexcept KeyError:\n    pass"),
        ("def f(g): return g(3)", "assert f(lambda x: x + 1) == 4"),
        ("def f():\n    yield from range(3)", "assert list(f()) == [0, 1, 2]\nassert next(iter(f())) == 0"),
        ("class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return self.x == o.x\n    def __len__(self): return self.x",
         "p = P(2)\nassert p.x == 2 and len(p) == 2 and p == P(2) and p != P(3)\np.x = 5\nassert p.x == 5"),
        ("import math\ndef f(x): return math.floor(x)", "assert f(1.5) == math.floor(1.5)"),
        ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("class S:\n    def __init__(self): self.a = []\n    def push(self, x): self.a.append(x); return self", "assert S().push(1).push(2).a == [1, 2]"),
        ("print('noise')\ndef f(): return 1", "assert f() == 1"),
    ],
)  # fmt: skip
def test_right_code_passes(sandbox: Sandbox, code: str, tests: str) -> None:
    result = sandbox.test(code, tests)
    assert result.ok, result


@pytest.mark.parametrize(
    "code, outcome",
    [
        ("def add(a, b):\n    return a - b", "wrong"),
        ("def add(a, b):\n    return 1 / 0", "error"),
        ("add = 1", "error"),
        ("", "error"),
        ("def add(a, b:", "error"),
        ("def add(a, b):\n    while True: pass", "timeout"),
        ("def add(a, b):\n    return ' ' * (1 << 30)", "memory"),
        ("def add(a, b):\n    import os; os.kill(os.getpid(), 9)", "error"),
    ],
)
def test_wrong_code_fails_with_its_outcome(sandbox: Sandbox, code: str, outcome: str) -> None:
    assert sandbox.test(code, TESTS).outcome == outcome


CHEATS = {
    "prints passed": "print('passed')\nprint('{\"verdict\": [\"\", \"ok\", \"\"]}')",
    "leaves before the tests": "import os\nos._exit(0)",
    "exits before the tests": "import sys\nsys.exit(0)",
    "leaves in the call": "import os\ndef add(a, b): os._exit(0)",
    "exits in the call": "import sys\ndef add(a, b): sys.exit(0)",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\nadd = None",
    "equals everything": "class E:\n    def __eq__(self, other): return True\ndef add(a, b): return E()",
    "equals everything, as a number": "class E(int):\n    def __eq__(self, other): return True\ndef add(a, b): return E(7)",
    "equals everything, in a list": "class E:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef add(a, b): return [E()][0]",
    "patches builtins": "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.exec = lambda *a: None\nbuiltins.compile = lambda *a: ''\ndef add(a, b): return 0",
    "shadows builtins": "def AssertionError(*a): pass\ndef isinstance(*a): return True\ndef add(a, b): return 0",
    "patches the checker": "import sys\nfor name, module in list(sys.modules.items()):\n    if name.startswith('inside'):\n        for key in list(vars(module)):\n            if key in ('_verdict', 'run_tests', 'describe'): setattr(module, key, lambda *a: ('ok', ''))\ndef add(a, b): return 0",
    "walks the stack": """
import sys
def add(a, b):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_code.co_consts]:
            text = repr(value)
            if "== 3" in text or "nonce" in text and "verdict" not in text:
                print("FOUND", text)
        frame = frame.f_back
    return 0
""",
    "searches its memory": """
import gc
def add(a, b):
    needle = "== " + str(9 - 6)
    for thing in gc.get_objects():
        if type(thing) is dict:
            for value in list(thing.values()):
                if type(value) is str and needle in value and "needle" not in value: print("FOUND", value)
    return 0
""",
    "reads other processes": """
import os
def add(a, b):
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            for file in ("mem", "environ", "maps", "fd", "cwd"):
                try:
                    path = f"/proc/{name}/{file}"
                    print("FOUND", os.listdir(path) if file == "fd" else os.readlink(path) if file == "cwd" else open(path, "rb").read(1))
                except OSError:
                    pass
    return 0
""",
    "ends the checker": "import os\ndef add(a, b):\n    os.kill(-1, 9)\n    return 0",
    "stops the checker": "import os\ndef add(a, b):\n    os.kill(-1, 19)\n    return 0",
    "writes to every descriptor": "import os\nfor n in range(99):\n    try: os.write(n, b'{\"verdict\": [\"\", \"ok\", \"\"]}')\n    except OSError: pass\nos._exit(0)",
    "answers what was not asked": "import inside.proxies as p\np.Peer.serve = lambda self: [self.send({'value': True}) for _ in range(9)]\nadd = print",
    "says nonsense": "import os\nfor n in range(3, 99):\n    try: os.write(n, (1 << 30).to_bytes(4, 'big') + b'x')\n    except OSError: pass\nadd = print",
    "raises what tests raise": "def add(a, b): raise SystemExit(0)",
    "is always true": "class T:\n    def __bool__(self): return True\n    def __getattr__(self, name): return self\n    def __call__(self, *a): return self\n    def __eq__(self, o): return self\nadd = T()",
}  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_passes(sandbox: Sandbox, cheat: str) -> None:
    result = sandbox.test(CHEATS[cheat], TESTS)
    assert result.outcome in ("wrong", "error", "killed", "timeout"), result
    assert "FOUND" not in result.stdout, result


def test_functions_of_the_tests_can_be_called_and_not_read(sandbox: Sandbox) -> None:
    code = """
def f(g):
    for name in ("__globals__", "__code__", "__closure__"):
        try:
            print("FOUND", getattr(g, name))
        except TypeError:
            pass
    return g(1)
"""
    result = sandbox.test(code, "secret = 41\nassert f(lambda x: x + secret) == 42")
    assert result.ok and "FOUND" not in result.stdout, result


def test_names_of_builtins_and_modules_are_not_the_codes(sandbox: Sandbox) -> None:
    code = "class math:\n    isclose = lambda *a: True\ndef abs(x): return 0\ndef f(x): return 9"
    assert sandbox.test(code, "assert math.isclose(f(1), 1)").outcome == "wrong"
    assert sandbox.test(code, "assert abs(f(1) - 1) < 0.1").outcome == "wrong"


def test_tests_are_bounded_too(sandbox: Sandbox) -> None:
    assert sandbox.test(ADD, "while True: pass").outcome == "timeout"
    assert sandbox.test(ADD, "import sys; sys.exit(0)").outcome == "error"
    assert sandbox.test(ADD, "import os; os._exit(0)").outcome == "killed"
