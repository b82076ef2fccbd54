"""Several recipes in one launch: models handed over by name, resumed in the stage that was left, checked as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller import launch_stages
from controller.commands.cli import main
from controller.record.display import Display
from rlhf_dist.compose import compose
from rlhf_dist.stages import read_stages
from rlhf_dist.typed import ConfigError
from tests.runs.test_recipes import weights
from tests.tiny import save_llama

STAGES = """
model: {{path: {model}, dtype: float32}}
task: none
data.train.path: {data}
data.prompts_per_step: 4
output: {{root: {root}, checkpoint_every: 1, tracker: none, rollouts_every: 0}}
actor.optimizer.lr: 1e-2
actor.rollout: {{max_response_tokens: 4, engine: transformers}}
algorithm.mini_batches: 1
steps: 1
stages:
  sft: {{seed: 3}}
  rm:
    recipe: reward_model
    reward.model.path: ${{stage.sft.actor}}
    steps: 2
  ppo:
    actor.model.path: ${{stage.sft.actor}}
    critic.model.path: ${{stage.rm.reward}}
    reward.model.path: ${{stage.rm.reward}}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def stages(tiny: Path, data: Path, tmp_path: Path) -> Path:
    """A file of stages: rlhf.yaml."""
    file = tmp_path / "rlhf.yaml"
    file.write_text(STAGES.format(model=tiny, data=data, root=tmp_path / "runs"))
    return file


def test_sft_a_reward_model_and_ppo_resume_in_the_stage_that_was_left(
    stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """About 12 s: two launches of three stages."""
    whole = launch_stages(stages, local=True, quiet=True)
    assert [result.summary["steps"] for result in whole.values()] == [1, 2, 1]
    kept = json.loads((tmp_path / "runs/rlhf/summary.json").read_text())
    assert kept["stages"]["ppo"]["last"].keys() >= {"reward/reward", "critic/loss"}
    sft, ppo = (tmp_path / "runs/rlhf" / stage / "config.yaml" for stage in ("sft", "ppo"))
    assert f"{tmp_path}/runs/rlhf/sft/models/actor" in ppo.read_text() and "seed: 3" in sft.read_text()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Display, "step", interrupting("rm", Display.step))
        launch_stages(stages, "name=left", local=True, quiet=True)
    assert not (tmp_path / "runs/left/ppo").exists() and not (tmp_path / "runs/left/rm/models").exists()
    again = launch_stages(stages, "name=left", "resume=auto", local=True)
    assert "stage 1 of 3: sft: complete, 1 steps: skipped" in capsys.readouterr().out
    for stage, role in (("sft", "actor"), ("rm", "reward"), ("ppo", "actor"), ("ppo", "critic")):
        one, other = weights(whole[stage].models[role]), weights(again[stage].models[role])
        assert one.keys() == other.keys() and len(one) > 10
        assert all(np.array_equal(one[name], other[name]) for name in one), (stage, role)

    with pytest.raises(ConfigError, match="stage rm: .*trained from a model of stage sft, which is not complete"):
        launch_stages(stages, "name=left", "resume=auto", "sft.steps=2", local=True)
    assert main(["check", str(stages), "name=left", "resume=auto", "sft.actor.optimizer.lr=1e-4"]) == 0
    assert "skipped; actor.optimizer.lr differ from what it ran with" in capsys.readouterr().out


def interrupting(stage: str, step: Callable[..., None]) -> Callable[..., None]:
    """Ctrl-C after the first step of a stage."""

    def then(display: Any, number: int, *args: Any) -> None:
        step(display, number, *args)
        if display._name == stage:
            raise KeyboardInterrupt

    return then


