"""What a run is asked about its size, and what it says: the files, and the rules."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from controller.cluster.local import Local
from controller.commands.cli import main
from controller.lifecycle.folder_lock import held
from controller.lifecycle.scaling import ASKED, LOOK_S, Answer, NotScaled, Request, Scaling, ask, slots_for
from controller.lifecycle.session import Session, team_of
from rlhf_dist.compose import compose

GIVEN = ("model.path=/m", "task=addition", "placement.pools.main.slots=2")
APART = ("placement.pools.gen.slots=4", "placement.rollout=gen")


def session(*settings: str) -> Session:
    return Session(compose("grpo", [*GIVEN, *settings]), Local(1.0), {}, {})


def asked(replicas: int, pool: str = "gen") -> Request:
    return Request(id="1", pool=pool, replicas=replicas)


def test_a_pool_that_only_generates_has_teams_of_the_ranks_that_hold_a_copy_together() -> None:
    apart = session(*APART, "actor.rollout.tensor_parallel=2")
    assert [team_of(apart.launch, name) for name in ("main", "gen")] == [0, 2]
    assert team_of(session(*APART, "placement.roles.reference=gen").launch, "gen") == 0, "it scores, too"
    assert slots_for(apart, asked(3)) == 6


@pytest.mark.parametrize(
    ("settings", "request_", "rule"),
    [
        (APART, asked(2, "rollout"), "unknown pool rollout; there is main, gen"),
        (APART, asked(4), "has 4 replicas already"),
        (APART, asked(0), "at least one replica, got 0"),
        (APART, asked(4, "main"), "does more than generate"),
        (("placement.pools.gen.slots=1", "placement.pools.gen.nodes=2", "placement.rollout=gen"), asked(4), "nodes=2"),
    ],
    ids=["unknown", "same", "none", "trains", "nodes"],
)
def test_what_cannot_be_is_refused_with_its_rule(settings: tuple[str, ...], request_: Request, rule: str) -> None:
    with pytest.raises(NotScaled, match=rule):
        slots_for(session(*settings), request_)


def test_a_request_is_read_once_answered_and_leaves_no_file(tmp_path: Path) -> None:
    answers: list[Answer] = []
    (tmp_path / ASKED).write_text(json.dumps({"id": "old", "pool": "gen", "replicas": 1}))
    scaling = Scaling(tmp_path)
    assert scaling.look() is None, "an earlier run was asked that"
    with held(tmp_path, print):
        asking = threading.Thread(target=lambda: answers.append(ask(tmp_path, "gen", 3, 20.0)))
        asking.start()
        while (found := scaling.look()) is None:
            pass
        assert (found.pool, found.replicas) == ("gen", 3)
        with pytest.raises(NotScaled, match="asked already"):
            ask(tmp_path, "gen", 4, 1.0)
        scaling.answer(Answer(done=True, text="yes"))
        asking.join(20.0)
    assert answers == [Answer(done=True, text="yes")] and not list(tmp_path.glob("scale*"))


def test_a_withdrawn_request_is_not_done_and_an_answer_leaves_the_next_one_alone(tmp_path: Path) -> None:
    def ask_for(id: str, replicas: int) -> None:
        (tmp_path / ASKED).write_text(json.dumps({"id": id, "pool": "gen", "replicas": replicas}))

    scaling = Scaling(tmp_path)
    ask_for("a", 2)
    assert scaling.look() == Request(id="a", pool="gen", replicas=2)
    (tmp_path / ASKED).unlink()
    assert scaling.look() is None, "who asked has given up"
    time.sleep(LOOK_S)
    ask_for("b", 3)
    assert scaling.look() == Request(id="b", pool="gen", replicas=3)
    ask_for("c", 4)
    scaling.answer(Answer(done=True, text="yes"))
    assert (tmp_path / "scale-b.json").exists()
    time.sleep(LOOK_S)
    assert scaling.look() == Request(id="c", pool="gen", replicas=4)


def test_the_command_says_in_one_line_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", str(tmp_path), "--pool", "gen", "--replicas", "2"]) == 1
    assert "has no run under way" in capsys.readouterr().err
