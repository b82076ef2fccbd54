"""What is found before any process starts: the plan of a launch that fits, one clear line for one that does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_dist.checks import check_launch, max_row_tokens, rows_of_nodes
from rlhf_dist.compose import compose
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.machine import local_machine
from rlhf_dist.typed import ConfigError
from tests.tiny import save_classifier, save_llama, save_tokenizer

CHECKED = [
    "task=gcd",
    "data.train.chat=false",
    "data.heldout=null",
    "data.prompts_per_step=8",
    "data.max_prompt_tokens=256",
    "model.dtype=float32",
]
TEXT = '{"prompt": "1+1=", "answer": "2"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), hidden=128)  # 4 heads, 2 key-value heads, 512 positions


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(recipe: str, model: Path, *overrides: str) -> list[str]:
    return check_launch(compose(recipe, [f"model.path={model}", *CHECKED, *overrides]))


def failure(recipe: str, model: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(recipe, model, *overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- the plan --------------------------------------------------------------------------------------------------
def test_the_plan_of_a_step_states_rows_tokens_updates_and_pools(model: Path) -> None:
    text = "\n".join(
        plan("ppo", model, "algorithm.samples_per_prompt=2", "algorithm.epochs=3", "placement.pools.main.slots=2")
    )
    assert "8 prompts -> 16 rows, at most 5,120 tokens (320 a row)" in text
    assert "actor: 4 mini-batches x 3 epochs = 12 optimizer steps" in text
    assert "pool      main: 2 slots (auto) for actor, critic, reference" in text
    assert "CPU processes for sources, host ops, reward" in text
    assert [line.split()[1] for line in text.splitlines() if line.strip()[0].isdigit()][:2] == [
        "prompts", "actor.generate_sequences"
    ]  # fmt: skip


def test_rows_follow_expansion_pairs_and_filters(model: Path) -> None:
    settings = [f"model.path={model}", "data.prompts_per_step=8"]
    pairs = rows_of_nodes(compose("dpo", settings))
    assert pairs["actor.update_actor"] == (16, False)
    online = rows_of_nodes(compose("iterative_dpo", settings))
    assert online["reward.compute_reward"] == (64, False) and online["actor.update_actor"][1]


def test_recipes_without_generation_are_limited_by_the_data(model: Path) -> None:
    assert max_row_tokens(compose("sft", [f"model.path={model}"]))[0] == 512
    assert (
        max_row_tokens(compose("grpo", [f"model.path={model}", *CHECKED, "actor.rollout.max_response_tokens=9"]))[0]
        == 265
    )


# --- models and data -------------------------------------------------------------------------------------------
def test_a_missing_model_says_how_to_get_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="actor.model.path: no folder 'models/smollm2'.*run `make smollm2`"):
        check_launch(compose("grpo", ["model=smollm2", "task=chain_sum"]))
    (tmp_path / "empty").mkdir()
    assert "critic.model.path: 'empty' is no model folder, it has no config.json" in failure(
        "ppo", model, "critic.model.path=empty"
    )
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "is not JSON" in failure("ppo", model, "critic.model.path=empty")


def test_weights_are_needed_unless_the_model_starts_at_random(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    assert "has no weights" in failure("ppo", model, f"critic.model.path={bare}")
    plan("ppo", model, f"critic.model.path={bare}", "critic.model.init=random")
    assert "has no tokenizer.json" in failure(
        "grpo", bare, "actor.model.init=random", "reference.model.init=random"
    )  # fmt: skip
    save_tokenizer(bare)
    plan("grpo", bare, "actor.model.init=random", "reference.model.init=random")


def test_missing_data_is_named_with_its_key(model: Path) -> None:
    assert failure("ppo", model, "data.train.generator=null", "data.train.path=gone.jsonl").startswith("data.train")
    assert "basic_arithmetic" in failure("ppo", model, "data.train.generator=basic_arithmetc")


def test_rows_of_a_task_and_of_ones_own_name_the_way_out(model: Path) -> None:
    text = failure("ppo", model, "data.train.path=mine.jsonl")
    assert "both a path (mine.jsonl) and a generator (gcd)" in text and "set task=none" in text


def test_chat_data_needs_a_template(model: Path, tmp_path: Path) -> None:
    plain = save_llama(tmp_path / "plain", hidden=128)
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    assert "no chat template" in failure("ppo", plain, "data.train.chat=true")
    assert plan("ppo", plain) and plan("ppo", model, "data.train.chat=true")


def test_a_row_must_fit_the_models_positions(model: Path) -> None:
    text = failure("ppo", model, "actor.rollout.max_response_tokens=300")
    assert "256 + 300 = 556 tokens, but the model of 'actor' holds 512" in text
    assert "data.max_prompt_tokens" in failure("dpo", model, "task=none", "data.max_response_tokens=400")


# --- rewards ---------------------------------------------------------------------------------------------------
def test_a_reward_is_a_function_or_a_model(model: Path, tmp_path: Path) -> None:
    assert "reward has neither a function nor a model" in failure("ppo", model, "reward.function=null")
    assert "reward has both" in failure("ppo", model, f"reward.model.path={model}")
    assert "cost has neither" in failure("safe_rlhf", model)
    scorer = save_classifier(tmp_path / "scorer")
    lines = plan("ppo", model, "reward.function=null", f"reward.model.path={scorer}")
    assert any("for actor, critic, reference, reward" in line for line in lines)


def test_a_reward_function_must_exist(model: Path) -> None:
    assert "reward.function: " in failure("ppo", model, "reward.function=rlhf_dist.rewards:exact_mach")
    assert "did you mean 'exact_match'" in failure("ppo", model, "reward.function=rlhf_dist.rewards:exact_mach")
    Path("bad.py").write_text("1 / 0\n")
    assert "reward.function: ZeroDivisionError" in failure("ppo", model, "reward.function=bad.py:score")


# --- batch arithmetic ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("algorithm.mini_batches=3", "cuts the step into 3 mini-batches, which must divide data.prompts_per_step = 8"),
        ("algorithm.mini_batches=16", "it may be 1, 2, 4, 8"),
        ("algorithm.mini_batches=0", "needs mini_batches >= 1, got 0"),
        ("algorithm.samples_per_prompt=0", "needs n >= 1 responses to a prompt, got 0"),
        ("data.prompts_per_step=0", "data.prompts_per_step must be at least 1, got 0"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("output.checkpoint_every=-1", "output.checkpoint_every must be at least 0, got -1"),
        ("actor.engine.micro_batch_tokens=0", "actor.engine.micro_batch_tokens must be at least 1"),
        ("actor.rollout.temperature=0", "actor.rollout.temperature must be above 0, got 0"),
        ("actor.rollout.top_p=1.5", "actor.rollout.top_p must be at most 1"),
        ("actor.rollout.max_response_tokens=0", "actor.rollout.max_response_tokens must be at least 1"),
        ("critic.optimizer.lr=-1", "critic.optimizer.lr must be at least 0, got -1"),
        ("actor.optimizer.schedule=cosine", "actor.optimizer.total_steps must be at least 1, got 0"),
        ("ray.ready_timeout_s=0", "ray.ready_timeout_s must be above 0"),
        ("name=a/b", "name must be a plain folder name"),
    ],
)
def test_numbers_that_cannot_be_are_named(model: Path, override: str, expected: str) -> None:
    assert expected in failure("ppo", model, override)


def test_a_mistake_in_the_batch_names_the_recipes_line(model: Path) -> None:
    assert failure("ppo", model, "algorithm.mini_batches=3").startswith("ppo.py:")


@pytest.mark.parametrize(
    ("recipe", "op"),
    [
        ("grpo", "grpo_advantage"),
        ("iterative_dpo", "keep_best_and_worst"),
        ("reinforce", "response_advantage"),
        ("surrogates", "response_advantage"),
    ],
)
def test_a_group_of_one_is_refused_where_groups_are_compared(model: Path, recipe: str, op: str) -> None:
    text = failure(recipe, model, "algorithm.samples_per_prompt=1")
    assert text.startswith(f"{recipe}.py:") and f"{op} compares the responses to a prompt" in text
    assert text.endswith("got 1: it would never teach anything; set algorithm.samples_per_prompt to 2 or more")
    assert plan(recipe, model, "algorithm.samples_per_prompt=2") and plan("ppo", model)


def test_a_group_of_one_is_fine_for_a_baseline_that_is_of_the_batch(model: Path) -> None:
    assert plan("reinforce/reinforce_plus_plus", model, "algorithm.samples_per_prompt=1")
    text = failure("reinforce/reinforce_plus_plus_baseline", model, "algorithm.samples_per_prompt=1")
    assert "response_advantage compares the responses to a prompt" in text


GROUPS_OF_ONE = """
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reward
from rlhf_dist.algorithms import policy_gradient
from rlhf_dist.transforms import rloo_advantage

