"""Advantages, surrogates, rewards and filters of online recipes against values worked by hand from the papers."""

from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
import pytest

from recipes.policy_gradient._advantages import advantages_of, pass_at_k, response_advantage, win_shares, with_entropy
from recipes.policy_gradient._surrogates import covariance_of, covariance_surrogate, row_surrogate, token_surrogate
from recipes.policy_gradient.dense_rewards import implicit_rewards, step_rewards
from recipes.policy_gradient.ppo_max import PPOMax, Rewards
from recipes.policy_gradient.rejection import all_good, different_ones, own_likelihood, penalised, right_ones
from recipes.policy_gradient.shaped_rewards import Shaped, Spread, against_references, by_length
from recipes.policy_gradient.surrogates import as_many_below, pass_rates, weighed_by_themselves
from rlhf_dist.algorithms import policy_gradient, ppo_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.missing import MISSING
from tests.recipes.rows import gradient, masked, numbers, of_rows, ragged, values


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


# Group 0: rewards 1, 0, 0 of lengths 1, 2, 3; group 1: 2, 2 of lengths 2, 2.
REWARDS, GROUP, LENGTHS = [1, 0, 0, 2, 2], np.array([0, 0, 0, 1, 1]), np.array([1, 2, 3, 2, 2])


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("none", [1, 0, 0, 2, 2]),
        ("signed", [1, -1, -1, 1, 1]),
        ("loo", [1, -1 / 2, -1 / 2, 0, 0]),
        ("group_mean", [2 / 3, -1 / 3, -1 / 3, 0, 0]),
        ("shifted", [2 / 3 + 0.1, -1 / 3 + 0.1, -1 / 3 + 0.1, 0.1, 0.1]),
        ("group", [sqrt(2), -sqrt(1 / 2), -sqrt(1 / 2), 0, 0]),  # std sqrt(2) / 3
        ("length", [5 / 6, -1 / 6, -1 / 6, 0, 0]),  # baseline 1 * 1 / 6 and 2
        ("wins", [1 / 2, -1 / 4, -1 / 4, 0, 0]),  # beats both; loses and ties: 1 / 4; ties: 1 / 2
    ],
)
def test_an_advantage(baseline: str, expected: list[float]) -> None:
    found = advantages_of(REWARDS, GROUP, LENGTHS, baseline, shift=-0.1)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_advantages_that_do_not_know_a_shift_of_all_rewards() -> None:
    for baseline in ("loo", "group", "group_mean", "length", "wins"):
        shifted = advantages_of(np.array(REWARDS) + 3.0, GROUP, LENGTHS, baseline)  # type: ignore[arg-type]
        np.testing.assert_allclose(shifted, advantages_of(REWARDS, GROUP, LENGTHS, baseline), atol=1e-6)  # type: ignore[arg-type]


def test_wins_keep_the_order_of_rows_whatever_that_of_groups() -> None:
    mixed = advantages_of([1, 5, 0, 7], np.array([0, 1, 0, 1]), np.ones(4), "wins")
    np.testing.assert_allclose(mixed, [0.5, -0.5, -0.5, 0.5])
    assert win_shares(np.array([3.0])).tolist() == [0.0]


def test_pass_at_k_of_four_responses_two_of_them_right() -> None:
    # k = 2: R = 1 - C(2, 2) / C(4, 2) = 5/6, S = sqrt(5) / 6. Right: (1/6) / S. Wrong: (1/6 - C(1, 1) / C(3, 1)) / S.
    right = np.array([True, False, True, False])
    deviation = sqrt(5) / 6
    np.testing.assert_allclose(
        pass_at_k(right, 2), np.where(right, 1 / 6 / deviation, (1 / 6 - 1 / 3) / deviation), rtol=1e-12
    )
    np.testing.assert_allclose(pass_at_k(right, 1), np.where(right, 1, -1))  # the mean of the group and its deviation
    assert pass_at_k(right, 4).tolist() == [0, 0, 0, 0] and pass_at_k(np.zeros(3, bool), 2).tolist() == [0, 0, 0]
    assert abs(pass_at_k(right, 2).sum()) < 1e-12
    with pytest.raises(ValueError, match="1 <= k <= responses"):
        pass_at_k(right, 5)


def test_a_response_advantage_takes_the_kl_from_the_reward_and_is_of_every_token() -> None:
    batch = Batch(
        {
            "rewards": numbers(1, 0),
            "group_id": numbers(0, 0, dtype="int64"),
            "response_mask": ragged([1, 0], [1], dtype="uint8"),
            "old_log_probs": ragged([-1, 9], [-2]),
            "ref_log_probs": ragged([-2, 0], [-2]),
        }
    )
    # Log-ratio of row 0: 1 (its second token does not count): rewards 0.5 and 0.
    found = response_advantage(batch, baseline="loo", kl_coef=0.5)
    assert values(found.columns, "advantages") == [0.5, 0.0, -0.5]


