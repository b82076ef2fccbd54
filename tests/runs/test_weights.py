"""Weights as values in whole runs: line by line, as a graph, in this process, on Ray, resumed. About 30 s."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.cluster.local import local_launch
from controller.lifecycle.run import run
from controller.record.display import Display
from rlhf_dist.checks import check_launch
from rlhf_dist.compose import compose
from rlhf_dist.typed import ConfigError
from tests.runs.test_recipes import weights
from tests.tiny import save_llama

RECIPE = """
from rlhf_dist.algorithms import nll
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples, Reference, State


class Speed(State):
    def initial(self, cfg):
        return {"tau": 0.5}


@recipe
def weighed(examples: Examples, actor: Actor, ema: Reference, soup: Reference, before: Reference, speed: Speed) -> None:
    batch = ema.compute_ref_log_prob(examples)
    actor.save_weights("anchor", optimizer=True, every=2)
    actor.update_actor(batch, loss=nll())
    actor.restore_weights("anchor", every=3, after=1)
    actor.update_actor(batch, loss=nll())
    ema.mix_from(actor, tau=speed.value("tau") / 4)
    before.copy_from(actor, every=2)
    soup.merge_from([(actor, 2.0), (soup, -0.5), (ema, -0.5)])
"""
DUEL = """
from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Opponent, Prompts, Reward
from rlhf_dist.transforms import rloo_advantage


def characters(prompt, response, answer):
    return float(len(response))


@recipe
def duel(prompts: Prompts, actor: Actor, opponent: Opponent, reward: Reward) -> None:
    actor.save_weights("anchor", optimizer=True)
    for half in (True, False):
        opponent.generate_sequences(prompts)
        batch = rloo_advantage(reward.compute_reward(actor.generate_sequences(prompts, n=2)))
        if not half:
            actor.restore_weights("anchor")
        actor.update_actor(actor.compute_log_prob(batch), loss=ppo_clip(0.2))
    opponent.mix_from(actor, tau=0.25, every=2)
"""
ROLES = ("actor", "ema", "soup", "before")
Launch = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "weighed.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def here(file: Path, small: Path, data: Path) -> Callable[..., Any]:
    """Runs the recipe in this process, as a graph or line by line; returns the weights it ends with."""

    def go(root: Path, *overrides: str, eager: bool = False) -> dict[str, dict[str, np.ndarray]]:
        made = local_launch(compose(str(file), [*settings(small, data, root), *overrides]), overrides)
        check_launch(made)
        with Display(made.run.name, made.run.steps, quiet=True) as display:
            run(made, display, eager=eager, local=True)
        return ended(root)

    return go


def settings(model: Path, data: Path, root: Path) -> list[str]:
    return [
        *("task=none", f"model.path={model}", "model.dtype=float32", f"data.train.path={data}", "steps=4"),
        *("data.prompts_per_step=4", "actor.optimizer.lr=1e-2", f"output.root={root}", "resume=auto"),
    ]


def ended(root: Path) -> dict[str, dict[str, np.ndarray]]:
    return {role: weights(root / "weighed/models" / role) for role in ROLES}


def same(one: dict[str, dict[str, np.ndarray]], other: dict[str, dict[str, np.ndarray]]) -> None:
    for role in ROLES:
        assert one[role].keys() == other[role].keys() and len(one[role]) > 10
        assert all(np.array_equal(one[role][name], other[role][name]) for name in one[role]), role


@pytest.fixture(scope="module")
def straight(here: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return here(tmp_path_factory.mktemp("graph"), "output.checkpoint_every=3")


def test_line_by_line_is_the_graph(here: Callable[..., Any], straight: Any, tmp_path: Path) -> None:
    for one, other in (("actor", "ema"), ("ema", "soup"), ("actor", "before")):
        assert any(not np.array_equal(straight[one][name], straight[other][name]) for name in straight[one])
    same(here(tmp_path, eager=True), straight)


def test_a_half_step_of_a_policy_that_generates_is_synced_and_taken_back(
    small: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "duel.py").write_text(DUEL)
    short = [f"{role}.rollout.max_response_tokens=6" for role in ("actor", "opponent")]
    found = []
    for way in ("graph", "eager"):
        overrides = [*settings(small, data, tmp_path / way), *short, "reward.function=characters"]
        made = local_launch(compose(str(tmp_path / "duel.py"), overrides), overrides)
        lines = check_launch(made)
        with Display("duel", 4, quiet=True) as display:
            last = run(made, display, eager=way == "eager", local=True)["last"]
        found.append({role: weights(tmp_path / way / "duel/models" / role) for role in ("actor", "opponent")})
    assert any("weights synced after the recipe has written them" in line for line in lines)
    assert last["actor/rollout_ratio_error"] < 1e-3, "the half-step is on-policy"
    assert last["actor#2/rollout_ratio_error"] > 1e-3, "what follows is drawn by the half-step, by the recipe's wish"
    assert last["actor/version"] == last["actor#2/version"] == 4, "a step taken back does not count"
    for role, graph in found[0].items():
        assert all(np.array_equal(graph[name], found[1][role][name]) for name in graph)


def test_a_resumed_run_has_the_sets_and_the_weights_of_frozen_roles(
    here: Callable[..., Any], straight: Any, tmp_path: Path
) -> None:
    here(tmp_path, "steps=3")  # the set was saved at step 2, and step 3 restores it
    same(here(tmp_path), straight)


def test_weights_that_leave_the_device_meanwhile_are_the_same(
    here: Callable[..., Any], straight: Any, tmp_path: Path
) -> None:
    same(here(tmp_path, "placement.pools.main.device_bytes=480000"), straight)  # all of it takes 620 kB


def test_two_pools_on_ray_end_with_the_weights_of_one_process(
    launch_warm: Launch, file: Path, small: Path, straight: Any, tmp_path: Path
) -> None:
    pools = ("placement.pools.main.slots=1", "+placement.pools.other.slots=2", "+placement.roles.soup=other")
    launch_warm(str(file), f"model.path={small}", "steps=4", "actor.optimizer.lr=1e-2", *pools, root=tmp_path)
    same(ended(tmp_path), straight)


def test_weights_that_cannot_go_anywhere_are_refused_before_the_start(
    file: Path, small: Path, data: Path, tmp_path: Path
) -> None:
    deeper = save_llama(tmp_path / "deeper", layers=3)

    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            check_launch(compose(str(file), [*settings(small, data, tmp_path), *overrides]))
        return str(caught.value)

    text = refused(f"ema.model.path={deeper}")
    assert text.startswith(
        "weighed.py:19: ema.mix_from takes weights of 'actor', whose model has num_hidden_layers=2 in"
    )
    assert "set ema.model.path and actor.model.path to models of one shape" in text
    assert "and whole weights cannot be put into adapters; set soup.engine.lora=null" in refused(
        "+soup.engine.lora.rank=2"
    )
    assert "set ema.engine.name=fsdp, or ema.engine.dtype=float32" in (
        refused("ema.engine.name=deepspeed", "ema.engine.dtype=bfloat16")
    )
