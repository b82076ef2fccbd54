"""Small networks beside the models, kept in a State: they learn from features, last states and users of a batch.

    class Scorer(State):
        def initial(self, cfg):
            return {}

        @state_op(reads=("features", "label", "group_id"))
        def learn(self, values, batch, *, lr: float):
            return fit(values, build, lambda network: loss_of(network, batch), lr=lr)

        @state_op(reads=("features",), writes=("rewards",))
        def score(self, values, batch):
            return values, Batch({"rewards": answers(values, build, lambda network: network(...))})

Parameters and the optimizer's moments are arrays of the state, so checkpoints have them; they are made at the first
use, where a batch says how wide they are. All of it runs on one CPU process: for a few million parameters, not more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_dist.batch import Column
from rlhf_dist.metrics import Mean

if TYPE_CHECKING:
    from torch import Tensor, nn

Build = Callable[[], "nn.Module"]
"""Makes the network, random; called under a seed of its own."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of a parameter; of one that the loss has not reached yet, nothing."""


def fit(
    values: Mapping[str, Any],
    build: Build,
    loss: Callable[[Any], Tensor],
    *,
    lr: float,
    steps: int = 1,
    weight_decay: float = 0.0,
) -> tuple[dict[str, Any], dict[str, Mean]]:
    """`steps` steps of AdamW on `loss(network)`, a mean; the new values, and the loss before each as a metric.

    Raises ValueError for a loss that is not finite: the values are then as they were.
    """
    import torch

    network = restored(values, build)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    done = float(values.get("steps", 0.0))
    for name, parameter in network.named_parameters():
        if f"step.{name}" in values:
            optimizer.state[parameter] = {one: torch.from_numpy(values[f"{one}.{name}"].copy()) for one in MOMENTS}
    total = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(network)
        if not bool(torch.isfinite(value)):
            raise ValueError(f"the loss of a small network is {float(value)} after {done:g} steps; lower its lr")
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += float(value.detach())
    new: dict[str, Any] = {**values, "steps": done + steps}
    for name, parameter in network.named_parameters():
        new[f"network.{name}"] = parameter.detach().numpy().copy()
        new |= {f"{one}.{name}": held.numpy().copy() for one, held in optimizer.state[parameter].items()}
    return new, {"network_loss": Mean(total, float(steps))}


def answers(values: Mapping[str, Any], build: Build, function: Callable[[Any], Tensor]) -> Column:
    """What the network says, [B] or [B, K], without gradient."""
    import torch

    with torch.no_grad():
        return Column(function(restored(values, build)).float().numpy())


def restored(values: Mapping[str, Any], build: Build, seed: int = 0) -> Any:
    """The network with the parameters that the state holds; as it is built where it has none yet.

    Raises ValueError where a parameter has another shape by now.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            held = values.get(f"network.{name}")
            if held is None:
                continue
            if held.shape != tuple(parameter.shape):
                raise ValueError(
                    f"a small network was trained with {name} of shape {list(held.shape)}, and the batch asks for "
                    f"{list(parameter.shape)}; a column has another width than before"
                )
            parameter.copy_(torch.from_numpy(held))
    return network


def tensor(values: Any) -> Tensor:
    """Numbers of a column as a float32 tensor."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def layers(*widths: int) -> Any:
    """Linear layers of these widths with a SiLU between each two: `layers(7, 32, 1)`."""
    from torch import nn

    parts: list[Any] = []
    for first, second in zip(widths, widths[1:], strict=False):
        parts += [nn.Linear(first, second), nn.SiLU()]
    return nn.Sequential(*parts[:-1])
