"""Weight ops in a recipe: their order, what is synced after them, and what is refused with the recipe's line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.algorithms import nll
from rlhf_dist.algorithms.outputs import Head
from rlhf_dist.dataflow import Dataflow, GraphError
from rlhf_dist.dataflow.draw import to_text
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.model_specs import model_spec
from rlhf_dist.planner.work import make_problem
from rlhf_dist.planner.workload import Lengths, Workload
from rlhf_dist.recipe_files import load_recipe
from rlhf_dist.roles import Actor, Critic, Examples, Prompts, Reference, Reward, RewardModel, State


class Speed(State):
    def initial(self, cfg: Any) -> dict[str, float]:
        return {"tau": 0.5, "fast": 2.0}


@recipe
def ema(examples: Examples, actor: Actor, reference: Reference, soup: Reference, speed: Speed) -> None:
    batch = reference.compute_ref_log_prob(examples)
    actor.save_weights("anchor", optimizer=True)
    actor.update_actor(batch, loss=nll())
    actor.restore_weights("anchor")
    actor.update_actor(batch, loss=nll())
    reference.mix_from(actor, tau=0.5 * speed.value("tau"), every=2)
    soup.merge_from([(actor, 2), (soup, -1.0), (reference, 0)])


def edges(dataflow: Dataflow) -> set[tuple[str, str, str, int, str]]:
    return {(e.source, e.target, e.weights, e.distance, e.reason) for e in dataflow.edges if e.weights is not None}


def test_weights_have_edges_as_any_weight_state_has() -> None:
    dataflow = trace(ema)
    found = edges(dataflow)
    for edge in (
        ("actor.save_weights", "actor.restore_weights", "actor.anchor", 0, "write-then-read"),
        ("actor.save_weights", "actor.update_actor", "actor.train", 0, "read-then-write"),
        ("actor.restore_weights", "actor.update_actor#2", "actor.train", 0, "write-then-write"),
        ("actor.update_actor#2", "reference.mix_from", "actor.train", 0, "write-then-read"),
        ("actor.update_actor#2", "soup.merge_from", "actor.train", 0, "write-then-read"),
        ("reference.mix_from", "soup.merge_from", "reference.train", 0, "write-then-read"),
        ("reference.mix_from", "reference.compute_ref_log_prob", "reference.train", 1, "write-then-read"),
        ("reference.compute_ref_log_prob", "reference.mix_from", "reference.train", 0, "read-then-write"),
    ):
        assert edge in found
    assert dataflow["reference.mix_from"].weights_read == ("actor.train", "reference.train", "speed.state")
    assert dataflow.trained == ("actor",) and dataflow.written == ("actor", "reference", "soup")
    assert dataflow.ways == {("actor", "reference"): 1, ("actor", "soup"): 2, ("reference", "soup"): 2}
    assert "soup" in dataflow.used_roles


def test_a_frozen_role_that_nothing_writes_waits_for_nobody() -> None:
    @recipe
    def frozen(examples: Examples, reference: Reference) -> None:
        reference.compute_ref_log_prob(examples)

    assert not edges(trace(frozen))


def test_a_role_that_generates_is_synced_after_a_write_and_at_its_cadence() -> None:
    @recipe
    def against(prompts: Prompts, actor: Actor, opponent: Actor, examples: Examples) -> None:
        opponent.generate_sequences(prompts)
        actor.update_actor(examples, loss=nll())
        opponent.copy_from(actor, every=5, after=5)

    dataflow = trace(against)
    assert [node.name for node in dataflow][-2:] == ["opponent.copy_from", "opponent.reshard"]
    assert [dataflow["opponent.reshard"].runs_at(step) for step in (0, 4, 5, 6, 10)] == [
        False,
        False,
        True,
        False,
        True,
    ]
    older = to_text(replace(dataflow, staleness=1))
    assert "opponent.reshard --opponent.rollout--> opponent.generate_sequences  (2 steps later)" in older


def body(line: Callable[..., None]) -> str:
    def refused(
        prompts: Examples,
        actor: Actor,
        reference: Reference,
        critic: Critic,
        scorer: RewardModel,
        reward: Reward,
        s: Speed,
    ) -> None:
        line(actor, reference, critic, scorer, reward, s, prompts)

    with pytest.raises(GraphError) as caught:
        trace(recipe(refused))
    assert str(caught.value).startswith("test_weights.py:")
    return str(caught.value)


class Judge(Actor):
    heads = (Head(name="quality"),)


def test_weights_of_a_role_with_heads_of_its_own_go_to_no_other() -> None:
    @recipe
    def judged(examples: Examples, judge: Judge, reference: Reference) -> None:
        reference.copy_from(judge)
        reference.compute_ref_log_prob(examples)

    with pytest.raises(GraphError, match=r"would leave out quality, 'judge''s own heads: .*save_weights.* has them"):
        trace(judged)


def test_what_cannot_be_meant_is_refused_with_the_line_the_rule_and_the_remedy() -> None:
    def of(line: Callable[..., None]) -> str:
        return body(line)

    def typo(actor: Any, *_: Any) -> None:
        actor.save_weights("anchor")
        actor.restore_weights("ancor")

    def too_early(actor: Any, *_: Any) -> None:
        actor.save_weights("anchor", every=4, after=2)
        actor.restore_weights("anchor")

    assert "restores a set that no line before it saves; saved by then: anchor; did you mean 'anchor'?" in of(typo)
    assert "nothing is saved by then; call save_weights first" in of(lambda a, *_: a.restore_weights("anchor"))
    assert "runs at step 0, and the set is saved at step 4 first; give it after=4" in of(too_early)
    assert "critic.copy_from cannot take weights of 'actor': that is a policy model (Actor), and 'critic' a value" in (
        of(lambda a, r, c, *_: c.copy_from(a))
    )
    assert "is no role with a model" in of(lambda a, r, c, m, w, *_: a.copy_from(w))
    assert "Reward 'reward' has no op 'copy_from'" in of(lambda a, r, c, m, w, *_: w.copy_from(a))
    assert "Actor 'actor' has no op 'copy_form'" in of(lambda a, *_: a.copy_form(a))
    assert "needs tau in [0, 1], the share that comes from the other role; got 1.5 (merge_from" in (
        of(lambda a, r, *_: r.mix_from(a, tau=1.5))
    )
    assert "s.value('fast'), which starts as 2.0" in of(lambda a, r, c, m, w, s, p: r.mix_from(a, tau=s.value("fast")))
    assert "reference.mix_from needs the setting 'tau'" in of(lambda a, r, *_: r.mix_from(a))
    assert "needs at least one (role, factor)" in of(lambda a, r, *_: r.merge_from([]))
    assert "needs finite numbers as factors, got nan" in of(lambda a, r, *_: r.merge_from([(a, float("nan"))]))
    assert "needs a role of this recipe, got 'actor'; give the parameter itself" in of(
        lambda a, r, *_: r.copy_from("actor")
    )
    assert "needs a role of this recipe" in of(lambda a, r, c, m, w, s, p: r.copy_from(p))
    assert "is given 'actor' itself, which changes nothing" in of(lambda a, *_: a.copy_from(a))
    assert "a plain word other than train, rollout, state; got 'train'" in of(lambda a, *_: a.save_weights("train"))
    assert "no update trains 'reference'; leave optimizer= out" in of(
        lambda a, r, *_: r.save_weights("x", optimizer=True)
    )
    assert "has no setting 'evry'; it has tau" in of(lambda a, r, *_: r.mix_from(a, tau=0.1, evry=2))
    assert "needs whole every >= 1 and after >= 0, got every=0" in of(lambda a, r, *_: r.copy_from(a, every=0))


def test_the_guide_s_recipe_is_what_it_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/writing-a-recipe.md").read_text()
    [block] = [one for one in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "\ndef soups(" in one]
    imports = "from rlhf_dist.algorithms import nll\nfrom rlhf_dist.dataflow.recipe import recipe\n"
    (tmp_path / "soups.py").write_text(f"{imports}from rlhf_dist.roles import *\n\n\n{block}")
    dataflow = trace(load_recipe(str(tmp_path / "soups.py")))
    assert dataflow.written == ("actor", "reference", "ema", "soup")
    assert dataflow["reference.copy_from"].every == 100 and dataflow["soup.merge_from"].senders == ("actor", "ema")


def test_a_plan_counts_no_work_for_what_goes_from_role_to_role() -> None:
    shape = model_spec("llama3-8b", "models.default")
    load = Workload(prompts=8, prompt=Lengths.fixed(64), response=Lengths.fixed(64))
    problem = make_problem(trace(ema), dict.fromkeys(("actor", "reference", "soup"), shape), load)
    phases = {work.name: (work.phase, work.role) for work in problem.nodes}
    assert phases["reference.mix_from"] == phases["actor.save_weights"] == ("host", "")
    assert problem.trained == {"actor"} and set(problem.roles) == {"actor", "reference", "soup"}
