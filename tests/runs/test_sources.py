"""A recipe with sources of its own kinds: each has its section, rows a step and columns; mistakes are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.record.metrics import read_metrics
from rlhf_dist.checks import check_launch, rows_of_nodes
from rlhf_dist.compose import compose
from rlhf_dist.data import training_source
from rlhf_dist.typed import ConfigError
from tests.runs.test_recipes import weights

RECIPE = '''
"""HyPO: pairs from a file and KL to the reference on the policy's own responses (Song et al. 2024, 2406.01462)."""

import numpy as np

from rlhf_dist.algorithms import dpo, loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences, Prompts, Reference


class Graded(Prompts):
    fields = {"difficulty": "float32", "level": "int64", "tags": "json"}


@host_op(reads=("difficulty", "level", "tags", "group_id"), writes=("weight",))
def by_difficulty(batch):
    assert batch["level"].values.dtype == np.int64 and batch["tags"].rows()[0] == '["sum"]'
    assert batch["group_id"].values.min() >= FIRST_GROUP, "ids of the second source do not meet those of the first"
    return Batch({"weight": Column(1 / batch["difficulty"].values)})


FIRST_GROUP = 1 << 48


@loss(reads=("ref_log_probs", "weight"), average="rows")
def to_reference(model, rows):
    """log pi / pi_ref of a whole response, weighted."""
    gap = rows.sum_tokens(model.log_probs - rows["ref_log_probs"]) * rows["weight"]
    return gap, {"gap": gap.detach()}


@recipe
def hypo(pairs: Preferences, prompts: Graded, actor: Actor, reference: Reference) -> None:
    """Offline pairs, online KL."""
    offline = reference.compute_ref_log_prob(pairs)
    actor.update_actor(offline, loss=dpo(0.1))
    online = reference.compute_ref_log_prob(actor.generate_sequences(by_difficulty(prompts)))
    actor.update_actor(online, loss=to_reference())
'''


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    pairs = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "0"} for n in range(8)]
    prompts = [{"prompt": f"{n}+2=", "difficulty": n + 1, "level": n, "tags": ["sum"]} for n in range(8)]
    found = {"recipe": tmp_path / "hypo.py", "pairs": tmp_path / "pairs.jsonl", "prompts": tmp_path / "prompts.jsonl"}
    found["recipe"].write_text(RECIPE)
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def sections(files: dict[str, Path]) -> list[str]:
    return [
        f"data.train.path={files['prompts']}",
        f"data.sources.pairs.path={files['pairs']}",
        "data.sources.pairs.rows_per_step=2",
    ]


def test_offline_pairs_and_online_prompts_in_one_recipe(
    launch_warm: Callable[..., Any], files: dict[str, Path], tmp_path: Path
) -> None:
    settings = (*sections(files), "actor.rollout.max_response_tokens=5", "placement=colocate")
    one_slot = ("placement.pools.main.slots=1", "actor.rollout.engine=transformers")
    launch_warm(str(files["recipe"]), *settings, *one_slot, root=tmp_path / "ray")
    launch_warm(str(files["recipe"]), *settings, local=True, root=tmp_path / "local")
    for step in read_metrics(tmp_path / "ray/hypo"):
        assert (step["pairs/rows"], step["prompts/rows"]) == (4.0, 4.0)  # two pairs, four prompts
    ours, theirs = (weights(tmp_path / root / "hypo/models/actor") for root in ("local", "ray"))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def plan(files: dict[str, Path], model: Path, *settings: str) -> Any:
    made = compose(str(files["recipe"]), ["task=none", f"model.path={model}", "data.prompts_per_step=4", *settings])
    check_launch(made)
    return made


def test_each_source_is_checked_where_it_is_said(files: dict[str, Path], model: Path) -> None:
    good = plan(files, model, *sections(files))
    rows = rows_of_nodes(good)
    assert any("2 pairs + 4 prompts -> 4 rows" in line for line in check_launch(good))
    pairs = training_source(good, "pairs").emit(0, 2)
    assert pairs["group_id"].rows() == [0, 0, 1, 1] and "difficulty" not in pairs
    assert training_source(good, "prompts").emit(0, 1)["difficulty"].values.dtype == np.float32
    assert (rows["pairs"][0], rows["prompts"][0], rows["actor.update_actor"][0]) == (4, 4, 4)
    for settings, error in (
        ([f"data.train.path={files['prompts']}"], "takes Preferences as 'pairs' and Graded as 'prompts'.*data.sources"),
        ([*sections(files), f"data.sources.pears.path={files['pairs']}"], "data.sources.pears.*did you mean.*pairs"),
        ([*sections(files), "data.sources.pairs.rows=examples"], "data.sources.pairs.rows must be preferences.*'exam"),
        ([*sections(files), "data.sources.pairs.rows_per_step=-1"], "data.sources.pairs.rows_per_step must be >= 0"),
        ([*sections(files)[1:], f"data.train.path={files['pairs']}"], "has no 'difficulty', which the recipe's kind"),
    ):
        with pytest.raises(ConfigError, match=error):
            plan(files, model, *settings)
    files["prompts"].write_text('{"prompt": "1+1=", "difficulty": "hard", "level": 1, "tags": []}\n')
    with pytest.raises(
        ConfigError, match="'difficulty' must be float32, as the recipe's kind of source says, got 'hard'"
    ):
        plan(files, model, *sections(files))


def test_a_field_that_is_a_column_already_or_of_no_kind_is_refused(files: dict[str, Path], model: Path) -> None:
    for wrong, error in (('"answer": "text"', "which is a column already"), ('"level": "float8"', "it can be float32")):
        files["recipe"].write_text(RECIPE.replace('"level": "int64"', wrong))
        with pytest.raises(ValueError, match=error):
            plan(files, model, *sections(files))
