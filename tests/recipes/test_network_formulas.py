"""Small networks of recipes, against values worked by hand."""

from __future__ import annotations

from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch

from recipes.policy_gradient.domain_features import DomainFeatures, Features, graded
from recipes.reasoning.rlfr import RLFR, Flow, deviation, only_right, standing, velocity
from recipes.reward_models.personal import Networks, Personal, experts, ideal_points, latent_user, preference
from rlhf_dist.batch import Batch, Column
from rlhf_dist.missing import MISSING, is_missing
from rlhf_dist.small_networks import restored
from tests.recipes.rows import numbers, ragged, values

SETTINGS: dict[str, Any] = {
    "people": 3,
    "points": 2,
    "width": 2,
    "kl_coef": 0.5,
    "phase": 1,
    "phase_steps": 1,
    "lr": 0.1,
}


def set_to(module: Any, **given: Any) -> None:
    for name, value in given.items():
        module.get_parameter(name).data = torch.tensor(value, dtype=torch.float32)


def test_a_users_ideal_point_is_a_mixture_of_points() -> None:
    network = ideal_points(2, SETTINGS)
    set_to(network, points=[[0.0, 0], [4, 0]], weights=[[0.0, 0], [0, 0], [log(3), 0]])
    set_to(network, **{"f.weight": [[1.0, 0], [0, 1]], "f.bias": [0.0, 0]})
    e = torch.tensor([[2.0, 1], [2, 1]])
    # User 0: the middle, (2, 0), 1 away. User 2: (1, 0), as 3/4 and 1/4: |(1, 1)|^2 = 2. User 5 is user 2.
    found = network.reward(torch.cat([e, e[:1]]), np.array([0, 2, 5])).tolist()
    assert found == pytest.approx([-1, -2, -2])
    gap, price = network.gap(e[:1], torch.tensor([[1.0, 0]]), {"user": np.array([2])}, None)
    assert gap.tolist() == pytest.approx([-2.0]) and price.tolist() == [0]
    assert preference(gap, price).item() == pytest.approx(log(1 + exp(2)))


def test_a_users_pairs_say_together_who_the_user_is() -> None:
    network = latent_user(2, SETTINGS)
    better, worse = torch.randn(3, 2), torch.randn(3, 2)
    user = np.array([7, 9, 7])
    mean, log_variance = network.posterior(better, worse, user)
    assert torch.equal(mean[0], mean[2]) and torch.equal(log_variance[0], log_variance[2])
    alone, _ = network.posterior(better[1:2], worse[1:2], user[1:2])
    torch.testing.assert_close(mean[1], alone[0])
    for parameter in network.encoder.parameters():
        parameter.data.zero_()  # z ~ N(0, 1) whoever it is: nothing to pay
    _, free = network.gap(better, worse, {"user": user}, torch.zeros(3, 2))
    assert free.tolist() == [0, 0, 0]
    network.encoder[-1].bias.data = torch.tensor([1.0, 0, 0, log(2)])
    _, price = network.gap(better, worse, {"user": user}, torch.zeros(3, 2))
    # b (1/2) (mean^2 + variance - 1 - log variance): 0.5 * 0.5 * (1 + (2 - 1 - log 2)).
    assert price.tolist() == pytest.approx([0.25 * (2 - log(2))] * 3)


def test_experts_learn_in_phases() -> None:
    better, worse = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1]])
    given = {"task": np.array([1]), "capability": np.array([1])}
    network = experts(2, {**SETTINGS, "phase": 1})
    set_to(network, whole=[[0.0, 0], [3, 1], [0, 0]])
    assert network.gap(better, worse, given, None)[0].tolist() == [2]
    second = experts(2, {**SETTINGS, "phase": 2})
    second.load_state_dict(network.state_dict())
    down, up = second.down[1, 1], second.up[1, 1]
    own = (up @ (down @ (better - worse)[0])).item()
    gap = second.gap(better, worse, given, None)[0]
    assert gap.tolist() == pytest.approx([2 + own], rel=1e-5)
    gap.sum().backward()
    assert second.whole.grad is None and second.down.grad[1, 1].abs().sum() > 0 and not second.down.grad[0].any()
    third = experts(2, {**SETTINGS, "phase": 3})
    third.gap(better, worse, given, None)[0].sum().backward()
    assert third.down.grad is None and third.over[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["pal", "vpl", "dmoerm"])
