"""Every exception of our packages survives a trip between processes; what a worker says of one needs no trip."""

from __future__ import annotations

import ast
import builtins
import copy
import gc
import importlib
import inspect
import pickle
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from controller.cluster.failure_text import explained
from rlhf_dist.failure import Failure, failure_of_call, text_of
from rlhf_dist.python_files import load_file
from rlhf_dist.wire import Call
from workers.failures import failure_of, is_users, reported
from workers.heartbeat import Activity

ROOT = Path(__file__).parents[1]
PACKAGES = ("rlhf_dist", "workers", "controller", "recipes", "benchmarks")


def exception_classes() -> list[tuple[str, str]]:
    """(module, class) of every exception that our packages define, found in their sources."""
    bases: dict[tuple[str, str], list[str]] = {}
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[module, node.name] = [ast.unparse(base).split(".")[-1] for base in node.bases]
    known = {n for n, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)}
    found: set[tuple[str, str]] = set()
    while new := {at for at, names in bases.items() if at not in found and known & set(names)}:
        found |= new
        known |= {name for _, name in new}
    return sorted(found)


def an_instance(kind: type[BaseException]) -> BaseException:
    """One made with realistic arguments, by the annotations of its constructor."""
    values: dict[Any, Any] = {int: 7, str: "some text", float: 0.5, bool: True}
    builtin = (Exception, BaseException, KeyboardInterrupt, ValueError, RuntimeError)
    if kind.__init__ in [one.__init__ for one in builtin]:
        return kind("first line\nsecond line")
    hints = typing.get_type_hints(kind.__init__)
    arguments: dict[str, Any] = {}
    for name in list(inspect.signature(kind.__init__).parameters)[1:]:
        hint = hints[name]
        if typing.get_origin(hint) in (tuple, Sequence, Iterable):
            inner = values[typing.get_args(hint)[0]]
            arguments[name] = (inner, inner)
        elif typing.get_origin(hint) is typing.Literal:
            arguments[name] = typing.get_args(hint)[0]
        else:
            arguments[name] = values[hint]
    return kind(**arguments)


def test_the_search_finds_the_exceptions_that_are_known() -> None:
    names = {name for _, name in exception_classes()}
    assert {"WeightSyncError", "SyncStopped", "NonFiniteLoss", "OutOfTime", "ConfigError", "WorkerLost"} <= names


@pytest.mark.parametrize(("module", "name"), exception_classes())
def test_an_exception_is_the_same_after_a_round_trip(module: str, name: str) -> None:
    made = an_instance(getattr(importlib.import_module(module), name))
    made.rows_file = "set later"  # type: ignore[attr-defined]
    made.add_note("a note")
    for back in (pickle.loads(pickle.dumps(made)), copy.copy(made)):
        assert type(back) is type(made) and str(back) == str(made) and vars(back) == vars(made)
        assert back.args == made.args


USERS = """
class Picky(Exception):
    def __init__(self, code, reason):
        super().__init__(f"{reason} ({code})")

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def inner(row):
    return {}[row]

def op(row):
    return inner(row)

def picky(row):
    raise Picky(3, "bad luck")

def wrapped(row):
    try:
        inner(row)
    except KeyError as error:
        raise Picky(4, "wrapped") from error

def mute(row):
    raise Mute

def leaves(row):
    raise SystemExit(3)
"""


class Worker:
    def __init__(self) -> None:
        self.activity, self.is_actor = Activity(), True

    @reported
    def call(self, function: Any) -> Any:
        return function("nope")


@pytest.fixture
def users(tmp_path: Path) -> Any:
    file = tmp_path / "users.py"
    file.write_text(USERS)
    return load_file(file)


def failed(function: Any) -> Failure:
    answer = Worker().call(function)
    assert isinstance(answer, Failure) and pickle.loads(pickle.dumps(answer)) == answer
    return answer


def test_a_failure_names_the_users_lines_and_the_log_has_the_whole_traceback(users: Any, capfd: Any) -> None:
    text = explained(failed(users.op), "runs/x/logs/host-0.log")
    assert text.startswith(
        f"KeyError: 'nope'; at {users.__file__}:11 in inner: return {{}}[row], called from {users.__file__}:14 in op: "
        "return inner(row), "
    )
    assert text.endswith("; whole traceback in runs/x/logs/host-0.log") and "\n" not in text
    log = capfd.readouterr().err
    assert "call failed" in log and "Traceback (most recent call last)" in log and "test_exceptions.py" in log


