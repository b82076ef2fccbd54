"""No order of events puts a pool to work whose state nobody has verified."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.recovery.budget import LONGEST_WAIT_S, Budget
from controller.recovery.domains import Domains, Health, Refused

NAMES = ("train", "rollout", "host")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def domains(clock: Clock | None = None) -> Domains:
    return Domains(NAMES, silent_s=10.0, clock=clock or Clock())


def test_a_dead_pool_serves_again_after_a_rebuild_and_a_verified_sync() -> None:
    made = domains()
    made.abandoned()
    made.died("train")
    made.answered("rollout")
    made.answered("host")
    assert made.those(Health.CATCHING_UP) == ("rollout", "host")
    with pytest.raises(Refused, match="train cannot go back to step 7"):
        made.goal(7)
    incarnation = made.rebuild("train")
    made.up("train", incarnation)
    made.goal(7)
    assert not made.serving
    for name in NAMES:
        made.verified(name, made.incarnation(name), 7)
    assert made.serving


def test_an_answer_alone_makes_nobody_healthy() -> None:
    made = domains()
    made.abandoned()
    made.answered("rollout")
    made.answered("rollout")
    assert made.health("rollout") is Health.CATCHING_UP
    made.died("rollout")
    made.answered("rollout")
    assert made.health("rollout") is Health.DEAD


def test_word_of_processes_that_are_no_more_or_of_another_step_is_refused() -> None:
    made = domains()
    made.abandoned()
    for name in NAMES:
        made.died(name)
        made.up(name, made.rebuild(name))
    made.goal(3)
    with pytest.raises(Refused, match="incarnation 0 to step 3"):
        made.verified("train", 0, 3)
    with pytest.raises(Refused, match="going back to step 3"):
        made.verified("train", 1, 2)
    made.died("train")
    late = made.rebuild("train")
    made.up("train", late - 1)
    assert made.health("train") is Health.REBUILDING


def test_a_suspect_that_says_nothing_is_dead_when_its_time_is_over() -> None:
    clock = Clock()
    made = domains(clock)
    made.abandoned()
    made.answered("host")
    clock.now = 9.9
    assert made.tick() == ()
    clock.now = 10.0
    assert made.tick() == ("train", "rollout")
    assert made.those(Health.DEAD) == ("train", "rollout")


EVENT = st.tuples(
    st.sampled_from(["abandoned", "answered", "died", "tick", "rebuild", "up", "goal", "verified"]),
    st.sampled_from(NAMES),
    st.integers(0, 2),
    st.integers(0, 2),
)


@given(st.lists(EVENT, max_size=60))
@settings(max_examples=300, deadline=None)
def test_in_any_order_of_events_healthy_is_reached_by_a_verified_sync_only(
    events: list[tuple[str, str, int, int]],
) -> None:
    clock = Clock()
    made = domains(clock)
    goal: int | None = None
    for event, name, incarnation, step in events:
        clock.now += step
        before = {each: (made.health(each), made.incarnation(each)) for each in NAMES}
        refused = False
        try:
            match event:
                case "abandoned" | "tick":
                    getattr(made, event)()
                case "answered" | "died" | "rebuild":
                    getattr(made, event)(name)
                case "up":
                    made.up(name, incarnation)
                case "goal":
                    made.goal(step)
                case "verified":
                    made.verified(name, incarnation, step)
        except Refused:
            refused = True
        goal = None if event == "abandoned" else step if event == "goal" and not refused else goal
        for each in NAMES:
            (old, was), (new, now) = before[each], (made.health(each), made.incarnation(each))
            if new is Health.HEALTHY and old is not Health.HEALTHY:
                assert (event, each, incarnation, step) == ("verified", name, now, goal) and old is Health.CATCHING_UP
            if old is Health.DEAD and new is not Health.DEAD:
                assert new is Health.REBUILDING and now == was + 1
            assert now >= was
            if refused:
                assert (old, was) == (new, now)


def test_a_budget_is_spent_at_one_step_and_comes_back_with_progress() -> None:
    budget = Budget(retries=3, window=100, backoff_s=2.0)
    assert [budget.take(57) for _ in range(4)] == [0.0, 2.0, 4.0, None]
    assert budget.take(156) is None
    assert budget.take(157) == 0.0
    assert Budget(retries=0, window=100, backoff_s=1.0).take(0) is None


@given(st.lists(st.integers(0, 30), max_size=80), st.integers(0, 4), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_no_window_of_steps_has_more_recoveries_than_allowed(strides: list[int], retries: int, window: int) -> None:
    budget, furthest, taken = Budget(retries=retries, window=window, backoff_s=1.0), 0, list[int]()
    for stride in strides:
        furthest += stride // 8
        if (wait := budget.take(furthest)) is not None:
            assert 0 <= wait <= LONGEST_WAIT_S
            taken.append(furthest)
    for step in taken:
        assert sum(step - window < other <= step for other in taken) <= retries
