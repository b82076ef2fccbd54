"""Programs, their results, and what is left after them."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from rlhf_dist.sandbox import Limits, Result, Sandbox, SandboxError, isolation
from rlhf_dist.sandbox.isolation import tried
from tests.sandbox.conftest import LIMITS


@pytest.mark.parametrize(
    "program, outcome, text",
    [
        ("print(int(input()) + 1)", "ok", ""),
        ("import sys\nprint(42)\nsys.exit(0)", "ok", ""),
        ("print(42)\nraise SystemExit", "ok", ""),
        ("import sys; sys.exit(3)", "error", "exit code 3"),
        ("import sys; sys.exit('no')", "error", "no"),
        ("x = 1\n1 / 0", "error", "ZeroDivisionError: division by zero (line 2)"),
        ("def f(:", "error", "SyntaxError: invalid syntax"),
        ("import numpy_that_is_not_there", "error", "ModuleNotFoundError"),
        ("import os; os._exit(5)", "error", "exit code 5"),
        ("import os; os.kill(os.getpid(), 9)", "killed", "SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "killed", "SIGSEGV"),
        ("def f(): f()\nf()", "error", "RecursionError"),
        ("class E(Exception):\n  def __str__(self): 1/0\nraise E", "error", "E: ?"),
    ],
)
def test_every_end_of_a_program_has_its_outcome(sandbox: Sandbox, program: str, outcome: str, text: str) -> None:
    result = sandbox.run(program, "41\n")
    assert result.outcome == outcome and text in result.text, result
    assert result.stdout == ("42\n" if outcome == "ok" else "")


def test_waiting_is_bounded_as_computing_is(sandbox: Sandbox) -> None:
    waiting = Sandbox(Limits(wall_s=0.5), isolation=sandbox.isolation, warm=1)  # type: ignore[arg-type]
    with waiting:
        result = waiting.run("import time; time.sleep(60)")
    assert result.outcome == "timeout" and result.text == "took more than wall_s=0.5"


def test_a_program_has_input_files_and_a_folder(sandbox: Sandbox) -> None:
    program = "import helper, sys\nopen('new', 'w').write('x')\nprint(helper.ONE, sys.stdin.read(), __name__)"
    result = sandbox.run(program, "été \ud800\n" * 10_000, {"helper.py": "ONE = 1"})
    assert result.ok, result
    assert result.stdout.startswith("1 été") and result.stdout.endswith(" __main__\n")


def test_input_that_is_not_read_holds_nothing_up(sandbox: Sandbox) -> None:
    assert sandbox.run("print(1)", "x" * (4 << 20)).stdout == "1\n"


def test_output_that_is_no_text_is_replaced(sandbox: Sandbox) -> None:
    result = sandbox.run("import os; os.write(1, bytes([255, 65]))")
    assert result.stdout == "\ufffdA"


def test_threads_and_exit_functions_end_as_in_python(sandbox: Sandbox) -> None:
    program = """
import atexit, threading, time
atexit.register(lambda: print("c"))
threading.Thread(target=lambda: (time.sleep(0.2), print("b"))).start()
print("a")
"""
    assert sandbox.run(program).stdout == "a\nb\nc\n"


def test_inputs_are_runs_of_their_own(sandbox: Sandbox) -> None:
    program = "import os\nprint(int(input()) + 1, os.listdir('.'))\nopen('mine', 'w')\nsum = None"
    results = sandbox.run_each(program, ["1", "x", "3"])
    assert [result.outcome for result in results] == ["ok", "error", "ok"]
    assert results[2].stdout == "4 []\n"
    assert len(sandbox.run_each(program, ["1", "x", "3"], go_on=lambda number, result: result.ok)) == 2


@pytest.mark.parametrize(
    "fill",
    [
        "for n in range(99): open(f'/scratch/{n}', 'w')",
        "for n in range(99):\n  os.mkdir('d')\n  os.chdir('d')",
        "os.mkdir('/scratch/d')\nopen('/scratch/d/f', 'w')\nos.chmod('/scratch/d', 0)",
        "os.symlink('/usr', '/scratch/usr')",
    ],
)
def test_what_one_run_leaves_takes_no_room_from_the_next(sandbox: Sandbox, fill: str) -> None:
    program = f"import os\nprint(input(), flush=True)\n{fill}"
    results = sandbox.run_each(program, ["1", "2", "3"])
    assert [result.stdout for result in results] == ["1\n", "2\n", "3\n"], results
    tested = sandbox.test_each(
        f"import os\ntry:\n  exec({fill!r})\nexcept OSError:\n  pass", ["assert os", "assert os"]
    )
    assert [result.outcome for result in tested] == ["ok", "ok"]


def test_files_that_do_not_fit_are_refused_before_a_run(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="do not fit scratch_bytes"):
        sandbox.run("", files={"a": "x" * (2 << 20)})


def test_no_program_sees_the_one_before(sandbox: Sandbox) -> None:
    assert sandbox.run("open('/scratch/mine', 'w')\nimport builtins\nbuiltins.mine = 1").ok
    assert (
        sandbox.run("import os; print(os.listdir('/scratch'), 'mine' in dir(__builtins__))").stdout == "['1'] False\n"
    )


def test_a_command_has_the_same_walls(sandbox: Sandbox) -> None:
    assert sandbox.command(["cat", "-", "note"], "in ", {"note": "file"}).stdout == "in file"
    assert sandbox.command(["sh", "-c", "exit 3"]).text == "exit code 3"
    missing = sandbox.command(["no-such-command"])
    assert missing.outcome == "error" and "cannot be started" in missing.text


def test_packages_are_imported_where_they_are_named(sandbox: Sandbox, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mine.py").write_text("ONE = 1")
    tmp_path.chmod(0o755)  # as an installed package is: it is read by a user who owns nothing
    with Sandbox(isolation=sandbox.isolation, packages=[str(tmp_path)], warm=1) as made:  # type: ignore[arg-type]
        result = made.run(f"import mine; print(mine.ONE)\nopen({str(tmp_path / 'mine.py')!r}, 'a')")
    assert result.stdout == "1\n" and result.outcome == "error"
    assert (tmp_path / "mine.py").read_text() == "ONE = 1"


def test_many_threads_share_it(sandbox: Sandbox) -> None:
    results: list[Result] = []
    threads = [threading.Thread(target=lambda n=n: results.append(sandbox.run(f"print({n})"))) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(int(result.stdout) for result in results) == list(range(12))


@pytest.mark.parametrize("how", ["bwrap", "unshare", "none"])
def test_nothing_is_left_when_the_parent_is_killed(how: str) -> None:
    if how != "none" and tried(how):
        pytest.skip(tried(how))
    program = """
