"""`rlhf-dist rollouts`: rows that were kept and episodes that were lost, turn by turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from controller.commands.cli import main
from rlhf_dist.batch import Batch, Column
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from tests.episodes.conftest import Play
from workers.episodes.rows import episode_columns, log_lost


class Tool(Environment):
    async def episode(self, chat: Chat, row: Row) -> None:
        for _ in range(2):
            await chat.generate(max_tokens=3)
            chat.reward(0.5)
            chat.say("\nok:")
            if row.prompt == "9-9=":
                raise OSError("no tool")


@pytest.fixture
def run(play_all: Play, tmp_path: Path) -> Path:
    kept, lost = play_all(Tool(), EpisodeLimits(turns=4), texts=("2+2=", "9-9="))
    columns = {name: column for name, column in episode_columns([kept], rewards=True).items() if "ids" not in name}
    columns |= {"group_id": Column.dense(np.array([7])), "prompt": Column.strings(["2+2="])}
    Batch(columns).write_parquet(tmp_path / "rollouts" / "step_000004.parquet")
    log_lost([({"step": 4, "group_id": 8, "copy": 1}, lost)], tmp_path / "episodes" / "lost_actor_rank_0.jsonl")
    return tmp_path


def test_rows_are_shown_turn_by_turn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "step 4, row 1 of 1: group 7, finished, 2 turns, reward 1"
    assert said[1].split() == ["prompt", "5", "tokens,", "masked", "<bos>2+2="]
    assert said[2].startswith("  model turn 0, 3 tokens, v0, reward 0.5")
    assert said[3].split() == ["environment", "4", "tokens,", "masked"] and said[4].endswith(" ok:")
    assert said[5].startswith("  model turn 1, 3 tokens, v0, reward 0.5")


def test_leaves_are_shown_with_their_branch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "rollouts" / "step_000004.parquet"
    batch = Batch.read_parquet(file)
    batch.with_columns({"branch": Column.strings(["0/2"])}).write_parquet(file)
    assert main(["rollouts", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said == "step 4, row 1 of 1: group 7, branch 0/2, finished, 2 turns, reward 1"


def test_lost_episodes_are_shown_with_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", str(run), "--lost"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("step 4, group 8, copy 1: environment_error in turn 1: OSError: no tool\n")
    assert 'raise OSError("no tool")' in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--step", "5"], "rollouts; those of step 4 were"),
        (["--outcome", "turns"], "no episodes with outcome 'turns'; there are 1 finished"),
        (["--lost", "--step", "5"], "no lost episodes in"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
    ],
)
def test_what_is_not_there_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["rollouts", str(run), *arguments]) == 2
    assert says in capsys.readouterr().err
