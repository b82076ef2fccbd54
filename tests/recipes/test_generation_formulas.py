"""What recipes do with prompts, hints and thoughts, and measurements of policies, against values worked by hand."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest

from recipes.constrained.safe_rlhf import Lagrange, SafeRLHF
from recipes.evaluation.frontier import point
from recipes.policy_gradient.dense_rewards import confident_penalty
from recipes.policy_gradient.resets import with_beginnings
from recipes.policy_gradient.thinking import answers_alone
from recipes.policy_gradient.vapo import decoupled_gae
from recipes.preference.active_pairs import most_informative
from recipes.reasoning.ghpo import all_wrong, with_hint
from rlhf_dist.batch import Batch, Column
from rlhf_dist.compose import compose_dataflow
from rlhf_dist.transforms import gae, lagrangian_advantage
from tests.recipes.rows import masked, numbers, ragged, values


def ids(batch: Batch, name: str) -> list[list[int]]:
    return [row.tolist() for row in batch[name].rows()]


def test_a_reset_puts_the_beginning_of_a_response_into_the_prompt() -> None:
    batch = Batch(
        {"prompt_ids": ragged([1], [2], dtype="int32"), "response_ids": ragged([5, 6, 7], [8], dtype="int32")}
    )
    found = [
        ids(with_beginnings(batch, share=1.0, rng=np.random.default_rng(seed)).columns, "prompt_ids")
        for seed in range(30)
    ]
    assert {tuple(one[0]) for one in found} == {(1, 5), (1, 5, 6)}  # never nothing, never all of it
    assert all(one[1] == [2] for one in found)  # one token has no beginning
    assert ids(with_beginnings(batch, share=0.0, rng=np.random.default_rng(0)).columns, "prompt_ids") == [[1], [2]]


def test_a_hint_is_for_groups_without_a_right_response() -> None:
    batch = Batch({"rewards": numbers(0, 0, 0, 1), "group_id": numbers(3, 3, 4, 4, dtype="int64")})
    result = all_wrong(batch, right=0.5)
    assert values(result.columns, "too_hard") == [1, 1, 0, 0] and result.metrics["too_hard"].value == 0.5
    problems = Batch(
        {
            "prompt_ids": ragged([1], [2], dtype="int32"),
            "response_ids": ragged([5, 6, 7, 8], [9], dtype="int32"),
            "group_id": numbers(3, 4, dtype="int64"),
        }
    )
    hard = Batch({"group_id": numbers(3, 3, dtype="int64")})
    hints = [with_hint(problems, hard, share=share) for share in (0.25, 0.5, 0.75)]
    assert [ids(one.columns, "prompt_ids") for one in hints] == [[[1, 5]], [[1, 5, 6]], [[1, 5, 6, 7]]]
    assert hints[0].keep is not None and hints[0].keep.tolist() == [0]
    none = with_hint(problems, hard.slice(0, 0), share=0.5)
    assert none.keep is not None and len(none.keep) == 0


def test_an_answer_is_what_follows_the_last_thought() -> None:
    batch = Batch(
        {
            "response_ids": ragged([1, 7, 2, 7, 3, 4], [1, 2], dtype="int32"),
            "response": Column.strings(["a|b|cd", "ab"]),
        }
    )
    made = answers_alone(batch, end="|", end_ids=(7,))
    assert list(made.columns["response"].rows()) == ["cd", ""] and ids(made.columns, "response_ids") == [[3, 4], []]
    assert made.parent is not None and made.parent.tolist() == [0, 1] and made.metrics["thoughts_ended"].value == 0.5
    assert ids(answers_alone(batch, end="|", end_ids=()).columns, "response_ids") == [[1, 7, 2, 7, 3, 4], [1, 2]]


def test_vapo_has_a_lambda_for_each_length_and_returns_of_what_is_to_come() -> None:
    batch = Batch(
        {
            "rewards": numbers(1, 1),
            "values": ragged([0.5, 0.25], [0.5, 0.25, 0, 0]),
            "response_mask": masked(2, 4),
        }
    )
    made = decoupled_gae(batch, alpha=0.5)
    # alpha l = 1 and 2: lambda 0 and 1/2. Row 0: 0.25 - 0.5, 1 - 0.25. Row 1: deltas -0.25, -0.25, 0, 1, halved back.
    np.testing.assert_allclose(values(made, "advantages"), [-0.25, 0.75, -0.25, 0, 0.5, 1])
    np.testing.assert_allclose(values(made, "returns"), [1] * 6)
    long = decoupled_gae(batch, alpha=1e9)  # lambda 1 for all
    plain = gae(batch, gamma=1.0, lam=1.0).columns
    np.testing.assert_allclose(values(long, "advantages"), values(plain, "advantages"), atol=1e-6)


def test_a_penalty_is_small_where_the_reference_doubts() -> None:
    batch = Batch(
        {
            "old_log_probs": ragged([log(0.8), log(0.2)]),
            "ref_log_probs": ragged([log(0.4), log(0.1)]),
            "response_mask": masked(2),
        }
    )
    expected = [-0.5 * 0.4 * log(2), -0.5 * 0.1 * log(2)]
    np.testing.assert_allclose(values(confident_penalty(batch, coef=0.5), "token_rewards"), expected, rtol=1e-6)


def test_safe_rlhfs_price_of_leaving_the_reference_is_beta_whatever_the_multiplier() -> None:
    # log pi/pi_ref of 1 and 0.5, beta 0.02, values 0, gamma and lambda of GAE 1: what is to come is r - 0.03 and
    # c + 0.03 at the first token, r - 0.01 and c + 0.01 at the second. With r 3, c 2 and a multiplier of 2, of both:
    # (3 - 2 * 2) / 3 - 0.03 and - 0.01.
    nodes = {node.name: node for node in compose_dataflow("safe_rlhf", ["algorithm.lam=1"])}
    common = {"values": ragged([0, 0]), "old_log_probs": ragged([-1, -1]), "ref_log_probs": ragged([-2, -1.5])}
    common["response_mask"] = masked(2)
    gains = gae(Batch({**common, "rewards": numbers(3)}), **nodes["gae"].kwargs)
    costs = gae(Batch({**common, "rewards": numbers(2)}), **nodes["gae#2"].kwargs)
    both = Batch({"advantages": gains.columns["advantages"], "cost_advantages": costs.columns["advantages"]})
    found = values(lagrangian_advantage(both, lam=2.0), "advantages")
    np.testing.assert_allclose(found, [-1 / 3 - 0.03, -1 / 3 - 0.01], rtol=1e-5)


def test_hc_rlhfs_cost_is_pessimistic() -> None:
    # Costs 0 and 2: mean 1, standard error sqrt(2) / sqrt(2) = 1; 1.5 of it: 2.5, over the limit of 2.
    batch, state = Batch({"costs": numbers(0, 2)}), Lagrange()
    given = {"limit": 2.0, "lr": 0.1}
    held, _ = state.update(state.initial(SafeRLHF()), batch, **given, pessimism=1.5)
    plain, _ = state.update(state.initial(SafeRLHF()), batch, **given)
    assert held["multiplier"] > 1 > plain["multiplier"]
    assert log(held["multiplier"]) / -log(plain["multiplier"]) == pytest.approx(0.5)  # 0.5 over against 1 under


def test_a_point_of_the_frontier() -> None:
    batch = Batch(
        {
            "rewards": numbers(1, 2, 0),
            "their_rewards": numbers(1, 0, 3),
            "rollout_log_probs": ragged([-1, -1], [-2], [-1]),
            "ref_log_probs": ragged([-3, -2], [-3], [-1]),
            "response_mask": masked(2, 1, 1),
        }
    )
    found = {name: metric.value for name, metric in point(batch).metrics.items()}
    assert found == pytest.approx({"kl": 4 / 3, "sqrt_kl": (4 / 3) ** 0.5, "gold_reward": 1.0, "win_rate": 0.5})


def test_a_design_takes_the_pair_that_those_before_say_least_about() -> None:
    # Features (2, 0), (1.9, 0) and (0, 1): first the longest, then the one across, though the other is longer.
    hidden = [[2.0, 0], [0, 0], [1.9, 0], [0, 0], [0, 1.0], [0, 0]]
    batch = Batch(
        {
            "hidden": Column(np.array(hidden, np.float32), np.arange(7)),
            "response_mask": masked(*[1] * 6),
            "label": numbers(*[1, -1] * 3, dtype="int8"),
            "group_id": numbers(0, 0, 1, 1, 2, 2, dtype="int64"),
        }
    )
    result = most_informative(batch, share=2 / 3, ridge=1.0)
    assert result.keep is not None and result.keep.tolist() == [0, 1, 4, 5]
    assert result.metrics["log_det_gain"].value == pytest.approx(log(5) + log(2))
    assert exp(log(5) + log(2)) == pytest.approx(np.linalg.det(np.eye(2) + np.diag([4.0, 1.0])))