def test_small_networks_learn_their_pairs(kind: str) -> None:
    rng = np.random.default_rng(0)
    batch = Batch(
        {
            "embedding": Column(rng.standard_normal((8, 2)).astype(np.float32)),
            **{name: numbers(*([0, 0, 1, 1] * 2), dtype="int64") for name in ("user", "task", "capability")},
            "label": numbers(*([1, -1] * 4), dtype="int8"),
            "group_id": numbers(0, 0, 1, 1, 2, 2, 3, 3, dtype="int64"),
        }
    )
    state, settings = Networks(), {**SETTINGS, "kind": kind, "kl_coef": 0.0, "phase_steps": 100}
    held, losses = state.initial(Personal()), []
    for _ in range(4):
        held, metrics = state.learn(held, batch, settings=settings, rng=np.random.default_rng(0))
        losses.append(metrics["network_loss"].value)
    assert losses[-1] < losses[0]
    assert state.learn(held, batch.slice(0, 0), settings=settings, rng=rng)[0] is held


def test_a_reward_of_features_knows_rows_that_have_all_of_them() -> None:
    seven = [10, 0, 0, 0, 0, 0, 0]
    batch = Batch(
        {
            "numbers": ragged(seven, seven[::-1], [1, 2], seven, [11, *seven[1:]]),
            "label": numbers(1, -1, 1, -1, 1, dtype="int8"),
            "group_id": numbers(0, 0, 1, 1, 2, dtype="int64"),
        }
    )
    known, found = graded(batch, 10.0)
    assert known.tolist() == [True, True, False, True, False] and found[0].tolist() == [1, 0, 0, 0, 0, 0, 0]
    state, held = Features(), Features().initial(DomainFeatures())
    held, first = state.learn(held, batch, highest=10.0, hidden=4, lr=0.1, steps=1)
    held, metrics = state.learn(held, batch, highest=10.0, hidden=4, lr=0.1, steps=5)
    assert metrics["pairs_without_features"].value == 2
    assert metrics["network_loss"].value < first["network_loss"].value
    _, scored = state.score(held, batch, highest=10.0, hidden=4)
    rewards = scored.columns["rewards"].values
    assert rewards[0] > rewards[1] and rewards[0] == rewards[3] and is_missing(rewards).tolist() == [0, 0, 1, 0, 1]
    nothing, metrics = state.learn({}, batch.slice(2, 4), highest=10.0, hidden=4, lr=0.05, steps=2)
    assert nothing == {} and metrics["pairs_without_features"].value == 1


def test_a_flow_finds_states_strange_that_it_has_not_learned() -> None:
    zero = torch.nn.Linear(3, 2)
    zero.weight.data.zero_()
    zero.bias.data = torch.tensor([1.0, 0])
    # h - n = (2, 1) - (1, 1) = (1, 0): no error; (0, 3) - (0, 1) = (0, 2): (1 + 4) / 2.
    found = deviation(zero, [[2, 1], [0, 3]], [[1, 1], [0, 1]], [[0.5], [0.5]])
    assert found.tolist() == [0, 2.5]
    np.testing.assert_allclose(standing(np.array([1.0, 3, 99]), np.array([True, True, False]), 3.0)[:2], [1, -1])
    assert standing(np.ones(2), np.array([True, True]), 3.0).tolist() == [0, 0]
    mask = ragged([1, 1, 0], [1], dtype="uint8")
    hidden = np.array([[1.0, 0], [0, 2], [9, 9], [3, 1]], np.float32)
    batch = Batch(
        {
            "hidden": Column(hidden, mask.offsets),
            "response_mask": mask,
            "advantages": Column(np.ones(4, np.float32), mask.offsets),
        }
    )
    flow, settings = Flow(), {"width": 4, "moments": (0.5,), "coef": 0.1, "limit": 3.0}
    held, first = flow.learn(flow.initial(RLFR()), batch, width=4, lr=0.1, rng=np.random.default_rng(0))
    _, second = flow.learn(held, batch, width=4, lr=0.1, rng=np.random.default_rng(0))
    assert second["network_loss"].value < first["network_loss"].value  # on the same noise
    noise = np.random.default_rng(1).standard_normal(hidden.shape)
    network = restored(held, lambda: velocity(2, 4))
    strange = deviation(network, hidden, noise, np.full((4, 1), 0.5)).detach().numpy()
    expected = 1 + 0.1 * standing(strange, mask.values > 0, 3.0) * (mask.values > 0)
    made = flow.reward(held, batch, rng=np.random.default_rng(1), **settings)[1].columns
    np.testing.assert_allclose(values(made, "advantages"), expected, rtol=1e-5)
    assert values(made, "advantages")[2] == 1  # what does not count has no reward
    assert flow.learn(held, batch.slice(0, 0), width=4, lr=0.1, rng=np.random.default_rng(0))[0] is held
    assert only_right(Batch({"rewards": numbers(0, 1, MISSING)}), right=0.5).keep.tolist() == [1]  # type: ignore[union-attr]