def test_a_failure_shows_where_its_cause_was_raised(users: Any) -> None:
    text = explained(failed(users.wrapped), None)
    assert text.startswith("Picky: wrapped (4); at ") and ":11 in inner: return {}[row]" in text


def test_errors_that_cannot_travel_are_shown_by_their_text(users: Any) -> None:
    assert failed(users.picky).text == "Picky: bad luck (3)"
    assert failed(users.leaves).text == "SystemExit: 3"
    assert failed(users.mute).text == "Mute (its text cannot be made: RuntimeError)"
    assert len(text_of(ValueError("x" * 10**6))) < 5000


def test_an_interrupt_in_an_actor_is_a_failure_and_in_a_local_run_the_users() -> None:
    def interrupts(row: str) -> None:
        raise KeyboardInterrupt

    worker = Worker()
    assert worker.call(interrupts).text == "KeyboardInterrupt"
    worker.is_actor = False
    with pytest.raises(KeyboardInterrupt):
        worker.call(interrupts)


def test_a_failure_says_whether_it_is_about_another_rank() -> None:
    closed = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]")
    assert failure_of(closed).secondary and not failure_of(ValueError("Connection closed by peer")).secondary
    assert not failure_of(RuntimeError("a user's own")).secondary


def test_without_lines_of_the_user_a_bug_shows_its_place_and_an_error_of_ours_its_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from workers.engines.generation.interface import Arrivals
    from workers.process import WorkerProcess

    monkeypatch.setattr(sys, "breakpointhook", sys.breakpointhook)  # a worker sets one for its process
    bug = WorkerProcess("main", 0, 1, None).call("actor", "op", Call(step=0, node="n", line="l", seed=0, num_rows=0))
    assert isinstance(bug, Failure)
    assert re.fullmatch(r"KeyError: 'actor'; at workers/process.py:\d+ in call: .*", explained(bug, None))
    with pytest.raises(RuntimeError) as caught:
        Arrivals(1, {}, torch.float32).check_complete()
    assert caught.value.__traceback__ is not None
    ours = failure_of(caught.value.with_traceback(caught.value.__traceback__.tb_next))
    assert ours.text.startswith("WeightSyncError: weight sync of version 1 failed") and not ours.frames


def test_a_process_imports_ahead_without_collections_and_leaves_errors_to_the_role(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from workers.process import WorkerProcess

    (tmp_path / "looked_at.py").write_text("import gc\nwas = gc.isenabled()\n")
    (tmp_path / "broken.py").write_text("import looked_at\nraise OSError('no such library')\n")
    monkeypatch.setattr(sys, "breakpointhook", sys.breakpointhook)
    monkeypatch.syspath_prepend(tmp_path)
    process = WorkerProcess("main", 0, 1, None)
    assert process.import_ahead(["broken", "never_reached"]) is None
    assert not sys.modules["looked_at"].was and gc.isenabled()
    failure = process.host_role("actor", "broken:Worker", {}, {})
    assert isinstance(failure, Failure) and "no such library" in failure.text and gc.isenabled()


def test_breakpoint_in_a_worker_says_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.process import WorkerProcess

    monkeypatch.setattr(sys, "breakpointhook", sys.breakpointhook)
    WorkerProcess("main", 0, 1, None)
    with pytest.raises(RuntimeError, match="needs a terminal, and a worker has none.*--eager"):
        breakpoint()


def test_which_files_are_the_users() -> None:
    assert not any(map(is_users, (ast.__file__, pytest.__file__, "<string>", str(ROOT / "workers" / "process.py"))))
    assert is_users(str(ROOT / "recipes" / "policy_gradient" / "ppo.py")) and is_users(__file__)


def test_what_ray_could_not_hand_over_is_read_from_its_text() -> None:
    from ray.exceptions import ActorDiedError, RayTaskError, UnserializableException

    lost = failure_of_call(ActorDiedError())
    assert lost.lost and lost.text == "its process died or stopped answering (ActorDiedError)"
    unread = failure_of_call(UnserializableException("Traceback ...\n  File x\nmine.Picky: bad luck (3)\n"))
    assert not unread.lost and unread.text == "mine.Picky: bad luck (3)"
    raised = failure_of_call(RayTaskError("f", "Traceback", ValueError("no such loss")))
    assert not raised.lost and raised.text == "ValueError: no such loss"
