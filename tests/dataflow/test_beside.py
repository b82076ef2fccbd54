"""An evaluation beside a step: whose weights it draws with, whom it makes wait, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from controller.execution.simulation import Span, simulate
from recipes.policy_gradient.grpo import grpo
from rlhf_dist.beside_checks import beside_lines, check_evaluation, check_pieces
from rlhf_dist.compose import compose
from rlhf_dist.dataflow.beside import with_evaluations
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.held_out import evaluation_graphs
from rlhf_dist.typed import ConfigError

POOLS: dict[str, str | tuple[str, ...]] = {
    "actor": "train",
    "reference": "train",
    "actor.generate_sequences": "gen",
    "heldout/actor.generate_sequences": "gen",
    "actor.reshard": ("train", "gen"),
}


def spans(every: int, seconds: Mapping[str, float]) -> list[Span]:
    step = trace(grpo)
    evaluations = evaluation_graphs(grpo, step, None, every=every, beside=True) if every else ()
    dataflow = with_evaluations(step, evaluations, "heldout")
    return simulate(dataflow, pool_of=POOLS, seconds=lambda node, at: seconds.get(node.name, 0.0), steps=4)


def at(found: list[Span], name: str) -> dict[int, Span]:
    return {span.step: span for span in found if span.node == name}


def test_it_takes_the_time_in_which_its_pool_waits_for_weights() -> None:
    seconds = {"actor.generate_sequences": 4.0, "actor.update_actor": 5.0, "actor.reshard": 1.0}
    alone = max(span.end_s for span in spans(0, seconds))
    quick = spans(2, {**seconds, "heldout/actor.generate_sequences": 5.0})
    assert max(span.end_s for span in quick) == alone == 40.0
    held, reshard = at(quick, "heldout/actor.generate_sequences"), at(quick, "actor.reshard")
    assert [span.start_s for step, span in held.items() if span.seconds] == [4.0, 24.0], "of steps 0 and 2"
    for step in (0, 2):
        assert held[step].start_s == at(quick, "actor.generate_sequences")[step].end_s, "never before the step's own"
        assert held[step].end_s <= reshard[step].start_s and (not step or reshard[step - 1].end_s <= held[step].start_s)
    slow = spans(2, {**seconds, "heldout/actor.generate_sequences": 8.0})
    assert max(span.end_s for span in slow) == alone + 2 * 3.0, "weights change when it has drawn all"


def test_its_nodes_are_of_the_step_s_graph_under_names_of_their_own() -> None:
    step = trace(grpo)
    dataflow = with_evaluations(step, evaluation_graphs(grpo, step, None, every=3, beside=True), "heldout")
    mine = [node for node in dataflow if node.evaluation]
    assert [node.name for node in mine] == [
        "heldout/prompts",
        "heldout/actor.generate_sequences",
        "heldout/reward.compute_reward",
    ]
    assert [node.role for node in mine] == ["heldout", "actor", "reward"] and {node.every for node in mine} == {3}
    assert len({node.place for node in dataflow if node.rows in ("new", "expand")}) == 4, "row ids stay unique"
    assert [node for node in dataflow if not node.evaluation] == list(step)
    waits = {(source, target): distance for source, target, distance in dataflow.waits}
    assert waits["actor.generate_sequences", "heldout/prompts"] == 0
    assert waits["heldout/actor.generate_sequences", "actor.reshard"] == 0
    assert waits["actor.reshard", "heldout/actor.generate_sequences"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["output.evaluate_every=0"], "output.evaluate_every=0 has none"),
        (["placement.rollout=null", "~placement.pools.gen"], "'actor' generates in pool 'main', which trains"),
        (["placement.max_staleness=1"], "with placement.max_staleness=1 it does not wait"),
        (["data.heldout=null", "output.evaluate_every=0"], ""),
    ],
    ids=["never", "one pool", "ahead", "nothing to evaluate"],
)
def test_where_it_would_hold_up_the_step_it_is_refused(settings: list[str], message: str) -> None:
    given = ["model.path=anywhere", "placement.pools.gen.slots=1", "placement.rollout=gen"]
    given += ["output.evaluate_every=2", "output.evaluate_beside=true", *settings]
    launch = compose("grpo", given)
    if not message:
        check_evaluation(launch, launch.placed)
        return
    with pytest.raises(ConfigError, match=message):
        check_evaluation(launch, launch.placed)


@pytest.mark.parametrize(
    ("recipe", "rollout", "message"),
    [
        ("improvement", ["placement.pools.gen.slots=1", "placement.rollout=gen"], "those of what scores it, change"),
        ("annotators", [], "generates in pool 'main', which trains"),
    ],
)
def test_so_it_is_where_its_scorer_learns_first_or_a_frozen_role_generates_where_others_train(
    recipe: str, rollout: list[str], message: str
) -> None:
    given = [*rollout, "output.evaluate_beside=true"]
    launch = compose(recipe, ["model.path=anywhere", "data.heldout.path=h.jsonl", "output.evaluate_every=2", *given])
    with pytest.raises(ConfigError, match=message):
        check_evaluation(launch, launch.placed)


@pytest.mark.parametrize(
    ("recipe", "settings", "taken"),
    [
        ("tool_grpo", [], ""),  # all in one pool
        ("turn_ppo", ["placement.roles.Critic=models"], "critic.compute_values: in 4 of actor.run_episodes"),
        (
            "grpo",
            ["placement.roles.Reference=models"],
            "reference.compute_ref_log_prob, reward.compute_reward: in 4 of",
        ),
    ],
)
def test_who_takes_pieces_is_said_and_pieces_that_nobody_takes_are_refused(
    recipe: str, settings: list[str], taken: str
) -> None:
    given = ["model.path=anywhere", "task=addition", "placement.pieces=4", "output.evaluate_every=5"]
    apart = ["placement.pools.models.slots=1"] if settings else []
    launch = compose(recipe, [*given, *apart, *settings])
    if not taken:
        with pytest.raises(ConfigError, match=f"placement.pieces=4 lets .* and in {recipe} none does"):
            check_pieces(launch, launch.placed)
        return
    check_pieces(launch, launch.placed)
    pieces, evaluated = beside_lines(launch, launch.placed)
    assert pieces.startswith(f"pieces    {taken}") and pieces.endswith("as they are finished")
    assert evaluated == "held out  evaluated every 5 steps, between two steps"
