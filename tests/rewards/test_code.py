"""Code as a reward: what is taken from a response, what tests look like, what passes."""

import asyncio
import json

import pytest

from rlhf_dist.batch import Batch, Column
from rlhf_dist.rewards import CodeTests
from rlhf_dist.rewards.child import Limits
from rlhf_dist.rewards.code import extract_code, read_tests, same_output
from rlhf_dist.rewards.load import load_reward
from rlhf_dist.rewards.process import ScoringProcess
from rlhf_dist.rewards.rule import arguments, reward_columns
from rlhf_dist.sandbox import isolation

SUM = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
PAIRS = json.dumps({"inputs": ["1 2\n", "2 2\n", "-1 1\n"], "outputs": ["3\n", "4", "0"]})
ADD = "```python\ndef add(a, b):\n    return a + b\n```"


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("First\n```python\nx = 1\n```\nthen\n```py\nx = 2\n```\nDone.", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```Python title=a.py\nx = 1\n```", "x = 1\n"),
        ("1. so:\n   ```python\n   x = 1\n   ```", "x = 1\n"),
        ("```bash\nls\n```", ""),
        ("```python\nx = 1\n```\n```text\n1\n```", "x = 1\n"),
        ("```python\nx = 1", ""),
        ("print(1)\n", "print(1)"),
        ("The answer is 4.", ""),
        ("", ""),
        ("x = '\0'", ""),
    ],
)
def test_code_is_the_last_block_of_python(response: str, code: str) -> None:
    assert extract_code(response) == code


def test_tests_are_read_in_the_forms_that_data_sets_have() -> None:
    assert read_tests(PAIRS).outputs == ("3\n", "4", "0")
    assert read_tests('{"inputs": [["1", "2"]], "outputs": [3]}').inputs == ("1\n2",)
    assert read_tests('["assert f(1)", "assert f(2)"]').asserts == ("assert f(1)", "assert f(2)")
    assert read_tests("assert f(1)").asserts == ("assert f(1)",)
    assert read_tests('{"test": "def check(c): assert c()", "entry_point": "f"}').asserts[0].endswith("check(f)\n")
    assert "add(*[1, 2])" in read_tests('{"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}').asserts[0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "at least one test"),
        ("[]", "at least one test"),
        ('{"inputs": [], "outputs": []}', "at least one test"),
        ('{"inputs": ["1"], "outputs": []}', "of one length"),
        ("{broken", "none"),
        ("[1]", "must hold texts"),
        ('{"fn_name": "os.system", "inputs": [[1]], "outputs": [3]}', "name of a function"),
        ('{"fn_name": "f", "inputs": [1], "outputs": [3]}', "list of arguments"),
        ('{"answer": 3}', "tests are inputs and outputs"),
    ],
)
def test_an_answer_that_is_no_tests_is_an_error(answer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(answer)


def test_output_is_compared_by_lines() -> None:
    assert same_output("1 \n2\n\n", "1\n2")
    assert not same_output("1\n\n2", "1\n2") and not same_output("1 2", "1  2") and not same_output("", "0")


PAIR = "```python\ndef add(a, b): return (a, b)\n```"
WRONG = "```python\nprint(3)\n```"
SPIN = "```python\nwhile True: pass\n```"
ROWS = [
    (SUM, PAIRS, 1.0, 1.0),
    (WRONG, PAIRS, 1 / 3, 0.0),
    ("no code", PAIRS, 0.0, 0.0),
    ("```python\n1/0\n```", PAIRS, 0.0, 0.0),
    (ADD, '["assert add(1, 2) == 3", "assert add(1, 2) == 4"]', 0.5, 0.0),
    (ADD, "assert add(1, 2) == 3\nassert add(2, 2) == 4", 1.0, 1.0),
    (ADD, '{"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [1, 2]]}', 1.0, 1.0),
    (PAIR, '{"fn_name": "add", "inputs": [[1, 2]], "outputs": [[1, 2]]}', 1.0, 1.0),
    (ADD, json.dumps({"test": "def check(c):\n    assert c(1, 2) == 3", "entry_point": "add"}), 1.0, 1.0),
    ("```python\nimport os\nos._exit(0)\n```", '["assert add(1, 2) == 3"]', 0.0, 0.0),
    ("```python\nprint(open('/etc/passwd').read())\n```", PAIRS, 0.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("function", ["code_tests", "code_solved"])
def test_a_reward_process_scores_code_of_many_rows_at_once(function: str) -> None:
    if not isolation.found()[0]:
        pytest.skip(isolation.found()[1])
    texts = {"response": [row[0] for row in ROWS], "answer": [row[1] for row in ROWS]}
    batch = Batch({name: Column.strings(values) for name, values in texts.items()}, len(ROWS))
    process = ScoringProcess(load_reward(f"rlhf_dist.rewards:{function}"), Limits())
    try:
        signature = load_reward(f"rlhf_dist.rewards:{function}").signature
        outcomes = process.score(arguments(signature, batch), len(ROWS), stop=False)
    finally:
        process.close()
    expected = [row[2] if function == "code_tests" else row[3] for row in ROWS]
    scored = reward_columns(function, batch, outcomes)
    assert list(scored.columns["rewards"].values) == pytest.approx(expected), outcomes
    assert scored.metrics["score/no_code"].value == pytest.approx(1 / len(ROWS))


def test_a_program_that_never_ends_is_a_score_and_said() -> None:
    if not isolation.found()[0]:
        pytest.skip(isolation.found()[1])
    from rlhf_dist.sandbox import Limits as SandboxLimits

    reward = CodeTests(limits=SandboxLimits(wall_s=1.0), row_s=0.5)
    scores = asyncio.run(reward(SPIN, PAIRS))
    assert scores == {"reward": 0.0, "passed": 0.0, "no_code": 0.0, "timed_out": 1.0}


def test_without_isolation_code_is_not_run_and_that_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_dist.sandbox.sandbox.found", lambda: ("", "nothing isolates programs"))
    with pytest.raises(RuntimeError, match="nothing isolates programs"):
        asyncio.run(CodeTests()(SUM, PAIRS))


def test_shipped_rewards_have_the_parameters_that_a_run_gives() -> None:
    for name in ("code_tests", "code_solved"):
        assert load_reward(f"rlhf_dist.rewards:{name}").signature.parameters == {"response": True, "answer": True}
    with pytest.raises(ValueError, match="share or all"):
        CodeTests(score="most")  # type: ignore[arg-type]
