"""Case files and settings in, answers out: what is accepted, what is refused and how, and that answers go back in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist.hardware import KINDS, parse_cluster
from rlhf_dist.planner.asked import asked_strategies
from rlhf_dist.planner.calibration import calibration_text, load_calibration, refined
from rlhf_dist.planner.case import parse_case, read_case
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.planner.emit import as_yaml
from rlhf_dist.planner.explain import CAUSES, as_json, as_table, bottleneck, what_else
from rlhf_dist.planner.latency import INFERENCE_PARTS, TRAINING_PARTS
from rlhf_dist.planner.launch import compose_planned, problem_of
from rlhf_dist.planner.machine import CPU_EFFICIENCY
from rlhf_dist.planner.picture import draw_timeline
from rlhf_dist.planner.plan import make_plan
from rlhf_dist.typed import ConfigError
from tests.planner.questions import ROLES, paper
from tests.tiny import save_llama

CASE: dict[str, Any] = {
    "recipe": "ppo",
    "cluster": "2x8xH100",
    "models": {role: "llama3-8b" for role in ROLES},
    "workload": {
        "prompts": 128,
        "samples_per_prompt": 1,
        "prompt_tokens": 512,
        "response_tokens": 512,
        "mini_batches": 4,
        "epochs": 1,
    },
    "placement": "auto",
}


SHAPE = {
    "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 1024, "vocab_size": 99
}  # fmt: skip


def pooled(gpus: int, roles: tuple[str, ...] = ROLES, **strategies: Any) -> dict[str, Any]:
    """A change of a case: one pool, and strategies."""
    given = {key.replace("__", "."): value for key, value in strategies.items()}
    return {"placement": {"pools": {"a": {"gpus": gpus, "roles": list(roles)}}, "strategies": given}}


def case(**changes: Any) -> dict[str, Any]:
    return {**CASE, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": "2x8xV100"}, "unknown GPU kind 'V100'; there is A100-80G"),
        ({"cluster": "two nodes"}, "cluster must be NODESxGPUSxKIND"),
        ({"cluster": "0x8xH100"}, "at least one node"),
        ({"models": {"actor": "llama3-8b"}}, "models.critic has no value"),
        ({"models": {**CASE["models"], "judge": "llama3-8b"}}, "models: unknown role judge"),
        ({"models": "llama4-9b"}, "unknown model llama4-9b"),
        ({"models": {**CASE["models"], "actor": "/no/such/config.json"}}, "no config.json"),
        ({"models": {**CASE["models"], "actor": {"hidden_size": 8}}}, "lacks num_hidden_layers"),
        ({"models": {**CASE["models"], "actor": "rule"}}, "so it cannot be a rule"),
        ({"workload": {"prompts": 8}}, "workload.prompt_tokens has no value"),
        ({"workload": {**CASE["workload"], "prompts": 0}}, "workload.prompts must be a whole number"),
        ({"workload": {**CASE["workload"], "sampels": 1}}, "unknown key sampels; there is prompts"),
        ({"workload": {**CASE["workload"], "response_tokens": {"mean": 9, "max": 5}}}, "mean = 9 is above"),
        ({"placement": "colocated"}, "unknown placement colocated; did you mean colocate?"),
        (pooled(8, ("actor",)), "critic, reference, reward is in no pool"),
        (pooled(32), "but the cluster has 16"),
        (pooled(8, (*ROLES, "actor")), "in more than one pool"),
        (pooled(8, actor__fly={}), "unknown node"),
        (pooled(8, actor={"tp": 3}), "cannot run as"),
        (pooled(8, actor={"zero": 5}), "0, 1, 2 or 3"),
        ({"recipe": "pppo"}, "unknown recipe"),
        ({"budget": 3}, "unknown key of a case"),
        ({"staleness": 1, "overlap": False}, "lets steps overlap"),
        ({"calibration": "/no/such/file"}, "no file"),
        ({"calibration": 5}, "calibration must be a file's path"),
        ({"gpus": "H20"}, "gpus must be kinds of GPU by name"),
        ({"cluster": {"nodes": 2, "gpu": "H100", "network_gbps": float("nan")}}, "network must be above 0"),
        ({"workload": {**CASE["workload"], "prompts": float("inf")}}, "prompts must be a whole number"),
        ({"workload": {**CASE["workload"], "response_tokens": float("nan")}}, "must be a number of tokens"),
        ({"workload": {**CASE["workload"], "mini_batches": 1000}}, "more than the 128 rows"),
        ({"models": {**CASE["models"], "actor": {**SHAPE, "hidden_size": "512"}}}, "hidden_size must be a whole"),
        ({"models": {**CASE["models"], "actor": {**SHAPE, "intermediate_size": -1}}}, "intermediate_size must be"),
        ({"models": {**CASE["models"], "actor": {**SHAPE, "num_key_value_heads": 3}}}, "multiple of num_key_value"),
        ({"placement": {"strategies": 5}}, "placement.strategies must be a mapping"),
        ({"placement": {"pools": {"a": {"gpus": 8, "roles": 5}}}}, "roles must be a list"),
        (pooled(8, actor__generate={"tp": 4, "zero": 3}), "generation has tp, pp and dp"),
        (pooled(8, actor={"tp": 8, "dp": 4, "pp": 1, "sp": 1}), "= 32 must be the GPUs of the pool"),
        ({"staleness": 1, "placement": "colocate"}, "needs generation in a pool of its own"),
        ({"cluster": "1x2xH100", "placement": "standalone"}, "4 pools need a GPU each at least"),
        ({"pipeline": [3]}, "pipelines of 3 stages must divide the GPUs"),
        ({"cluster": "1x8xL40S", "models": "llama2-7b", "placement": {"strategies": {"actor.train": {"zero": 1,
          "tp": 1, "offload": False}}}}, "with the strategies asked for: actor.update_actor .* without them they do"),
    ],
)  # fmt: skip
def test_a_case_that_cannot_be_says_what_and_what_next(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(parse_case(case(**changes)), 0)


@pytest.mark.parametrize("key", ["recipe", "cluster", "models", "workload"])
def test_a_case_without_a_part_names_it(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_case({name: value for name, value in CASE.items() if name != key})


def test_models_that_cannot_fit_get_the_blame_and_the_smallest_cluster() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(parse_case(case(cluster="1x8xL40S", models="llama2-70b")), 0)
    message = str(caught.value)
    assert "actor.update_actor (train) needs at least" in message and "most of it" in message
    smallest = message.rsplit(" ", 1)[-1]
    nodes = parse_cluster(smallest).nodes
    assert make_plan(parse_case(case(cluster=smallest, models="llama2-70b")), 0).best.step_s > 0
    with pytest.raises(ConfigError, match="do not fit"):
        make_plan(parse_case(case(cluster=f"{nodes - 1}x8xL40S", models="llama2-70b")), 0)


def test_json_has_the_keys_that_programs_read_and_its_placement_goes_back_in() -> None:
    plan = make_plan(parse_case(CASE))
    answer = json.loads(json.dumps(as_json(plan)))
    assert {"placement", "predicted", "certificate", "search_s", "runners_up"} <= answer.keys()
    assert {"step_s", "tokens_per_s", "nodes", "memory_bytes_per_gpu"} <= answer["predicted"].keys()
    assert answer["certificate"]["gap"] == 0 and answer["certificate"]["explored"] > 0
    assert answer["predicted"]["tokens_per_s"] == pytest.approx(128 * 1024 / answer["predicted"]["step_s"])
    again = make_plan(parse_case(case(placement=answer["placement"])), 0)
    assert again.best.step_s == pytest.approx(plan.best.step_s, rel=1e-6)
    usable = answer["predicted"]["usable_bytes_per_gpu"]
    assert all(0 < used <= usable * (1 + 1e-9) for used in answer["predicted"]["memory_bytes_per_gpu"].values())


def test_given_strategies_are_kept_and_priced() -> None:
    strategies = {
        "actor.train": {"tp": 8, "zero": 1, "recompute": True},
        "actor.generate": {"tp": 4},
        "critic": {"tp": 4},
    }
    plan = make_plan(parse_case(case(placement={"preset": "colocate", "strategies": strategies})), 0)
    (pool,) = plan.best.pools
    assert pool.holdings["actor"].tp == 8 and pool.holdings["actor"].zero == 1 and pool.holdings["critic"].tp == 4
    assert pool.generations["actor"].tp == 4 and pool.costs["actor.update_actor"].recompute
    free = make_plan(parse_case(case(placement="colocate")), 0).best
    assert pool.costs["actor.update_actor"].seconds > free.costs["actor.update_actor"].seconds


@pytest.mark.parametrize("recipe", ["grpo", "remax", "safe_rlhf", "dpo", "iterative_dpo", "reward_model", "sft"])
def test_every_recipe_is_planned(recipe: str) -> None:
    flow = recipe
    workload = {
        "prompts": 64,
        "samples_per_prompt": 2,
        "prompt_tokens": 256,
        "response_tokens": {"mean": 200, "max": 512},
    }
    plan = make_plan(
        parse_case({"recipe": flow, "cluster": "1x8xH200", "models": "llama3-8b", "workload": workload}), 1
    )
    ran = {work.name for work in plan.question.problem.nodes if work.role}
    assert ran == set(plan.best.costs) and plan.best.step_s > 0


def test_a_recipe_of_ones_own_is_planned(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from rlhf_dist.algorithms import ppo_clip\n"
        "from rlhf_dist.dataflow.recipe import recipe\n"
        "from rlhf_dist.roles import Actor, Prompts, Reference, Reward\n"
        "from rlhf_dist.transforms import grpo_advantage\n"
        "@recipe\n"
        "def mine(prompts: Prompts, student: Actor, teacher: Reference, judge: Reward) -> None:\n"
        "    batch = student.generate_sequences(prompts, n=4)\n"
        "    batch = teacher.compute_ref_log_prob(batch)\n"
        "    batch = grpo_advantage(judge.compute_reward(batch))\n"
        "    student.update_actor(batch, loss=ppo_clip(0.2, on_policy=True))\n"
    )
    models = {"student": "llama3-8b", "teacher": "llama3-70b", "judge": "rule"}
    content = case(recipe=str(file), models=models, cluster="4x8xH100")
    plan = make_plan(parse_case(content), 0)
    assert {unit for pool in plan.best.pools for unit in pool.units} == {"student", "teacher"}
    assert "student.reshard" in plan.best.costs


def test_staleness_lets_generation_run_beside_training() -> None:
    given = {role: {"tp": 1, "zero": 3, "offload": False} for role in ROLES}
    half = {"pools": {"train": {"gpus": 8, "roles": list(ROLES)}, "rollout": {"gpus": 8, "roles": ["actor.rollout"]}}}
    fresh, stale = (
        make_plan(parse_case(case(placement={**half, "strategies": given}, staleness=staleness, overlap=True)), 0).best
        for staleness in (0, 1)
    )
    assert stale.step_s < fresh.step_s
    costs = stale.costs
    assert stale.step_s >= costs["actor.generate_sequences"].seconds
    assert make_plan(parse_case(case(placement="async")), 0).best.step_s <= stale.step_s + 1e-9


def test_gpus_and_networks_of_ones_own() -> None:
    mine = {"Mine": {"base": "H100", "memory_bytes": 200e9, "flops": "2e15"}}
    cluster = parse_cluster("4x8xMine@800Gbps", mine)
    assert cluster.gpu.flops == 2e15 and cluster.gpu.link_bytes_per_s == KINDS["H100"].link_bytes_per_s
    assert cluster.network_bytes_per_s == 100e9 and cluster.text == "4x8xMine@800Gbps"
    with pytest.raises(ConfigError, match="gpus.Mine.flops must be above 0"):
        parse_cluster("8xMine", {"Mine": {"base": "H100", "flops": 0}})
    with pytest.raises(ConfigError, match="unknown key gpus.Mine.flop;"):
        parse_cluster("8xMine", {"Mine": {"base": "H100", "flop": 1}})


def test_a_faster_machine_is_predicted_faster() -> None:
    seconds = [
        make_plan(parse_case(case(cluster=f"2x8x{kind}")), 0).best.step_s for kind in ("A100-80G", "H100", "H200")
    ]
    assert seconds == sorted(seconds, reverse=True)
    others = {one["what"]: one["step_s"] for one in what_else(make_plan(parse_case(CASE), 0))}
    assert others["one more node"] < seconds[1] and others["H200"] == pytest.approx(seconds[2], abs=1e-3)


def test_the_table_says_what_people_ask(tmp_path: Path) -> None:
    plan = make_plan(paper(16, "llama2-13b"))
    table = as_table(plan, what_else(plan))
    for text in ("tokens/s", "gap 0: 15 partitions", "critical path", "actor_reference", "one more node", "GiB"):
        assert text in table
    assert "on its critical path" in bottleneck(plan) and "matrix multiplications" in bottleneck(plan)
    colocated = make_plan(paper(16, "codellama-34b", placement="colocate"), 0)
    assert "gathering parameters and reducing gradients" in bottleneck(colocated)
    draw_timeline(plan, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


# --- settings ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), hidden=128)


def test_a_planned_file_is_taken_by_run_as_it_is(model: Path, tmp_path: Path) -> None:
    settings = [f"model.path={model}", "task=addition", f"output.root={tmp_path}"]
    question = parse_case(case(cluster="1x4xH100", models="llama2-7b"))
    plan = make_plan(question)
    file = tmp_path / "plan.yaml"
    file.write_text(as_yaml(plan))
    run = compose_planned("ppo", [*settings, f"placement={file}"]).run
    assert {name: pool.slots for name, pool in run.placement.pools.items()} == {
        name: pool.gpus for name, pool in zip(plan.names, plan.best.pools, strict=True)
    }
    assert run.placement.roles == {
        unit: n for n, pool in zip(plan.names, plan.best.pools, strict=True) for unit in pool.units
    }
    actor = compose_planned("ppo", [*settings, f"placement={file}"]).roles["actor"]
    assert actor.engine.dtype == actor.rollout.dtype == "bfloat16", "as it was priced"
    assert actor.engine.micro_batch_tokens >= 1024 and actor.rollout.kv_cache_bytes > 1e8
    launch = compose_planned("ppo", [*settings, f"placement={file}", "actor.rollout.tensor_parallel=1"])
    assert launch.roles["actor"].rollout.tensor_parallel == 1, "what is said by hand comes last"


def test_a_planned_file_with_a_mistake_is_named(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("placement: {polls: {}}\n")
    with pytest.raises(ConfigError, match=r"unknown key placement.polls; did you mean placement.pools"):
        compose_planned("ppo", [f"model.path={model}", "task=addition", f"placement={file}"])
    with pytest.raises(ConfigError, match="no such file"):
        compose_planned("ppo", [f"model.path={model}", "task=addition", "placement=/no/such.yaml"])


def test_auto_plans_at_launch_and_leaves_an_ordinary_placement(model: Path, tmp_path: Path) -> None:
    settings = [f"model.path={model}", "task=addition", f"output.root={tmp_path}", "placement=auto"]
    here = compose_planned("ppo", settings).run.placement
    there = compose_planned("ppo", [*settings, "placement.cluster=2x8xH100"]).run.placement
    assert set(here.roles) == {"actor", "critic", "reference"}, "the reward is a rule and takes no slot"
    assert 1 <= sum(pool.slots for pool in there.pools.values()) <= 16
    with pytest.raises(ConfigError, match="set placement.cluster"):
        compose_planned("ppo", [*settings, "ray.address=auto"])


def test_auto_keeps_to_strategies_that_are_set_by_hand(model: Path, tmp_path: Path) -> None:
    settings = [f"model.path={model}", "task=addition", f"output.root={tmp_path}"]
    asked = ["actor.engine.tensor_parallel=2", "critic.engine.zero_stage=2", "critic.engine.tensor_parallel=1"]
    planned = compose_planned("ppo", [*settings, *asked, "placement=auto", "placement.cluster=1x8xH100"]).roles
    assert planned["actor"].engine.tensor_parallel == 2
    assert planned["critic"].engine.zero_stage == 2 and planned["critic"].engine.tensor_parallel == 1
    plain = compose_planned("ppo", [*settings, "placement=auto", "placement.cluster=1x8xH100"]).roles["actor"]
    exact = compose_planned(
        "ppo", [*settings, "model.dtype=float32", "placement=auto", "placement.cluster=1x8xH100"]
    ).roles["actor"]
    assert plain.engine.dtype == plain.rollout.dtype == "bfloat16", "as it was priced"
    assert exact.engine.dtype == exact.rollout.dtype == "float32", "what is said by hand comes last"
    overrides = [*settings, *asked, "actor.engine.lora.rank=4"]
    strategies, ignored = asked_strategies(compose_planned("ppo", overrides), overrides)
    assert strategies == {"actor": {"tp": 2}, "critic": {"zero": 2, "tp": 1}}
    assert ignored == ["actor.engine.lora.rank=4"]
    with pytest.raises(ConfigError, match="tp must divide the 4 attention heads"):
        compose_planned(
            "ppo", [*settings, "actor.engine.tensor_parallel=3", "placement=auto", "placement.cluster=1x8xH100"]
        )


def test_gpus_that_would_slow_the_step_are_left_idle_and_it_is_said() -> None:
    tiny = {"prompts": 32, "prompt_tokens": 8, "response_tokens": 8}
    one, two, many = (
        make_plan(parse_case(case(recipe="sft", cluster=f"{n}x8xA100-80G", models="llama3-8b", workload=tiny)), 0)
        for n in (1, 2, 100)
    )
    assert one.best.step_s == pytest.approx(two.best.step_s) == pytest.approx(many.best.step_s)
    assert "idle      8 of 16 GPUs" in as_table(two) and "idle" not in as_table(one)


def test_what_limits_steps_that_overlap_is_the_pool_that_is_never_idle() -> None:
    plan = make_plan(parse_case(case(placement="async", workload={**CASE["workload"], "mini_batches": 8})), 0)
    trains, _ = sorted(plan.best.pools, key=lambda pool: "critic" not in pool.units)
    # Its own nodes fill its step only with the weight sync, which is in two pools.
    own = sum(cost.seconds for cost in trains.costs.values())
    assert own + plan.best.costs["actor.reshard"].seconds == pytest.approx(plan.best.step_s, rel=1e-3)
    assert "in pool actor_critic_reference_reward, which is never idle" in bottleneck(plan)


def test_every_part_of_a_cost_has_words(tmp_path: Path) -> None:
    names = {*TRAINING_PARTS, *INFERENCE_PARTS, "reallocate", "transfer", "install"}
    plan = make_plan(parse_case(CASE), 0)
    names |= {part for cost in plan.best.costs.values() for part in cost.parts}
    assert names <= CAUSES.keys()


def test_a_launch_computes_what_its_settings_say(model: Path) -> None:
    cuts = ["data.prompts_per_step=8", "algorithm.samples_per_prompt=3", "algorithm.mini_batches=2"]
    launch = compose_planned("grpo", [f"model.path={model}", "task=addition", *cuts])
    problem = problem_of(launch)
    rows = {work.name: (work.rows, work.mini_batches) for work in problem.nodes}
    assert rows["actor.update_actor"] == (24, 2) and rows["actor.generate_sequences"] == (24, 1)
    assert problem.models["actor"].layers == 2 and "reward" not in problem.models


# --- calibration ---------------------------------------------------------------------------------------------
def test_a_calibration_file_overrides_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "calibration.yaml"
    file.write_text(calibration_text(Efficiency(matmul=0.3, link=0.5), "a test", {"flops": 5e14}))
    efficiency, gpu = load_calibration(file)
    assert efficiency == Efficiency(matmul=0.3, link=0.5) and gpu == {"flops": 5e14}
    slower = parse_case(case(calibration=str(file)))
    assert slower.cluster.gpu.flops == 5e14
    assert make_plan(slower, 0).best.step_s > make_plan(parse_case(CASE), 0).best.step_s


def test_what_a_machine_without_gpus_writes_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "calibration.yaml"
    file.write_text(calibration_text(CPU_EFFICIENCY, "a profile"))
    read, _ = load_calibration(file)
    assert read.graphs_bytes == 0 and read.context_bytes == pytest.approx(CPU_EFFICIENCY.context_bytes, rel=1e-5)
    file.write_text(calibration_text(CPU_EFFICIENCY, "a run", usual=CPU_EFFICIENCY))
    assert load_calibration(file, CPU_EFFICIENCY)[0] == CPU_EFFICIENCY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("efficiency: {matmull: 0.5}", "did you mean"),
        ("efficiency: {link: 1.5}", "between 0 and 1"),
        ("gpu: {flops: -1}", "above 0"),
        ("[1, 2]", "must be a mapping"),
        ("efficency: {}", "did you mean efficiency"),
    ],
)
def test_a_calibration_with_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "calibration.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_calibration(file)


def test_what_a_run_measured_makes_the_next_prediction_right() -> None:
    question = parse_case(case(placement="colocate"))
    plan = make_plan(question, 0)
    predicted = {name: cost.seconds for name, cost in plan.best.costs.items()}
    truth = {"train": 1.7, "infer": 0.8, "generate": 2.5, "reshard": 3.0}
    phases = {work.name: work.phase for work in question.problem.nodes}
    measured = {name: seconds * truth[phases[name]] for name, seconds in predicted.items()}
    from dataclasses import replace

    better = replace(question, efficiency=refined(question.efficiency, question.problem.nodes, predicted, measured))
    given = {"pools": as_json(plan)["placement"]["pools"], "strategies": as_json(plan)["placement"]["strategies"]}
    request = parse_case(case(placement=given)).request
    again = {name: cost.seconds for name, cost in make_plan(replace(better, request=request), 0).best.costs.items()}
    assert again == pytest.approx(measured, rel=0.01)


def test_cases_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "case.yaml"
    file.write_text(yaml.safe_dump(CASE))
    assert make_plan(read_case(file), 0).best.step_s == make_plan(parse_case(CASE), 0).best.step_s
    file.write_text("recipe: [")
    with pytest.raises(ConfigError, match="not YAML"):
        read_case(file)
