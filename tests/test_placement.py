"""Placement as config: presets serve every recipe; names, slots, shares and staleness that cannot be are refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from controller.lifecycle.session import modules_of_pool, phases_of_pool
from rlhf_dist.checks import check_launch
from rlhf_dist.compose import compose
from rlhf_dist.config import PlacementConfig, PoolConfig
from rlhf_dist.placement.roles import pool_of_roles, pool_size, resolved
from rlhf_dist.typed import ConfigError
from tests.shelf import of_each_shape, sources_of
from tests.tiny import save_llama

SETTINGS = ["task=gcd", "data.train.chat=false", "data.heldout=null", "data.prompts_per_step=8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), hidden=128)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def placed(recipe: str, model: Path, *overrides: str) -> dict[str, str]:
    launch = compose(recipe, [f"model.path={model}", "task=gcd", *overrides])
    return pool_of_roles(launch.run.placement, launch.roles, launch.recipe.roles, launch.dataflow.facts)


def plan(model: Path, *overrides: str, recipe: str = "ppo") -> str:
    return "\n".join(check_launch(compose(recipe, [f"model.path={model}", *SETTINGS, *overrides])))


def failure(model: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(model, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("preset", ["colocate", "split", "standalone"])
@pytest.mark.parametrize("recipe", of_each_shape())
def test_every_preset_places_every_recipe(recipe: str, preset: str, model: Path) -> None:
    launch = compose(recipe, [f"model.path={model}", "task=gcd", f"placement={preset}", *sources_of(recipe)])
    found = pool_of_roles(launch.run.placement, launch.roles, launch.recipe.roles, launch.dataflow.facts)
    assert set(launch.roles) <= set(found)


@pytest.mark.parametrize("preset", ["colocate", "split", "standalone"])
@pytest.mark.parametrize("recipe", of_each_shape())
def test_what_processes_import_ahead_is_what_their_roles_are_made_of(recipe: str, preset: str, model: Path) -> None:
    launch = compose(recipe, [f"model.path={model}", "task=gcd", f"placement={preset}", *sources_of(recipe)])
    pools = {pool: modules_of_pool(launch, pool) for pool in launch.run.placement.pools}
    assert all(find_spec(module) is not None for modules in pools.values() for module in modules)
    assert modules_of_pool(launch, "host") == [], "it starts in a second as it is"
    generating = "workers.engines.generation.vllm" in {module for modules in pools.values() for module in modules}
    assert generating == bool(launch.dataflow.generating)


def test_a_process_imports_the_engines_of_its_own_pool_alone(model: Path) -> None:
    def imported(*overrides: str) -> dict[str, set[str]]:
        launch = compose("ppo", [f"model.path={model}", "task=gcd", *overrides])
        of_pools = {pool: modules_of_pool(launch, pool) for pool in launch.run.placement.pools}
        return {pool: {module.split(".")[-1] for module in modules} for pool, modules in of_pools.items()}

    assert imported("actor.rollout.engine=transformers", "critic.engine=deepspeed") == {
        "main": {"language_model", "value_model", "fsdp", "deepspeed", "transformers"}
    }
    apart = imported("placement=standalone")
    assert apart["actor"] == {"language_model", "fsdp"} and apart["critic"] == {"value_model", "fsdp"}
    assert apart["rollout"] == {"rollout", "vllm"}


def test_the_phases_of_a_step_on_each_pool_s_devices(model: Path) -> None:
    def phases(recipe: str, *overrides: str) -> dict[str, tuple[str, ...]]:
        launch = compose(recipe, [f"model.path={model}", "task=gcd", *overrides])
        return {pool: phases_of_pool(launch, pool) for pool in launch.run.placement.pools}

    assert phases("ppo", "placement=colocate")["main"] == (
        *("actor.generate", "actor.forward", "critic.forward", "reference.forward"),
        *("critic.update", "actor.update", "actor.sync"),
    )
    alone = phases("ppo", "placement=standalone")
    assert alone["actor"] == ("actor.forward", "actor.update", "actor.sync")
    assert alone["rollout"] == ("actor.generate", "actor.rollout.sync") and alone["critic"][-1] == "critic.update"
    # A reference that is the actor's base is the actor's engine.
    shared = phases("grpo", "placement=colocate", "actor.engine.lora.rank=4")["main"]
    assert shared == ("actor.generate", "actor.forward", "actor.update", "actor.sync")


def test_presets_place_as_they_say(model: Path) -> None:
    scored = ("reward.function=null", f"reward.model.path={model}")
    assert set(placed("ppo", model, "placement=colocate", *scored).values()) == {"main"}
    split = placed("ppo", model, "placement=split", *scored)
    assert split == {"actor": "policy", "reference": "policy", "critic": "values", "reward": "values"}
    alone = placed("safe_rlhf", model, "placement=standalone", *scored)
    assert alone["cost_critic"] == "critic" and alone["actor.rollout"] == "rollout" and alone["reward"] == "reward"


def test_a_roles_own_name_comes_before_its_kind_and_that_before_the_default(model: Path) -> None:
    found = placed("safe_rlhf", model, "placement=split", "placement.roles.cost_critic=policy")
    assert found["critic"] == "values" and found["cost_critic"] == "policy"


def test_the_plan_shows_pools_transfers_and_how_far_generation_runs_ahead(model: Path) -> None:
    text = plan(model, "placement=standalone", "placement.max_staleness=2")
    assert "pool      rollout: 1 slots (auto) for actor.rollout" in text
    assert "pool      reward: not started, no role of this recipe runs there" in text
    assert "runs up to 2 updates ahead (off-policy); a running generation delays a weight sync" in text
    assert "actor.reshard                   weights        actor -> rollout" in text
    assert "actor.generate_sequences        8 rows         rollout" in text
    assert "in the training pool, weights synced every step (on-policy)" in plan(model)


def test_staleness_is_the_distance_of_the_weights_edge(model: Path) -> None:
    launch = compose("ppo", [f"model.path={model}", "task=gcd", "placement=standalone", "placement.max_staleness=2"])
    (edge,) = [e for e in launch.dataflow.edges if e.weights == "actor.rollout" and e.reason == "write-then-read"]
    assert (edge.source, edge.target, edge.distance) == ("actor.reshard", "actor.generate_sequences", 3)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["placement.roles.crtic=main"], "unknown role crtic; did you mean critic?"),
        (["placement.roles.Critik=main"], "unknown role Critik; did you mean Critic?"),
        (["placement.rollout=man"], "placement.rollout: unknown pool man; did you mean main?"),
        (["placement.max_staleness=-1"], "placement.max_staleness must be at least 0, got -1"),
        (["placement.max_staleness=1"], "'actor' generates in its training pool 'main'; set placement.rollout"),
        (
            ["placement.max_staleness=1", "placement.rollout=main"],
            "placement.max_staleness = 1 needs generation with weights of its own",
        ),
        (["placement.interrupt=true"], "set placement.max_staleness=1 or placement.interrupt=false"),
        (["placement.pools.main.nodes=2"], "needs a cluster"),
        (["placement.pools.main.share=0.5"], "placement.slots, which is not set; set placement.slots=N"),
        (["placement.pools.main.share=1.5", "placement.slots=2"], "must be above 0 and at most 1, got 1.5"),
        (["placement.pools.main.share=0.2", "placement.slots=2"], "less than one slot"),
        (["placement.slots=-1"], "placement.slots must be at least 0, got -1"),
        (
            ["placement=standalone", "actor.rollout.tensor_parallel=2"],
            "actor.rollout.tensor_parallel must divide the 1 slots of pool 'rollout'",
        ),
    ],
)
def test_placements_that_cannot_be_are_refused_with_the_fix(model: Path, overrides: list[str], expected: str) -> None:
    assert expected in failure(model, *overrides)


def test_shares_divide_the_slots_there_are() -> None:
    pools = {"a": PoolConfig(share=0.75), "b": PoolConfig(share=0.25), "c": PoolConfig(slots=2, nodes=3)}
    placement = PlacementConfig(pools=pools, slots=8)
    assert [pool_size(placement, name) for name in "abc"] == [6, 2, 6]
    assert resolved(placement, "a") == PoolConfig(slots=6) and resolved(placement, "c") == pools["c"]
    with pytest.raises(ConfigError, match=r"shares of 1.25 together"):
        pool_size(PlacementConfig(pools={**pools, "d": PoolConfig(share=0.25)}, slots=8), "a")