def test_an_advantage_of_the_batch_is_of_every_token_and_has_the_kl_that_is_still_to_come() -> None:
    batch = Batch(
        {
            "rewards": numbers(1, 0),
            "group_id": numbers(0, 0, dtype="int64"),
            "response_mask": ragged([1, 1, 0], [1], dtype="uint8"),
            "old_log_probs": ragged([-1, -1, 9], [-2]),
            "ref_log_probs": ragged([-2, -3, 0], [-2]),
        }
    )
    # Log-ratios 1, 2 | 0, times 1/6: to come 1/2, 1/3 | 0. Returns 1/2, 2/3 | 0: mean 7/18, distances 2, 5, -7 of 18.
    deviation = sqrt((4 + 25 + 49) / 3) / 18
    found = response_advantage(batch, baseline="batch", kl_coef=1 / 6)
    by_hand = np.array([2, 5, 0, -7]) / 18 / deviation
    np.testing.assert_allclose(values(found.columns, "advantages"), by_hand, rtol=1e-4)
    # Less the group's mean 1/2, without a KL: 1/2, 1/2, -1/2, whose mean is 1/6 and deviation sqrt(2) / 3.
    found = response_advantage(batch, baseline="group_batch")
    np.testing.assert_allclose(
        values(found.columns, "advantages"), [sqrt(1 / 2), sqrt(1 / 2), 0, -sqrt(2)], rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ValueError, match="for each token"):
        advantages_of([1.0], np.zeros(1, int), np.ones(1), "batch")


@pytest.mark.parametrize("baseline", ["loo", "group", "group_mean", "batch", "length", "wins", "pass_at_k", "signed"])
def test_a_response_whose_reward_is_missing_is_in_no_baseline_and_does_not_count(baseline: str) -> None:
    rewards, group, lengths = [1.0, MISSING, 0.0, MISSING, 1.0, 1.0], [0, 0, 0, 1, 1, 1], (2, 1, 1, 2, 1, 3)

    def advantages(rows: list[int]) -> Batch:
        columns = {
            "rewards": numbers(*(rewards[row] for row in rows)),
            "group_id": numbers(*(group[row] for row in rows), dtype="int64"),
            "response_mask": masked(*(lengths[row] for row in rows)),
        }
        return response_advantage(Batch(columns), baseline=baseline, k=2).columns  # type: ignore[no-any-return]

    all_rows, known = advantages([0, 1, 2, 3, 4, 5]), advantages([0, 2, 4, 5])
    for row, at in {0: 0, 2: 1, 4: 2, 5: 3}.items():
        assert all_rows["advantages"].row(row).tolist() == known["advantages"].row(at).tolist()
    assert [all_rows["response_mask"].row(row).tolist() for row in (1, 3)] == [[0], [0, 0]]
    lost = response_advantage(
        Batch({"rewards": numbers(MISSING), "group_id": numbers(0, dtype="int64"), "response_mask": masked(2)}),
        baseline=baseline,
    )
    assert values(lost.columns, "advantages") == [0, 0] and "reward" not in lost.metrics


def test_entropy_adds_up_to_a_share_of_the_advantage() -> None:
    batch = Batch({"advantages": ragged([1, -1, 0.1]), "entropy": ragged([1, 0.5, 2]), "response_mask": masked(3)})
    # 0.4 H = 0.4, 0.2, 0.8; |A| / 2 = 0.5, 0.5, 0.05.
    np.testing.assert_allclose(
        values(with_entropy(batch, alpha=0.4, kappa=2.0).columns, "advantages"), [1.4, -0.8, 0.15]
    )


# Two tokens of two rows: rho = 2 and 1/2, advantages 1 and -1 unless said.
LOG_PROBS = [log(0.4), log(0.2)]
OLD = {"old_log_probs": [log(0.2), log(0.4)], "advantages": [1.0, -1.0]}


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("cispo", {"low": 0.2, "high": 0.5}, [-1.5 * log(0.4), 0.8 * log(0.2)]),
        ("sapo", {}, [-4 * sigmoid(1.0), 4 / 1.05 * sigmoid(-0.525)]),
        ("mdpo", {"coef": 0.5}, [-2 + 0.5 * (2 * log(2) - 1), 0.5 + 0.5 * (-0.5 * log(2) + 0.5)]),
        ("one_side", {}, [0, 0]),  # up and beyond 1.2; down and below 0.8
        ("two_side", {}, [0, 0]),
        ("one_side", {"high": 1.5, "low": 0.6}, [-2, 0.5]),
        ("one_side", {"high": 1.5, "low": 0.6, "importance": False}, [-log(0.4), log(0.2)]),
    ],
)
def test_a_surrogate_of_tokens(kind: str, settings: dict[str, float], expected: list[float]) -> None:
    loss = token_surrogate(kind, **settings)  # type: ignore[arg-type]
    assert of_rows(loss, LOG_PROBS, OLD, [1, 1]) == pytest.approx(expected)


