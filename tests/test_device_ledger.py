"""Who leaves a device for whom: never above the budget, nothing moved in vain, all ranks alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.device_ledger import DeviceTooSmall, Ledger, Part, Phase

GIB = 1 << 30
KINDS = ("parameters", "optimizer", "weights", "cache")


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    """Some tenants, phases over their parts, an order of them, and a budget that the largest phase fits in."""
    sizes = draw(
        st.dictionaries(
            st.tuples(st.sampled_from("abcd"), st.sampled_from(KINDS)), st.integers(0, 9), min_size=1, max_size=10
        )
    )
    fixed = draw(st.dictionaries(st.tuples(st.sampled_from("abcd"), st.just("buffers")), st.integers(0, 3), max_size=2))
    some = st.frozensets(st.sampled_from(sorted(sizes)), max_size=4)
    phases = {}
    for name in draw(st.lists(st.sampled_from(["a.x", "b.x", "c.y", "d.z"]), min_size=1, unique=True)):
        needs = draw(some)
        needs |= {(tenant, "weights") for tenant, kind in needs if kind == "cache" and (tenant, "weights") in sizes}
        overwrites = frozenset(part for part in needs if draw(st.booleans()))
        phases[name] = Phase(
            name=name, needs=needs, overwrites=overwrites, transient={"buckets": draw(st.integers(0, 5))}
        )
    order = tuple(draw(st.lists(st.sampled_from(sorted(phases)), max_size=8)))
    ledger = Ledger(0, order, sizes=sizes, fixed=fixed, phases=phases)
    ledger.budget = max(ledger.predicted_bytes(name) for name in phases) + draw(st.integers(0, 30))
    return ledger


def used(ledger: Ledger, there: set[Part]) -> int:
    return sum(ledger.sizes[part] for part in there) + sum(ledger.fixed.values())


@given(ledgers(), st.data())
def test_no_turn_is_above_the_budget_and_none_moves_in_vain(ledger: Ledger, data: st.DataObject) -> None:
    there, at = set[Part](), -1
    for name in data.draw(st.lists(st.sampled_from(sorted(ledger.phases)), max_size=12)):
        at, phase = ledger.position(at, name), ledger.phases[name]
        moves = ledger.moves(there, name, at)
        again = Ledger(ledger.budget, ledger.order, sizes=dict(reversed(ledger.sizes.items())), fixed=ledger.fixed)
        again.phases = dict(reversed(ledger.phases.items()))
        assert again.moves(sorted(there, reverse=True), name, at) == moves, "a function of the same numbers only"
        assert set(moves.come) == phase.needs - there and set(moves.leave) <= there - phase.needs
        there = there - moves.leave.keys()
        between = used(ledger, there)
        there |= set(moves.come)
        total = used(ledger, there) + sum(phase.transient.values())
        assert between <= ledger.budget and total <= ledger.budget
        for part in moves.leave:
            cache_without_weights = part[1] == "cache" and (part[0], "weights") in moves.leave
            assert total + ledger.sizes[part] > ledger.budget or cache_without_weights, "it could have stayed"
        for tenant, kind in there:
            assert kind != "cache" or (tenant, "weights") not in ledger.sizes or (tenant, "weights") in there


@given(ledgers())
def test_nothing_moves_where_everything_fits(ledger: Ledger) -> None:
    ledger.budget = used(ledger, set(ledger.sizes)) + 5
    for name in ledger.phases:
        assert not ledger.moves(ledger.sizes, name).leave
        alone = {part for part, size in ledger.sizes.items() if size and part not in ledger.phases[name].needs}
        left = ledger.moves(ledger.sizes, name, working=None).leave
        assert {part for part in left if ledger.sizes[part]} == alone, "whose need nobody knows is alone on the device"


@given(ledgers())
def test_the_largest_phase_is_what_the_device_must_hold(ledger: Ledger) -> None:
    least = max(ledger.predicted_bytes(name) for name in ledger.phases)
    ledger.budget = least
    ledger.check()
    ledger.budget = least - 1
    with pytest.raises(DeviceTooSmall, match=rf"phase \w\.\w of role '\w' needs {least} bytes.* is {least - 1}:"):
        ledger.check()


def ppo(budget: int | None) -> Ledger:
    """A 7B policy and critic: float32 masters and Adam over 8 ranks, bfloat16 generation weights over 2."""
    p = 7 * 10**9
    order = ("actor.generate", "actor.forward", "critic.forward", "critic.update", "actor.update", "actor.sync")
    ledger = Ledger(budget, order)
    for role in ("actor", "critic"):
        ledger.add(role, {"parameters": p * 4 // 8, "optimizer": p}, {})
        parameters, both = frozenset({(role, "parameters")}), frozenset({(role, "parameters"), (role, "optimizer")})
        ledger.phases[f"{role}.forward"] = Phase(name=f"{role}.forward", needs=parameters)
        ledger.phases[f"{role}.update"] = Phase(name=f"{role}.update", needs=both, transient={"gradients": p * 4 // 8})
    ledger.add("actor.rollout", {"weights": p, "cache": 40 * GIB}, {})
    weights = frozenset({("actor.rollout", "weights")})
    ledger.phases["actor.generate"] = Phase(name="actor.generate", needs=weights | {("actor.rollout", "cache")})
    needs = weights | {("actor", "parameters")}
    ledger.phases["actor.sync"] = Phase(
        name="actor.sync", needs=needs, overwrites=weights, transient={"buckets": 2 * GIB}
    )
    return ledger


def test_a_step_of_ppo_where_its_largest_phase_fits() -> None:
    ledger = ppo(None)
    ledger.budget = max(ledger.predicted_bytes(name) for name in ledger.order)
    assert ledger.budget == 7 * 10**9 + 40 * GIB, "generation"
    there, said = set(ledger.sizes), {}
    for at, name in enumerate(ledger.order):
        moves = ledger.moves(there, name, at)
        there = there - moves.leave.keys() | set(moves.come)
        said[name] = moves
    assert set(said["actor.generate"].leave) == {part for part in ledger.sizes if part[0] != "actor.rollout"}
    assert said["actor.forward"].leave == {("actor.rollout", "cache"): True}, "the rest fits beside the parameters"
    assert said["actor.forward"].come == (("actor", "parameters"),)
    assert not said["critic.forward"].leave and not said["critic.update"].leave
    assert not said["actor.update"].leave and said["actor.sync"].come == ()
    ledger.budget = 24 * 10**9
    there = {("actor.rollout", "weights"), ("actor.rollout", "cache")}
    moves = ledger.moves(there, "critic.update", 3)
    assert moves.leave == {("actor.rollout", "cache"): True}
    assert ledger.moves(there, "critic.update", 3, working=20 * 10**9).leave[("actor.rollout", "weights")] is False, (
        "a sync overwrites them before they are used again"
    )


def test_a_phase_outside_of_the_steps_moves_what_it_needs() -> None:
    ledger = ppo(60 * 10**9)
    assert ledger.position(2, "critic.save") == 2 and ledger.position(5, "actor.generate") == 0
    assert Ledger(1).position(-1, "actor.generate") == -1
