"""Environments that ship: what each makes of what a model says, on a script and on a real engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from rlhf_dist.environments import Environment, EpisodeLimits, PolicyError, Reply, Row, TextCalls
from rlhf_dist.environments.attempts import Attempts
from rlhf_dist.environments.gymnasium import FromGymnasium
from rlhf_dist.environments.matrix_game import MatrixGame, exploitability
from rlhf_dist.environments.python_tool import PythonTool
from rlhf_dist.environments.search_tool import Index, Search, read_corpus
from rlhf_dist.environments.simulated_user import SimulatedUser
from rlhf_dist.rewards.reasoning_gym import answer_json, reasoning_gym
from rlhf_dist.sandbox import Limits, Result
from rlhf_dist.testing import check_environment
from workers.episodes.chat import in_thread


@dataclass
class Script:
    """A chat whose turns are given."""

    turns: list[str]
    row: Row
    others: dict[str, Script] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def say(self, text: str, role: str = "user") -> None:
        self.said.append(text)

    async def generate(self, *, max_tokens: int | None = None) -> Reply:
        text = self.turns.pop(0)
        return Reply(text=text, raw=text, finished=True, tokens=len(text))

    def reward(self, value: float) -> None:
        self.rewards.append(value)

    def speaker(self, name: str) -> Script:
        return self.others[name]

    async def run(self, function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
        return function(*arguments)


def played(
    environment: Environment, turns: Sequence[str], others: dict[str, Script] | None = None, **row: Any
) -> Script:
    environment.prepare()
    script = Script(list(turns), Row({"prompt": "", "answer": "", **row}), others or {})
    asyncio.run(environment.episode(script, script.row))  # type: ignore[arg-type]
    return script


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = ["Paris is the capital of France.", "Rome is the capital of Italy.", "The Seine flows through Paris."]
    parquet.write_table(pa.table({"text": texts, "number": [1, 2, 3]}), tmp_path / "corpus.parquet")
    return tmp_path / "corpus.parquet"


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_a_search_finds_what_shares_words_with_the_query(corpus: Path) -> None:
    index = Index(read_corpus(corpus, "text"))
    assert [at for at, _ in index.search("capital Italy", 3)] == [1, 0], "both words before one of them"
    assert index.search("zebra", 3) == [] and index.search("?", 3) == []
    equal = Index(["bb aa", "aa cc", "bb", "aa cc", "aa"])
    scores = equal.search("aa", 9)
    assert scores == sorted(scores, key=lambda one: (-one[1], one[0])) and sorted(at for at, _ in scores) == [
        0,
        1,
        3,
        4,
    ]
    assert equal.search("aa", 2) == scores[:2]
    environment = Search(corpus=str(corpus), results=1, passage_characters=12)
    talk = played(environment, [call("search", query="Seine"), "It is paris, of course"], answer="Paris")
    assert talk.said == ["[1] The Seine fl ... (18 characters more)"] and talk.rewards == [0.0, 1.0]
    talk = played(environment, [call("search", query="zebra"), call("find", query="x"), "Rome"], answer="Paris")
    assert talk.said[0] == "nothing was found" and "there is no tool 'find'" in talk.said[1]
    assert talk.rewards[-1] == 0.0


@pytest.mark.parametrize(
    ("file", "column", "says"),
    [
        ("no.parquet", "text", "a corpus is a Parquet or JSON-lines file, and there is no"),
        ("corpus.parquet", "body", "has no column 'body'; it has text, number"),
        ("corpus.parquet", "number", "column 'number' must be text, row 0 is int"),
    ],
)
def test_a_corpus_that_is_none_is_said_before_an_episode_begins(
    corpus: Path, file: str, column: str, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Search(corpus=str(corpus.parent / file), column=column).prepare()


def test_programs_run_in_a_sandbox_and_the_model_reads_what_they_print() -> None:
    environment = PythonTool(output_characters=20)
    turns = ["<code>\nprint(17 * 23)\n</code>", "<code>1 / 0</code>", "<code>print('x' * 50)</code>", "391"]
    talk = played(environment, turns, answer="391")
    assert talk.said[0] == "391" and talk.said[1] == "error: ZeroDivisionError: division by zero"
    assert talk.said[2] == "xxxxxxxxxxxxxxxxxxxx ... (30 characters more)" and talk.rewards[-1] == 1.0
    with pytest.raises(PolicyError, match="<code> is not closed"):
        played(PythonTool(forgiving=False, parser=TextCalls()), ["<code>print(1)"])


def test_a_place_in_the_sandbox_may_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def run(self, code: str) -> Result:
            time.sleep(0.2)
            return Result(outcome="ok", stdout="1")

    class Threaded(Script):
        async def run(self, function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
            return await in_thread(function, arguments, 0.1 if seconds is None else seconds)

    monkeypatch.setattr("rlhf_dist.environments.python_tool.sandbox_of", lambda limits: Full())
    chat: Any = Threaded([], Row({}))
    assert asyncio.run(PythonTool(sandbox=Limits(wall_s=0.01)).use(chat, "")) == "1"


def test_attempts_at_a_puzzle_sum_to_the_best_score() -> None:
    answer = answer_json("chain_sum", {"question": "1+2", "answer": "3", "metadata": {}})
    talk = played(Attempts(verifier=reasoning_gym, attempt_price=0.125), ["4", "<answer>3</answer>"], answer=answer)
    assert talk.rewards[1] == pytest.approx(1.0 - talk.rewards[0] - 0.125) and len(talk.said) == 1
    assert sum(played(Attempts(verifier=reasoning_gym, attempts=2), ["4", "5"], answer=answer).rewards) < 1


def test_a_user_says_what_it_wants_and_when_it_has_it() -> None:
    user = Script(["a number please", "larger", "DONE, thanks"], Row({}))
    talk = played(SimulatedUser(exchange_price=0.5), ["3", "30"], {"user": user}, prompt="a number over 20")
    assert "What you want: a number over 20" in user.said[0] and user.said[1:] == ["3", "30"]
    assert talk.said == ["a number please", "larger"] and talk.rewards == [0.0, -0.5, 1.0]
    stubborn = Script(["no"] * 4, Row({}))
    assert played(SimulatedUser(exchanges=3), ["a", "b", "c"], {"user": stubborn}).rewards == [0.0, 0.0, 0.0]


FROZEN_LAKE = FromGymnasium(
    id="FrozenLake-v1",
    arguments={"is_slippery": False, "render_mode": "ansi"},
    actions=("left", "down", "right", "up"),
    nonsense_reward=-0.5,
)


def test_a_gymnasium_environment_is_played_in_words() -> None:
    way = ["down", "I go down", "right", "right", "umm", "down", "right"]
    talk = played(FROZEN_LAKE, way)
    assert talk.said[0].startswith("SFFF\nFHFH") and "no action; say one of left, down" in talk.said[5]
    assert talk.rewards == [0.0, 0.0, 0.0, 0.0, -0.5, 0.0, 1.0]
    assert played(FROZEN_LAKE, ["down", "right"]).rewards == [0.0, 0.0], "a hole ends it"
    numbers = FromGymnasium(id="FrozenLake-v1", arguments={"is_slippery": False}, steps=2)
    assert played(numbers, ["7", "1"]).said[0] == "0\n", "without a drawing, the observation"
    with pytest.raises(TypeError, match="plays Discrete and Text actions, Pendulum-v1 has Box"):
        played(FromGymnasium(id="Pendulum-v1"), ["1"])


def test_a_matrix_game_pays_both_sides_and_knows_its_equilibrium() -> None:
    other = Script(["2"], Row({}))
    mine = played(MatrixGame(), ["1"], {"opponent": other})
    assert (mine.rewards, other.rewards) == ([-1.0], [1.0])
    other = Script(["2"], Row({}))
    mine = played(MatrixGame(), ["x"], {"opponent": other})
    assert (mine.rewards, other.rewards) == ([-2.0], [0.0])
    # Rock pays 1 or -1, with scissors against rock 2: A q = 0 for q = (1/4, 1/2, 1/4), and the same for the other side.
    payoffs, q = ((0.0, -1.0, 2.0), (1.0, 0.0, -1.0), (-2.0, 1.0, 0.0)), np.array([0.25, 0.5, 0.25])
    assert exploitability(payoffs, q, q) == pytest.approx(0.0)
    # Against always-0 the best answer 1 wins 1, and against always-0 of the first side the second's best pays -(-1).
    pure = np.array([1.0, 0.0, 0.0])
    assert exploitability(payoffs, pure, pure) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("environment", "speakers"),
    [
        (Attempts(verifier=reasoning_gym, attempts=2, attempt_tokens=6), ()),
        (FROZEN_LAKE, ()),
        (PythonTool(turn_tokens=8), ()),
        (SimulatedUser(exchanges=2, turn_tokens=4, user_tokens=4, instruction="{prompt}"), ("user",)),
        (MatrixGame(), ("opponent",)),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Environment) else "",
)
def test_what_ships_passes_the_check_of_environments(environment: Environment, speakers: tuple[str, ...]) -> None:
    answer = answer_json("chain_sum", {"question": "1+2", "answer": "3", "metadata": {}})
    check_environment(
        environment, [{"prompt": "1+2=", "answer": answer}], speakers=speakers, limits=EpisodeLimits(seconds=300)
    )