import sys, threading, time
from rlhf_dist.sandbox import Limits, Sandbox
sandbox = Sandbox(Limits(wall_s=100, cpu_s=100), isolation=sys.argv[1], warm=2)
threading.Thread(target=sandbox.run, args=("import os, time\\nos.fork()\\nwhile True: time.sleep(0.1)",)).start()
print(sandbox.run("print(1)"), flush=True)
time.sleep(1)
print("ready", flush=True)
"""
    parent = subprocess.Popen([sys.executable, "-c", program, how], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert "ok" in parent.stdout.readline() and parent.stdout.readline() == "ready\n"
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 3
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    gone, alive = psutil.wait_procs(family, timeout=20)
    # Without isolation a copy that the program made of itself outlives it: that is what isolation is for.
    assert len(alive) <= (1 if how == "none" else 0), alive
    for process in alive:
        process.kill()


def test_closing_ends_all_and_says_so_after(sandbox: Sandbox) -> None:
    made = Sandbox(isolation=sandbox.isolation, warm=2)  # type: ignore[arg-type]
    assert made.run("print(1)").ok
    made.close()
    deadline = time.monotonic() + 20
    while any(thread.name == "sandbox-starter" and made._starter is thread for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(SandboxError, match="closed"):
        made.run("print(1)")


def test_without_isolation_it_refuses_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
    isolation.found.cache_clear()
    isolation.tried.cache_clear()
    try:
        refused = Sandbox()
        for result in (refused.run("print(1)"), refused.test("", ""), refused.command(["true"])):
            assert result.outcome == "refused"
            assert "bwrap is not installed" in result.text and 'isolation="none"' in result.text
    finally:
        isolation.found.cache_clear()
        isolation.tried.cache_clear()
    with Sandbox(isolation="none", warm=1) as told:
        assert told.run("print(1)").stdout == "1\n"
        assert told.test("def f(): return 1", "assert f() == 1").ok
        assert told.run("while True: print('x' * 1000)").outcome == "output"


def test_an_interpreter_that_ends_is_replaced_once(sandbox: Sandbox) -> None:
    """Somebody else ends it: that is no outcome of the program."""
    with Sandbox(LIMITS, isolation=sandbox.isolation, warm=0) as made:  # type: ignore[arg-type]
        assert _with_kills(made, 1, "import time; time.sleep(1.5); print(1)").stdout == "1\n"
        with pytest.raises(SandboxError, match="of 2 interpreters"):
            _with_kills(made, 2, "import time; time.sleep(9)")


def _with_kills(made: Sandbox, times: int, program: str) -> Result:
    """The program, of whose interpreters so many are killed while they run it."""

    def kill() -> None:
        killed: set[int] = set()
        while len(killed) < times:
            time.sleep(0.3)
            with made._changed:
                ready = {one._process.pid for one in made._ready if not isinstance(one, SandboxError)}
                if made._in_use and not made._wanted:
                    for child in psutil.Process().children():
                        if child.pid not in ready | killed and child.name() == made.isolation:
                            killed.add(child.pid)
                            child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        return made.run(program)
    finally:
        killer.join()


@pytest.mark.parametrize("limit", [{"wall_s": 0}, {"memory_bytes": -1}, {"processes": 1}])
def test_limits_that_are_none_are_refused(limit: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"sandbox limit {next(iter(limit))} must be >"):
        Limits(**limit)  # type: ignore[arg-type]