def test_all_stages_are_checked_before_one_starts(
    stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """About 1 s: models that are not there yet are checked as what they will be."""
    assert main(["check", str(stages)]) == 0
    printed = capsys.readouterr().out
    assert f"reward: {tmp_path}/runs/rlhf/rm/models/reward (" in printed and "models-to-come" not in printed
    assert not (tmp_path / "runs").exists()


MISTAKES = {
    "ppo.actor.model.path=${stage.stf.actor}": "stage ppo: ${stage.stf.actor}: unknown stage stf; did you mean sft?",
    "ppo.actor.model.path=${stage.sft.acter}": "stage ppo: ${stage.sft.acter}: unknown trained role of sft acter; did "
    "you mean actor?",
    "sft.model.path=${stage.ppo.actor}": "stage sft: ${stage.ppo.actor} must be of a stage before it; there is none",
    "rm.model.path=${stages.sft}": "stage rm: a model of a stage is ${stage.NAME.ROLE}, got ${stages.sft}",
    "ppo.reward.model.path=${stage.sft.actor}": "stage ppo: reward.model.path: 'ROOT/rlhf/sft/models/actor' has no "
    "score.weight",
    "sft.output.save_model=false": "stage rm: ${stage.sft.actor} needs output.save_model=true in stage sft, got false",
    "stf.steps=3": "unknown key stf.steps; did you mean sft.steps?",
    "critic.optimizer.lrr=1": "unknown key critic.optimizer.lrr; did you mean critic.optimizer.lr?",
    "sft.critic.optimizer.lr=1": "stage sft: unknown key critic.optimizer.lr",
    "rm.name=other": "rm.name=other: the folder of a stage is NAME/rm; set name or output.root for all",
    "ppo.actor.rollout.max_response_tokens=600": "stage ppo: actor.rollout.max_prompt_tokens + ",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_one_line_that_names_the_stage(
    stages: Path, tmp_path: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """About 0.5 s each."""
    assert main(["check", str(stages), override]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {MISTAKES[override].replace('ROOT', str(tmp_path / 'runs'))}"), printed
    assert len(printed.splitlines()) == 1


def test_settings_of_all_stages_go_to_those_that_have_them() -> None:
    """About 0.3 s."""
    content = {
        "name": "both",
        "model": "smollm2",
        "critic.optimizer.lr": 1e-3,
        "actor": {"engine": "deepspeed"},
        "stages": {"sft": {"task": "none", "steps": 7}, "ppo": {"model.path": "${stage.sft.actor}"}},
    }
    stages = read_stages(content, ["steps=5", "ppo.steps=9", "critic.optimizer.lr=2e-3", "output.root=out"])
    made = {}
    for stage in stages.stages:
        ready = stage.with_models(stages.model_of)
        made[stage.name] = compose(ready.recipe, ready.overrides, ready.settings)
    sft, ppo = made["sft"], made["ppo"]
    assert (sft.run.steps, ppo.run.steps, sft.run.output.root) == (5, 9, "out/both")
    assert sft.roles["actor"].engine.name == ppo.roles["actor"].engine.name == "deepspeed"
    assert (sft.roles["actor"].model.path, ppo.roles["critic"].model.path) == (
        "models/smollm2",
        "out/both/sft/models/actor",
    )
    assert ppo.roles["critic"].optimizer.lr == 2e-3 and ppo.run.data.train.generator is not None


@pytest.mark.parametrize("page", ["README.md", "docs/running.md"])
def test_stages_in_the_documentation_are_right(page: str, tmp_path: Path) -> None:
    """About 0.1 s."""
    text = (Path(__file__).parents[2] / page).read_text()
    (block,) = (found for found in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "stages:" in found)
    (tmp_path / "rlhf.yaml").write_text(block)
    read = read_stages(tmp_path / "rlhf.yaml", ["steps=50", "ppo.actor.optimizer.lr=1e-6"])
    assert [stage.recipe for stage in read.stages] == ["sft", "reward_model", "ppo"] and read.name == "rlhf"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"stages": {}}, "must have stages"),
        ({"stages": {"reward": {"recipe": "reward_model"}}}, "a stage cannot be called 'reward'"),
        ({"stages": {"pp": {}}}, "stage pp: unknown recipe pp; did you mean ppo?"),
        ({"stages": {"sft": {"output": {"root": "x"}}}}, "stage sft sets output.root, which is the launch's"),
        ({"stages": {"sft": {}}, "stepz": 3}, "unknown key stepz; did you mean steps?"),
        ({"stages": {"sft": {}}, "sft.steps": 3}, "settings of stage sft stand below `stages`"),
        ({"stages": {"sft": 3}}, "stage sft must hold settings as key: value, got 3"),
    ],
)
def test_what_no_file_of_stages_can_say(content: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_stages({"name": "x", **content})
    assert said in str(caught.value)
