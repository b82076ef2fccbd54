"""AdamW over sharded parameters, and the norm of a sharded gradient."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_dist.config import OptimizerConfig
from workers.engines.training.mesh import TrainingMesh


def new_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want a gradient, in groups of one `lr_scale` and with decay on matrices only.

    Norms and biases (one dim) are not decayed. Raises ValueError for a pattern in `lr_scale` that finds nothing.
    """
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    for pattern in config.lr_scale:
        if not any(re.search(pattern, name) for name in trained):
            raise ValueError(f"optimizer.lr_scale: {pattern!r} finds none of {', '.join(list(trained)[:4])}, ...")
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        scale = next((float(s) for pattern, s in config.lr_scale.items() if re.search(pattern, name)), 1.0)
        groups.setdefault((parameter_dims(parameter) > 1, scale), []).append(parameter)
    settings = [
        {"params": members, "weight_decay": config.weight_decay if decays else 0.0, "lr_scale": scale}
        for (decays, scale), members in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group `lr` times its scale."""
    for settings in optimizer.param_groups:
        settings["lr"] = lr * settings["lr_scale"]


def parameter_dims(parameter: nn.Parameter) -> int:
    """Dims of the whole parameter, also where ZeRO-3 leaves an empty one behind."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def norm_of(parameters: Iterable[nn.Parameter], mesh: TrainingMesh) -> float:
    """The 2-norm of the whole gradient, the same number on every rank. Collective."""
    square = torch.zeros((), dtype=torch.float64, device=mesh.device)
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm(_local_gradients(with_gradient))
    for parameter, norm in zip(with_gradient, norms, strict=True):
        square += norm.double().square() / mesh.copies(parameter)
    dist.all_reduce(square, group=mesh.world)
    return float(square.sqrt())


def clip_(parameters: Iterable[nn.Parameter], norm: float, largest: float) -> None:
    """Scale the gradient in place so that its norm is at most `largest`; 0 for no clipping."""
    if largest and norm > largest:
        torch._foreach_mul_(_local_gradients(parameters), largest / (norm + 1e-6))


def _local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
