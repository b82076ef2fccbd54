"""A step that teaches nothing is said, with why and what may help, and not at every step of a thousand."""

from __future__ import annotations

from controller.lifecycle.step_warnings import StepWarnings, nothing_learned

EQUAL = {"grpo_advantage/zero_variance_groups": 1.0, "actor/grad_norm": 0.0, "actor/optimizer_steps": 1.0}
FINE = {"grpo_advantage/zero_variance_groups": 0.75, "actor/grad_norm": 0.3, "actor/optimizer_steps": 1.0}


def test_equal_groups_name_the_op_the_role_and_a_remedy() -> None:
    said = StepWarnings().of(6, EQUAL)
    assert said == (
        "warning: step 7: the rewards of every group are equal (grpo_advantage/zero_variance_groups is 1), and the "
        "gradient of actor is exactly 0: nothing is learnt in this step; look at the rewards, and try other prompts, "
        "more samples a prompt or a higher temperature"
    )
    # A KL term has a gradient of its own, and the rewards still teach nothing.
    assert "the rewards teach nothing in this step" in str(nothing_learned({**EQUAL, "actor/grad_norm": 0.1}))


def test_what_learns_is_silent() -> None:
    assert nothing_learned(FINE) is None and nothing_learned({}) is None
    skipped = {"actor/optimizer_steps": 0.0, "actor/skipped_steps": 1.0}
    assert nothing_learned(skipped) is None, "a step left out for its NaN is said elsewhere"


def test_no_rows_and_no_gradient_are_said_without_groups() -> None:
    assert "actor made no optimizer step, since no rows were left" in str(nothing_learned({"actor/optimizer_steps": 0}))
    assert "the gradient of critic is exactly 0" in str(nothing_learned({"critic/grad_norm": 0}))


def test_said_at_the_first_and_the_tenth_of_a_row_and_counted() -> None:
    warnings = StepWarnings()
    said = [step for step in range(25) if warnings.of(step, EQUAL)]
    assert said == [0, 9] and warnings.steps == 25
    assert warnings.of(25, FINE) is None
    again = warnings.of(26, EQUAL)
    assert again is not None and again.startswith("warning: step 27: ")


def test_episodes_that_were_lost_are_the_reason_for_no_rows() -> None:
    said = str(nothing_learned({"actor/optimizer_steps": 0, "actor/lost": 4}))
    assert "actor lost 4 episodes (rlhf-dist rollouts RUN --lost)" in said
    assert nothing_learned({"actor/optimizer_steps": 1, "actor/lost": 4}) is None
