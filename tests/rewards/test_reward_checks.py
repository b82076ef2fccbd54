"""The graph carries the columns that a reward function names; a name that is no column is found before the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.compose import Launch, compose
from rlhf_dist.reward_checks import check_rewards
from rlhf_dist.typed import ConfigError

SOURCE = """
from rlhf_dist.rewards import adapt

def plain(prompt, response, answer): return 0.0
def named(response, finished, rollout_log_probs): return 0.0
def other(text): return 0.0
adapted = adapt(other, text="response")
def levelled(response, level): return float(level)
def asks(question, response): return 0.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "rewards_to_check.py"
    file.write_text(SOURCE)
    return file


def launch(file: Path, name: str) -> Launch:
    rows = file.with_name("rows.jsonl")
    rows.write_text('{"prompt": "1+1=", "answer": "2", "level": 3}\n')
    return compose("grpo", ["model.path=/m", "task=none", f"data.train.path={rows}", f"reward.function={file}:{name}"])


def read(launch: Launch) -> set[str]:
    (node,) = (node for node in launch.dataflow if node.role == "reward")
    return set(node.inputs[0].columns)


def test_a_reward_reads_the_columns_it_names_and_no_others(file: Path) -> None:
    plain, named = launch(file, "plain"), launch(file, "named")
    assert read(named) - read(plain) == {"finished", "rollout_log_probs"}
    for one in (plain, named, launch(file, "adapted"), launch(file, "levelled")):
        check_rewards(one)


def test_a_name_that_is_no_column_is_refused_with_the_recipe_s_line(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"grpo.py:\d+: reward.function: other asks for 'text'.*there is .*response"):
        check_rewards(launch(file, "other"))
    with pytest.raises(ConfigError, match="reward.function: .*has no 'others'; did you mean 'other'"):
        check_rewards(launch(file, "others"))


def test_a_field_that_a_column_holds_under_another_name_is_no_field_of_its_own(file: Path) -> None:
    rows = file.with_name("questions.jsonl")
    rows.write_text('{"question": "1+1=", "answer": "2"}\n')
    settings = ["model.path=/m", "task=none", f"data.train.path={rows}", "data.train.prompt_key=question"]
    with pytest.raises(ConfigError, match="asks asks for 'question', and there is no column 'question'"):
        check_rewards(compose("grpo", [*settings, f"reward.function={file}:asks"]))


def test_a_file_that_ends_its_process_when_it_is_imported_is_named(file: Path) -> None:
    file.write_text("import sys\n\nsys.exit(3)\n")
    with pytest.raises(ConfigError, match=r"reward.function: .*ends its process when it is imported \(sys.exit\(3\)\)"):
        check_rewards(launch(file, "f"))
