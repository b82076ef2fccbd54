"""`check_environment` passes what ships, and says of each fault what it is."""

from __future__ import annotations

import itertools
import threading

import pytest

from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row, TextCalls
from rlhf_dist.environments.calculator import Calculator
from rlhf_dist.environments.higher_lower import HigherLower
from rlhf_dist.testing import CheckFailed, check_environment

ROWS = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "1+9=", "answer": "10"}]


def test_the_calculator_passes() -> None:
    calculator = Calculator(parser=TextCalls(begin=":", end="="), argument="text", turn_tokens=8, forgiving=True)
    transcripts = check_environment(calculator, ROWS, n=3, limits=EpisodeLimits(turns=4))
    assert len(transcripts) == 6
    said = [piece for episode in transcripts for piece in episode]
    assert {piece["who"] for piece in said} == {"prompt", "model", "environment"}
    assert any("error: " in piece["text"] for piece in said if piece["who"] == "environment")


def test_the_game_passes_and_has_a_reward_each_turn() -> None:
    rows = [{"prompt": "a number: ", "answer": answer} for answer in ("7", "")]
    for episode in check_environment(HigherLower(), rows):
        turns = [piece["reward"] for piece in episode if piece["who"] == "model"]
        assert all(reward is not None for reward in turns) and (turns[-1] == 1.0 or len(turns) == 4)


class Counts(Environment):
    """Keeps something on itself."""

    count = itertools.count()

    async def episode(self, chat: Chat, row: Row) -> None:
        await chat.generate(max_tokens=3)
        chat.reward(float(next(self.count)))


class Forgets(Environment):
    async def episode(self, chat: Chat, row: Row) -> None:
        await chat.generate(max_tokens=3)


class Locked(Forgets):
    def __init__(self) -> None:
        self.lock = threading.Lock()


class Elsewhere(Forgets):
    reads = ("row_id", "prompt_ids", "values")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (Counts(), r"Counts: episode 0 of row 0 has other rewards when it is played again: \{0: 0.0\} and \{0: 4.0\}"),
        (Forgets(), r"Forgets: episode 0 of \{'prompt': '2\+2=', .*turn 1: environment_error: .*chat.reward"),
        (Locked(), "Locked: it cannot be sent to workers: TypeError: cannot pickle '_thread.lock' object"),
        (Elsewhere(), r"Elsewhere: .*reads column 'values' .*which the batch does not have"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_fault_is_said(environment: Environment, says: str) -> None:
    with pytest.raises(CheckFailed, match=says):
        check_environment(environment, ROWS)
