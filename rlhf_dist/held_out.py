"""The graphs that a launch is evaluated with: what its own graph asks of a role that learns, asked once about each
held-out row and answered greedily, and what scores it.

    actor.generate_sequences(prompts, n=8)                      ->  one greedy response, reward.compute_reward
    actor.run_episodes(prompts, environment=Calculator(), n=8)  ->  one greedy episode of the same environment, within
                                                                    its limits, rewarded by it (by the reward role
                                                                    where its `rewards` is False)

A role whose first rows are episodes of a source's rows plays episodes; any other one responds once. A recipe that says
itself what is evaluated, `@recipe(evaluation=function)`, has that function's graph and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_dist.dataflow.evaluation_graph import EvaluationGraph
from rlhf_dist.dataflow.graph import Dataflow, Node
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.roles import Prompts, ops_of

HELDOUT = "heldout"
SCORE = "compute_reward"


def evaluation_graphs(
    recipe: Recipe, dataflow: Dataflow, algorithm: Any, *, every: int, rows: bool = True, beside: bool = False
) -> tuple[EvaluationGraph, ...]:
    """The graphs of `evaluations`. algorithm: the recipe's settings, which an evaluation of its own may read. every,
    rows, beside: see `EvaluationGraph`."""
    found = evaluations(recipe, dataflow)
    return tuple(
        EvaluationGraph(
            name=HELDOUT if len(found) == 1 else f"{HELDOUT}/{role}",
            dataflow=trace(one, algorithm if one.config is not None else None),
            every=every,
            rows=rows,
            beside=beside and every > 0,
        )
        for role, one in found.items()
    )


def evaluations(recipe: Recipe, dataflow: Dataflow) -> dict[str, Recipe]:
    """Role -> how it is evaluated: every role that generates and learns (every one that generates, where none learns),
    if its episodes give rewards or something scores what it writes: the role called `reward`, or the only one that
    gives rewards. The recipe's own evaluation, where it has one, is of no role: it has an empty name."""
    if recipe.evaluation is not None:
        return {"": replace(recipe.evaluation, reads=recipe.reads)}
    scorer = _scorer(recipe, dataflow)
    learning = [role for role in dataflow.generating if dataflow.facts[role].trained]
    found: dict[str, Recipe] = {}
    for role in learning or dataflow.generating:
        node = _episodes(dataflow, role)
        if node is not None and node.kwargs["environment"].rewards:
            found[role] = _recipe(recipe, dataflow, role, node, None)
        elif scorer is not None:
            found[role] = _recipe(recipe, dataflow, role, node, scorer)
    return found


def held_out_fields(recipe: Recipe, dataflow: Dataflow) -> dict[str, str]:
    """Fields of held-out rows, with their kinds, that come as columns of their own: those of the evaluation's source,
    or what environments read that are evaluated (`Environment.reads`)."""
    fields: dict[str, str] = {}
    if recipe.evaluation is not None:
        (source,) = recipe.evaluation.sources
        return dict(recipe.evaluation.source_fields(source))
    for role in evaluations(recipe, dataflow):
        node = _episodes(dataflow, role)
        fields |= {} if node is None else _fields(recipe, dataflow, node)
    return fields


def _scorer(recipe: Recipe, dataflow: Dataflow) -> str | None:
    used = dataflow.used_roles
    scoring = [role for role, kind in recipe.roles.items() if role in used and SCORE in ops_of(kind)]
    return "reward" if "reward" in scoring else scoring[0] if len(scoring) == 1 else None


def _episodes(dataflow: Dataflow, role: str) -> Node | None:
    """The episodes that the role's first rows are, of rows that a source gives as they are; None for anything else."""
    first = next((node for node in dataflow if node.role == role and node.rows == "expand"), None)
    if first is None or first.op != "run_episodes":
        return None
    read = {origin.node for batch in first.inputs for origin in batch.columns.values()}
    return first if all(dataflow[name].kind == "source" for name in read) else None


def _fields(recipe: Recipe, dataflow: Dataflow, episodes: Node) -> Mapping[str, str]:
    source = dataflow.source_of(episodes.name)
    own = {} if source is None else recipe.source_fields(source)
    return {name: kind for name, kind in own.items() if name in episodes.reads}


def _recipe(recipe: Recipe, dataflow: Dataflow, player: str, episodes: Node | None, scorer: str | None) -> Recipe:
    speakers = {} if episodes is None else dict(episodes.kwargs["speakers"])

    def evaluate(**given: Any) -> None:
        if episodes is None:
            batch = given[player].generate_sequences(given["prompts"], greedy=True)
        else:
            batch = given[player].run_episodes(
                given["prompts"],
                environment=episodes.kwargs["environment"],
                limits=episodes.kwargs["limits"],
                speakers={name: given[role] for name, role in speakers.items()},
                greedy=True,
                held_out=True,
            )
        if scorer is not None:
            getattr(given[scorer], SCORE)(batch)

    source: type = Prompts
    if episodes is not None and (fields := _fields(recipe, dataflow, episodes)):
        source = type("HeldOut", (Prompts,), {"fields": fields})
    used = dict.fromkeys((player, *speakers.values(), *(() if scorer is None else (scorer,))))
    roles = {role: recipe.roles[role] for role in used}
    return Recipe(evaluate, "evaluate", Path(__file__), {"prompts": source}, roles, {}, None)