@recipe
def rloo(prompts: Prompts, actor: Actor, reward: Reward) -> None:
    batch = rloo_advantage(reward.compute_reward(actor.generate_sequences(prompts)))
    actor.update_actor(batch, loss=policy_gradient())
"""


def test_a_group_of_one_in_a_users_recipe_names_the_argument(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rloo.py").write_text(GROUPS_OF_ONE)
    text = failure("rloo.py", model)
    assert "rloo_advantage compares" in text and "set n of generate_sequences in the recipe to 2 or more" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "output.inputs_nodes=[actor.update]",
            "output.inputs_nodes: unknown node actor.update; did you mean actor.update_actor?",
        ),
        ("profile.steps=[1,100]", "profile.steps must name steps of the run, which are 0 to 99, got 100"),
        ("profile.steps=[-1]", "which are 0 to 99, got -1"),
    ],
)
def test_what_is_to_be_kept_must_be_there(model: Path, override: str, expected: str) -> None:
    assert expected in failure("ppo", model, override)


# --- placement -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["placement.roles.actr=main"], "unknown role actr; did you mean actor?"),
        (["placement.roles.actor=mian"], "placement.roles.actor: unknown pool mian; did you mean main?"),
        (["~placement.roles.default"], "role 'actor' has no pool"),
        (["placement.pools.spare.slots=1"], "pool 'spare' has no role"),
        (["placement.pools.host.slots=1"], "placement.pools.host is taken"),
        (["placement.pools.main.slots=-1"], "placement.pools.main.slots must be at least 0, got -1"),
        (["placement.pools.main.slots=3", "actor.rollout.tensor_parallel=2"], "must divide the 3 slots of pool 'main'"),
        (["placement.pools.main.slots=4", "actor.rollout.tensor_parallel=4"], "2 key-value heads"),
    ],
)
def test_placements_that_cannot_be_are_named(model: Path, overrides: list[str], expected: str) -> None:
    assert expected in failure("ppo", model, *overrides)


def test_tensor_parallel_names_the_sizes_that_fit(model: Path, tmp_path: Path) -> None:
    odd = save_llama(tmp_path / "odd", hidden=128)
    settings = json.loads((odd / "config.json").read_text()) | {"num_attention_heads": 9, "num_key_value_heads": 3}
    (odd / "config.json").write_text(json.dumps(settings))
    text = failure("ppo", odd, "actor.rollout.tensor_parallel=2")
    assert "must divide the 9 attention heads" in text and text.endswith("got 2; it may be 1")


def test_more_slots_than_the_machine_are_named_unless_a_cluster_is_asked(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local_machine().gpus == ()
    many = "placement.pools.main.slots=500"
    assert "need 500 slots (main 500), but this machine offers" in failure("ppo", model, many)
    assert "this machine has no GPU" in failure("ppo", model, "placement.pools.main.device=cuda")
    assert plan("ppo", model, many, "ray.address=auto")


def test_graph_errors_are_errors_of_the_user_too() -> None:
    assert issubclass(GraphError, ValueError) and issubclass(ConfigError, ValueError)


# --- models that would only fail in a worker -------------------------------------------------------------------
def test_weights_that_are_cut_missing_or_no_weights_name_their_file(model: Path, tmp_path: Path) -> None:
    broken = save_llama(tmp_path / "broken", hidden=128)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    for content, expected in (
        (whole[:-1], "is damaged: it has"),
        (whole[:100], "is cut short or no safetensors file"),
        (b"version 1 of git-lfs.spec\noid sha256:1\n", "is a Git LFS pointer, not weights"),
        (b"", "is cut short or no safetensors file (0 bytes)"),
        (b"\x05" + bytes(7) + b"hello", "has no safetensors header"),
    ):
        weights.write_bytes(content)
        text = failure("ppo", model, f"critic.model.path={broken}")
        assert text.startswith(f"critic.model.path: {weights} ") and expected in text
    weights.write_bytes(whole)
    index = {"weight_map": {"a": weights.name, "b": "model-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002.safetensors is missing" in failure("ppo", model, f"critic.model.path={broken}")


def test_a_head_size_vllm_refuses_on_a_cpu_names_the_other_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    narrow = save_llama(tmp_path / "narrow")
    text = failure("grpo", narrow)
    assert "attention heads are 8 wide" in text and text.endswith("set actor.rollout.engine=transformers")
    assert plan("grpo", narrow, "actor.rollout.engine=transformers")
    assert "8 wide" in failure("grpo", narrow, "ray.address=auto", "placement.pools.main.device=cpu")


def test_a_hub_id_that_cannot_be_fetched_says_what_to_do(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = failure("grpo", model, "actor.model.path=meta-llama/Llama-3-8B")
    assert "is not in the cache" in text and "hf download meta-llama/Llama-3-8B`" in text
    assert text.endswith("with --local-dir FOLDER to set actor.model.path=FOLDER")
