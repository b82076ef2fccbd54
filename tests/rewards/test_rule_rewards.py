"""Rule rewards: the verifiers, and what a faulty function turns into."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from rlhf_dist.batch import Batch, Column
from rlhf_dist.rewards import (
    RewardFunctionError,
    exact_match,
    math_verify,
    reasoning_gym,
    reasoning_gym_solved,
    rule_rewards,
)
from rlhf_dist.rewards.reasoning_gym import answer_json, final_answer
from rlhf_dist.rewards.time_limit import OutOfTime, time_limit


def test_exact_match_ignores_white_space_around_the_text() -> None:
    assert exact_match("", " 12\n", "12") == 1.0
    assert exact_match("", "1 2", "12") == 0.0


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("so the answer is $\\boxed{\\frac{2}{4}}$", "1/2", 1.0),
        ("It is 7.", "7", 1.0),
        ("It is 8.", "7", 0.0),
        ("$x^2 + 2x + 1$", "$(x+1)^2$", 1.0),
        ("no idea", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_math_verify_compares_by_meaning(response: str, answer: str, reward: float) -> None:
    assert math_verify("", response, answer) == {"reward": reward, "timed_out": 0.0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_math_verify_gives_up_on_what_takes_for_ever_and_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package exports a function of the same name, so the module is taken from where Python keeps it.
    monkeypatch.setattr(sys.modules["rlhf_dist.rewards.math_verify"], "TIMEOUT_S", 0.5)
    endless = "$" + "+".join(f"\\sin(x^{{{k}}})^{{{k}}}" for k in range(2, 400)) + "$"
    assert math_verify("", endless, "7") == {"reward": 0.0, "timed_out": 1.0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_time_limit_holds_even_where_its_first_exception_is_swallowed() -> None:
    swallowed: list[BaseException] = []

    class Slow:
        def __del__(self) -> None:
            try:
                time.sleep(5)
            except BaseException as error:
                swallowed.append(error)
                raise

    started = time.monotonic()
    with pytest.raises(OutOfTime), time_limit(0.1):
        Slow()
        time.sleep(5)
    assert len(swallowed) == 1 and time.monotonic() - started < 3


def test_a_time_limit_that_is_not_reached_leaves_no_alarm_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) is before


def test_math_verify_refuses_to_run_where_it_cannot_be_stopped_and_without_a_usable_answer() -> None:
    with pytest.raises(ValueError, match="no mathematical expression"):
        math_verify("", "7", "")
    raised: list[BaseException] = []

    def run() -> None:
        try:
            math_verify("", "7", "7")
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert "main thread" in str(raised[0])


@pytest.mark.parametrize(
    ("response", "numeric", "expected"),
    [
        ("<answer> 1 </answer> no, <answer>2</answer>.", True, "2"),
        ("3 + 4 = 7. So it is 7", True, "7"),
        ("It is -1,234.5!", True, "-1234.5"),
        ("I do not know", True, ""),
        ("thinking\n\nammonia \n\n", False, "ammonia"),
        ("", False, ""),
    ],
)
def test_final_answer(response: str, numeric: bool, expected: str) -> None:
    assert final_answer(response, numeric=numeric) == expected


def test_reasoning_gym_scores_with_the_data_sets_own_verifier() -> None:
    import reasoning_gym as library

    for name, arguments in (("chain_sum", {"max_terms": 2}), ("spell_backward", {"max_word_len": 5})):
        entry = library.create_dataset(name, size=1, seed=3, **arguments)[0]
        answer = answer_json(name, entry)
        assert reasoning_gym("", f"It is\n{entry['answer']}", answer) == 1.0
        assert reasoning_gym_solved("", f"<answer>{entry['answer']}</answer> is what I say.", answer) == 1.0
        assert reasoning_gym("", "", answer) < 1.0
        assert reasoning_gym_solved("", "99999", answer) == 0.0


def test_reasoning_gym_says_what_the_answer_column_must_hold() -> None:
    for answer in ("7", "{}", json.dumps({"dataset": 1, "entry": {}})):
        with pytest.raises(ValueError, match="must hold JSON"):
            reasoning_gym("", "7", answer)


def rows_of(*responses: str) -> Batch:
    return Batch(
        {
            "prompt": Column.strings(["p"] * len(responses)),
            "response": Column.strings(responses),
            "answer": Column.strings(["a"] * len(responses)),
        }
    )


def test_rule_rewards_is_a_column_and_the_mean_of_every_named_score() -> None:
    def scored(prompt: str, response: str, answer: str) -> dict[str, float]:
        return {"reward": len(response), "format": float(response == "bb")}

    result = rule_rewards(scored, rows_of("", "bb"))
    assert result.columns["rewards"].values.tolist() == [0, 2]
    assert result.columns["rewards"].values.dtype == np.float32
    found = {name: metric.value for name, metric in result.metrics.items()}
    assert found == {"reward": 1.0, "reward_std": 1.0, "score/format": 0.5}
    assert rule_rewards(scored, rows_of()).columns.num_rows == 0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (float("nan"), "reward = nan; it must be finite"),
        (float("inf"), "must be finite"),
        (None, "reward = None, not a number"),
        ("high", "not a number"),
        ({"score": 1.0}, "without 'reward'"),
        ({"reward": 1.0, "part": float("nan")}, "part = nan"),
    ],
)
def test_a_reward_that_is_no_number_is_an_error_that_names_the_row(returned: object, message: str) -> None:
    def faulty(prompt: str, response: str, answer: str) -> object:
        return 1.0 if response == "fine" else returned

    with pytest.raises(RewardFunctionError, match=message) as caught:
        rule_rewards(faulty, rows_of("fine", "other"))
    assert "faulty for row 1 (prompt 'p', response 'other', answer 'a')" in str(caught.value)


def test_a_reward_function_that_raises_never_becomes_a_zero() -> None:
    def raises(prompt: str, response: str, answer: str) -> float:
        return 1 / len(response)

    with pytest.raises(RewardFunctionError, match=r"raises for row 1 .* raised ZeroDivisionError: division by zero"):
        rule_rewards(raises, rows_of("a", ""))


def test_scores_must_have_the_same_names_in_every_row() -> None:
    def changing(prompt: str, response: str, answer: str) -> dict[str, float]:
        return {"reward": 0.0, response: 1.0}

    with pytest.raises(RewardFunctionError, match="same names for every row"):
        rule_rewards(changing, rows_of("a", "b"))


def test_a_function_is_given_the_columns_it_names() -> None:
    batch = Batch.of(
        prompt=["p", "p"], response=["12", "3"], answer=["12", "12"], raw_response=["<think>12<eos>", "3"],
        source=["math", "code"], fields=["{}", '{"level": 2}'],
    )  # fmt: skip

    def tagged(prompt: str, response: str, answer: str, *, raw_response: str, fields: str) -> float:
        return float("<think>" in raw_response) + json.loads(fields).get("level", 0)

    assert rule_rewards(tagged, batch).columns["rewards"].values.tolist() == [1.0, 2.0]
    assert rule_rewards(exact_match, batch).columns["rewards"].values.tolist() == [1.0, 0.0]


def test_what_verl_s_columns_hold_as_json_is_an_object_again_and_plain_text_stays_text() -> None:
    batch = Batch.of(
        prompt=["p"] * 3, response=["r"] * 3, answer=['{"target": 3}', "[1, 2]", "42"],
        fields=['{"extra_info": "plain words"}', '{"extra_info": {"level": 2}}', "{}"],
    )  # fmt: skip
    seen: list[tuple[Any, Any]] = []

    def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> float:
        seen.append((ground_truth, extra_info))
        return 0.0

    batch = Batch({**batch, "source": Column.strings(["s"] * 3)}, 3)
    rule_rewards(compute_score, batch)
    assert seen == [({"target": 3}, "plain words"), ([1, 2], {"level": 2}), ("42", {})]
