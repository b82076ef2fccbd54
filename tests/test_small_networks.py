"""Networks that a state holds: they learn as they would in one piece, and go on from what the state says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_dist.small_networks import answers, fit, layers, restored, tensor
from workers.states import check_values

X, Y = np.array([[0.0, 1], [1, 0], [2, 2]]), np.array([1.0, -1, 0])


def build() -> nn.Module:
    return layers(2, 3, 1)  # type: ignore[no-any-return]


def error(network: nn.Module) -> torch.Tensor:
    return ((network(tensor(X))[:, 0] - tensor(Y)) ** 2).mean()  # type: ignore[no-any-return]


def test_steps_one_by_one_are_those_of_one_optimizer() -> None:
    plain = restored({}, build)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.0)
    values, losses = {"other": 7.0}, []
    for _ in range(5):
        optimizer.zero_grad()
        loss = error(plain)
        loss.backward()
        optimizer.step()
        values, metrics = fit(values, build, error, lr=0.05)
        losses.append(metrics["network_loss"].value)
        assert losses[-1] == pytest.approx(float(loss), rel=1e-6)
    assert losses[-1] < losses[0] and values["steps"] == 5 and values["other"] == 7.0
    expected = plain(tensor(X)).detach().numpy()
    np.testing.assert_allclose(answers(values, build, lambda network: network(tensor(X))).values, expected, rtol=1e-5)
    check_values("state", values)  # a checkpoint can hold them
    together, _ = fit({}, build, error, lr=0.05, steps=5)
    np.testing.assert_allclose(together["network.0.weight"], values["network.0.weight"], rtol=1e-5)


def test_the_start_does_not_depend_on_what_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = restored({}, build).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = restored({}, build).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.random.get_rng_state())


def test_another_width_and_a_broken_loss_are_said() -> None:
    values, _ = fit({}, build, error, lr=0.05)
    with pytest.raises(ValueError, match=r"0.weight of shape \[3, 2\], and the batch asks for \[3, 4\]"):
        restored(values, lambda: layers(4, 3, 1))
    with pytest.raises(ValueError, match="is nan after 1 steps; lower its lr"):
        fit(values, build, lambda network: error(network) * float("nan"), lr=0.05)