def test_masks_differ_where_the_step_leads_back() -> None:
    back = {**OLD, "advantages": [-1.0, 1.0]}  # rho 2 going down, rho 1/2 going up
    loss = lambda kind, **far: token_surrogate(kind, importance=False, **far)  # noqa: E731
    plain = [log(0.4), -log(0.2)]
    assert of_rows(loss("one_side"), LOG_PROBS, back, [1, 1]) == pytest.approx(plain)
    assert of_rows(loss("two_side"), LOG_PROBS, back, [1, 1]) == [0, 0]
    assert of_rows(loss("ring", far_low=0.4, far_high=0.9), LOG_PROBS, back, [1, 1]) == pytest.approx(plain)
    assert of_rows(loss("ring", far_low=0.6, far_high=2.0), LOG_PROBS, back, [1, 1]) == [0, 0]


def test_nft_on_right_and_wrong_responses_and_its_floor() -> None:
    columns = {"old_log_probs": OLD["old_log_probs"], "advantages": [0.0, 0.0], "pass_rate": [0.25, 0.25]}
    weight = sqrt(3)  # sqrt(0.75 / 0.25)
    right = of_rows(token_surrogate("nft"), LOG_PROBS, {**columns, "right": [1, 1]}, [1, 1])
    assert right == pytest.approx([-weight * log(2), weight * log(2)])
    wrong = of_rows(token_surrogate("nft"), LOG_PROBS, {**columns, "right": [0, 0]}, [1, 1])
    assert wrong == pytest.approx([-weight * log((1 - 0.5) / 0.75), -weight * log((1 - 0.125) / 0.75)])
    high = {**columns, "pass_rate": [0.75, 0.75], "right": [0, 0]}  # 1 - 0.75 * 2 < 0: the floor
    assert of_rows(token_surrogate("nft", floor=0.1), LOG_PROBS, high, [1, 1])[0] == pytest.approx(
        -sqrt(1 / 3) * log(0.1)
    )
    clear = {**columns, "pass_rate": [1.0, 0.0], "right": [1, 0]}
    assert of_rows(token_surrogate("nft"), LOG_PROBS, clear, [1, 1]) == [0, 0]


@pytest.mark.parametrize("kind", ["cispo", "sapo", "mdpo", "one_side", "two_side", "ring"])
def test_on_policy_every_surrogate_has_the_policy_gradient(kind: str) -> None:
    same = {"old_log_probs": LOG_PROBS, "advantages": [1.0, -2.0]}
    found = gradient(token_surrogate(kind), LOG_PROBS, same, [1, 1])  # type: ignore[arg-type]
    assert found == pytest.approx(gradient(policy_gradient(), LOG_PROBS, same, [1, 1])) == [-1.0, 2.0]


def test_on_policy_nft_has_grpos_gradient() -> None:
    # One right of four: GRPO's advantages (r - 1/4) / (sqrt(3) / 4) = sqrt(3) and -1 / sqrt(3).
    columns = {"old_log_probs": LOG_PROBS, "advantages": [0.0, 0.0], "pass_rate": [0.25, 0.25], "right": [1, 0]}
    assert gradient(token_surrogate("nft"), LOG_PROBS, columns, [1, 1]) == pytest.approx([-sqrt(3), 1 / sqrt(3)])


