"""Recipes on open outputs, run in this process: a teacher's distributions, a generative reward model with a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pytest
from transformers import AutoConfig

from rlhf_dist.algorithms import Head, distill, distill_top_k, loss, nll
from rlhf_dist.checks import check_launch
from rlhf_dist.compose import compose
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences, Reference, RewardModel
from rlhf_dist.testing import check_recipe
from rlhf_dist.typed import ConfigError
from tests.tiny import save_llama


class Judge(Actor, Protocol):
    """A language model that scores what it reads: one trunk, two heads of its own."""

    heads = (Head(name="reward", at="last_token"), Head(name="risk", outputs=3, scale=0.1))


@loss(reads=("label",), outputs=("log_probs", "heads.reward", "heads.risk"), average="groups")
def generative_reward(model: Any, rows: Any, lm_coef: float = 0.1) -> Any:
    """Bradley-Terry on the head, likelihood of the chosen response on the language model (GRM, arXiv 2406.10216)."""
    from torch.nn.functional import logsigmoid

    chosen = (rows["label"] > 0).to(model.log_probs.dtype)
    per_row = -lm_coef * chosen * rows.mean_tokens(model.log_probs)
    per_row = per_row + 0.01 * rows.mean_tokens(model.heads["risk"].square().sum(-1))
    gap = rows.sum_groups(rows["label"] * model.heads["reward"])
    return rows.sum_groups(per_row) - logsigmoid(gap), {"margin": gap.detach()}


@host_op(reads=("reward", "risk", "top_ids", "hidden", "response_ids"), writes=())
def look(batch: Any) -> Any:
    tokens = len(batch["response_ids"].values)
    assert batch["reward"].values.shape == (batch.num_rows,)
    assert batch["risk"].values.shape == (tokens, 3) and batch["top_ids"].values.shape == (tokens, 4)
    assert batch["hidden"].values.shape[0] == tokens
    return batch.select()


@recipe
def judge_and_distil(pairs: Preferences, judge: Judge, student: Actor, teacher: Reference) -> None:
    pairs = teacher.compute_hidden(pairs)
    pairs = teacher.compute_top_k(pairs, k=4)
    judge.update_actor(pairs, loss=generative_reward())
    pairs = judge.compute_heads(pairs, names=("reward", "risk"))
    look(pairs)
    student.update_actor([(pairs, distill("teacher", "jsd"), 1.0), (pairs, nll(), 0.1)])
    student.update_actor(pairs, loss=distill_top_k("forward"))


def test_a_judge_with_heads_and_a_student_of_a_teacher_run_the_same_both_ways() -> None:
    steps = check_recipe(judge_and_distil, steps=1)
    assert steps[-1]["judge/version"] > 0 and steps[-1]["student/version"] > 0
    assert any(name.endswith("distill_kl") for name in steps[-1])


@pytest.mark.parametrize(
    ("name", "said"),
    [("gkd", {}), ("gkd", {"algorithm.top_k": 8}), ("two_teachers", {"algorithm.top_k": 8}), ("grm", {})],
)
def test_recipes_on_outputs_run_the_same_both_ways(name: str, said: dict[str, int]) -> None:
    (step,) = check_recipe(name, steps=1, **said)
    assert step["judge/version" if name == "grm" else "actor/version"] > 0


@recipe
def of_a_trained_one(pairs: Preferences, student: Actor, teacher: Actor) -> None:
    pairs = teacher.compute_hidden(pairs)
    student.update_actor(pairs, loss=distill("teacher"))
    teacher.update_actor(pairs, loss=nll())


@recipe
def of_a_frozen_one(pairs: Preferences, student: Actor, teacher: Reference) -> None:
    pairs = teacher.compute_top_k(teacher.compute_hidden(pairs), k=40)
    student.update_actor(pairs, loss=distill("teacher"))


@recipe
def rewards_of_labels(pairs: Preferences, rewards: RewardModel) -> None:
    rewards.compute_reward(pairs)


def test_what_a_student_cannot_have_is_refused_before_a_start(tmp_path: Path) -> None:
    small = save_llama(tmp_path / "small")
    wide = AutoConfig.from_pretrained(small)
    wide.vocab_size += 12
    wide.save_pretrained(tmp_path / "wide")
    labels = AutoConfig.from_pretrained(small)
    labels.num_labels, labels.architectures = 3, ["LlamaForSequenceClassification"]
    labels.save_pretrained(tmp_path / "labels")
    cases = {
        ("of_a_trained_one",): "reads the head of teacher from its folder, and this recipe trains teacher; use teacher",
        ("of_a_frozen_one", "teacher.model.init=random"): "teacher computes nothing in this recipe or has model.init",
        ("of_a_frozen_one", f"student.model.path={tmp_path / 'wide'}", "student.model.init=random"): (
            "student has 64 logits, teacher 52; use teacher.compute_top_k"
        ),
        (
            "copies_beside_a_head",
        ): r"judge.copy_from writes the weights of 'judge', which has heads of its own \(reward\)",
        ("rewards_of_labels", f"rewards.model.path={tmp_path / 'labels'}", "rewards.model.init=random"): (
            r"rewards.model.path has 3 labels; call rewards.compute_scores\(batch\)"
        ),
    }
    for (name, *overrides), said in cases.items():
        shared = [f"model.path={small}", "model.dtype=float32", "task=none", "data.train.path=none.jsonl"]
        launch = compose(f"{__file__}:{name}", [*shared, *overrides])
        with pytest.raises(ConfigError, match=rf"test_outputs.py:\d+: .*{said}"):
            check_launch(launch)
    few = AutoConfig.from_pretrained(small)
    few.vocab_size = 40
    few.save_pretrained(tmp_path / "few")
    overrides = [f"model.path={tmp_path / 'few'}", "student.model.init=random", "teacher.model.init=random"]
    launch = compose(f"{__file__}:of_a_frozen_one", [*overrides, "task=none", "data.train.path=none.jsonl"])
    with pytest.raises(ConfigError, match="compute_top_k needs k from 1 to 39, one less than its vocabulary, got 40"):
        check_launch(launch)
