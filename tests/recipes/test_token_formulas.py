"""Rewards of tokens that other models' logits, attention and marks make, against values worked by hand."""

from __future__ import annotations

import numpy as np

from recipes.policy_gradient.critic_spans import no_outcome, weighed
from recipes.policy_gradient.dense_rewards import attended
from recipes.policy_gradient.teacher_forced import recovered_rewards
from rlhf_dist.batch import Batch
from rlhf_dist.missing import MISSING, is_missing
from tests.recipes.rows import masked, numbers, ragged, values


def test_a_teachers_logits_say_what_a_token_was_worth() -> None:
    batch = Batch(
        {
            "logits": ragged([1, 2, 3], [5]),
            "largest_logits": ragged([4, 2.5, 3.5], [6]),
            "response_mask": ragged([1, 1, 1], [1], dtype="uint8"),
        }
    )
    # 1 - 2.5, 2 - 3.5, 3 - 0; 5 - 0. Sums from the end at gamma 1/2: 3, -1.5 + 1.5, -1.5 + 0.
    made = recovered_rewards(batch, gamma=0.5).columns
    assert values(made, "token_rewards") == [-1.5, -1.5, 3, 5] and values(made, "advantages") == [-1.5, 0, 3, 5]
    greedy = batch.with_columns(largest_logits=batch["logits"])
    # Along the best tokens the rewards from a step on sum to its logit: q of the optimal policy.
    assert values(recovered_rewards(greedy, gamma=1.0).columns, "advantages") == [1, 2, 3, 5]


def test_a_reward_is_spread_as_its_model_attends() -> None:
    batch = Batch(
        {
            "attention": ragged([0.1, 0.3, 0.5], [0.25], [0.5, 0.5]),
            "rewards": numbers(2, -1, MISSING),
            "response_mask": ragged([1, 1, 0], [1], [1, 1], dtype="uint8"),
        }
    )
    made = attended(batch, coef=0.5, reward_coef=0.5)
    # Shares 1/4 and 3/4 of what counts, times 0.5 * 2; both halves sum to the reward.
    np.testing.assert_allclose(values(made, "token_rewards"), [0.25, 0.75, 0, -0.5, 0, 0])
    ends = made["rewards"].values
    assert ends[:2].tolist() == [1, -0.5] and is_missing(ends)[2]


def test_the_reward_of_the_end_is_weighed_or_left_out() -> None:
    batch = Batch({"rewards": numbers(2, MISSING), "response_mask": masked(1, 1)})
    found = weighed(batch, coef=0.5)["rewards"].values
    assert found[0] == 1 and is_missing(found)[1]
    assert values(no_outcome(batch), "rewards") == [0, 0]