def test_surrogates_of_whole_responses() -> None:
    # One response of two tokens, log rho = log 2 and -log 2; advantage 2.
    columns = {"old_log_probs": [log(0.2), log(0.4)], "advantages": [2.0, 2.0]}
    cut = (0.4 - log(2)) / 2
    assert of_rows(row_surrogate("gmpo"), LOG_PROBS, columns, [2]) == pytest.approx([-2 * exp(cut)])
    down = {**columns, "advantages": [-2.0, -2.0]}
    assert of_rows(row_surrogate("gmpo"), LOG_PROBS, down, [2]) == pytest.approx([2 * exp((log(2) - 0.4) / 2)])
    whole = {"old_log_probs": [log(0.2), log(0.2)], "advantages": [2.0, 2.0]}  # log rho of the response: log 2
    said = log(0.4) + log(0.2)
    assert of_rows(row_surrogate("opmd", tau=0.5), LOG_PROBS, whole, [2]) == pytest.approx(
        [-2 * said + log(2) ** 2 / 4]
    )
    assert of_rows(row_surrogate("topr"), LOG_PROBS, whole, [2]) == pytest.approx([-2 * said])
    negative = {"old_log_probs": [log(0.8), log(0.2)], "advantages": [-2.0, -2.0]}  # rho 1/2
    assert of_rows(row_surrogate("topr"), LOG_PROBS, negative, [2]) == pytest.approx([0.5 * 2 * said])


def test_gmpo_of_one_token_responses_is_a_ratio_cut_on_one_side() -> None:
    free = of_rows(row_surrogate("gmpo", low=9, high=9), LOG_PROBS, OLD, [1, 1])
    assert free == pytest.approx([-2, 0.5])


def test_tokens_that_move_the_entropy_are_held() -> None:
    # log pi -1, -2, -3, -4 (mean -2.5), A 3, 1, -1, -3 (mean 0): cov 4.5, 0.5, 0.5, 4.5.
    batch = Batch(
        {
            "advantages": ragged([3, 1], [-1, -3]),
            "old_log_probs": ragged([-1, -2], [-3, -4]),
            "response_mask": masked(2, 2),
        }
    )
    draw = {"share": 0.25, "low": 0.4, "high": 0.6, "rng": np.random.default_rng(0)}
    assert values(covariance_of(batch, kind="kl_cov", **draw).columns, "picked") == [1, 0, 0, 0]
    drawn = {tuple(values(covariance_of(batch, kind="clip_cov", **draw).columns, "picked")) for _ in range(30)}
    assert drawn == {(0, 1, 0, 0), (0, 0, 1, 0)}
    columns = {**OLD, "picked": [1.0, 0.0]}
    assert of_rows(covariance_surrogate("clip_cov"), LOG_PROBS, columns, [1, 1]) == pytest.approx([0, 0.8])
    found = of_rows(covariance_surrogate("kl_cov", kl_coef=0.5), LOG_PROBS, columns, [1, 1])
    assert found == pytest.approx([-2 + 0.5 * log(2), 0.5])
    none = {**OLD, "picked": [0.0, 0.0]}
    assert of_rows(covariance_surrogate("clip_cov"), LOG_PROBS, none, [1, 1]) == pytest.approx(
        of_rows(ppo_clip(0.2), LOG_PROBS, none, [1, 1])
    )


def test_pass_rates_balance_and_weights_of_rows() -> None:
    batch = Batch({"rewards": numbers(1, 0, 0, 1), "group_id": numbers(0, 0, 0, 1, dtype="int64")})
    made = pass_rates(batch)
    np.testing.assert_allclose(values(made, "pass_rate"), [1 / 3, 1 / 3, 1 / 3, 1])
    assert values(made, "right") == [1, 0, 0, 1]
    lost = pass_rates(Batch({"rewards": numbers(1, MISSING, 0), "group_id": numbers(0, 0, 0, dtype="int64")}))
    assert values(lost, "pass_rate") == [0.5, 0.5, 0.5] and values(lost, "right") == [1, 0, 0]
    rows = Batch(
        {
            "advantages": ragged([1, 1], [-0.5], [-0.5], [0]),
            "response_mask": masked(2, 1, 1, 1),
            "group_id": numbers(0, 0, 0, 1, dtype="int64"),
        }
    )
    kept = {tuple(as_many_below(rows, rng=np.random.default_rng(seed)).keep) for seed in range(20)}  # type: ignore[arg-type]
    assert kept == {(0, 1, 3), (0, 2, 3)}
    np.testing.assert_allclose(
        values(weighed_by_themselves(rows), "advantages"), [exp(1), exp(1), *[-0.5 * exp(-0.5)] * 2, 0]
    )


def test_what_rejection_ranks_keeps_and_drops() -> None:
    batch = Batch(
        {
            "rewards": numbers(1, 0.5, 2),
            "group_id": numbers(0, 0, 1, dtype="int64"),
            "response": Column.strings(["7", "7", "7"]),
            "old_log_probs": ragged([-1, -2], [-1], [-4]),
            "ref_log_probs": ragged([-2, -2], [-1], [-3]),
            "response_mask": masked(2, 1, 1),
        }
    )
    assert values(own_likelihood(batch), "rewards") == [-3, -1, -4]
    assert values(penalised(batch, price=0.5), "rewards") == [0.5, 0.5, 2.5]
    assert right_ones(batch, least=1.0).keep.tolist() == [0, 2]  # type: ignore[union-attr]
    assert different_ones(batch).keep.tolist() == [0, 2]  # type: ignore[union-attr]
    assert values(all_good(batch), "advantages") == [1, 1, 1, 1]
    # RAFT++ on the policy that drew them: the gradient of plain imitation.
    same = {"old_log_probs": LOG_PROBS, "advantages": [1.0, 1.0]}
    assert gradient(ppo_clip(0.2), LOG_PROBS, same, [1, 1]) == pytest.approx([-1, -1])


def test_rewards_against_references() -> None:
    own = Batch({"rewards": numbers(1, 0), "second": numbers(1, 0), "group_id": numbers(0, 1, dtype="int64")})
    theirs = Batch(
        {
            "rewards": numbers(0, 2, 0, 0),
            "second": numbers(1, 1, 0, 0),
            "group_id": numbers(0, 0, 1, 1, dtype="int64"),
        }
    )
    par = against_references(own, theirs, shape="par", properties=1).columns
    np.testing.assert_allclose(values(par, "rewards"), [(sigmoid(1) + sigmoid(-1)) / 2, 0.5])
    lsc = against_references(own, theirs, shape="lsc", properties=2).columns
    np.testing.assert_allclose(values(lsc, "rewards"), [2 * log(0.5), 2 * log(0.5)], rtol=1e-6)
    crpg = against_references(own, theirs, shape="crpg", properties=2).columns
    np.testing.assert_allclose(values(crpg, "rewards"), [0.5, 0.0])  # the second breaks the rule


def test_rewards_of_length_and_of_one_scale() -> None:
    batch = Batch({"rewards": numbers(1, 1), "response_mask": masked(2, 8)})
    np.testing.assert_allclose(values(by_length(batch, shape="length", price=0.1, longest=8), "rewards"), [0.8, 0.2])
    np.testing.assert_allclose(
        values(by_length(batch, shape="only_length", price=0.1, longest=8), "rewards"), [0.25, 1]
    )
    held = Spread().initial(Shaped())
    held, result = Spread().scale(held, Batch({"rewards": numbers(0, 2)}))  # mean 1, deviation 1
    assert values(result.columns, "rewards") == [0, 2]
    _, result = Spread().scale(held, Batch({"rewards": numbers(4, 6)}))  # of 0, 2, 4, 6: deviation sqrt(5)
    np.testing.assert_allclose(values(result.columns, "rewards"), [4 / sqrt(5), 6 / sqrt(5)], rtol=1e-6)


def test_ppo_max_normalises_by_all_rewards_so_far_and_cuts() -> None:
    held = Rewards().initial(PPOMax())
    held, result = Rewards().normalise(held, Batch({"rewards": numbers(0, 2)}), clip=5.0)
    assert values(result.columns, "rewards") == [-1, 1]
    _, result = Rewards().normalise(held, Batch({"rewards": numbers(4, 6)}), clip=1.0)  # mean 3, deviation sqrt(5)
    np.testing.assert_allclose(values(result.columns, "rewards"), [1 / sqrt(5), 1], rtol=1e-6)


def test_token_rewards_of_a_dpo_model_and_of_a_step_model() -> None:
    batch = Batch(
        {
            "rewards": numbers(2, 1),
            "dpo_log_probs": ragged([-1, -1, -3], [-1]),
            "ref_log_probs": ragged([-2, -1, -1], [-1]),
            "step_values": ragged([9, 0.75, 0.25], [0.5]),
            "response_mask": masked(3, 1),
        }
    )
    rto = implicit_rewards(batch, coef=0.5, reward_coef=0.25)
    assert values(rto, "token_rewards") == [0.5, 0, -1, 0] and values(rto, "rewards") == [0.5, 0.25]
    steps = {"step_tokens": 2, "eta": 0.5, "coef": 1.0, "reward_coef": 1.0}
    # Steps end after tokens 2 and 3 of row 0 and after the token of row 1.
    assert values(step_rewards(batch, kind="clip", **steps), "token_rewards") == [0, 0, -0.25, 0]
    # The last step has no reward of its own, so that the one before it has all of its value.
    assert values(step_rewards(batch, kind="delta", **steps), "token_rewards") == [0, 0.75, 0, 0]
    delta = values(step_rewards(batch, kind="delta", **steps | {"step_tokens": 1}), "token_rewards")
    assert delta == [8.25, 0.75, 0, 0] and sum(delta[:3]) == 9  # telescopes to the first step's value
