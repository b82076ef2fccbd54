"""AdamW over sharded parameters, and the norm of a sharded gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_dist.config import OptimizerConfig


def new_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; norms and biases (one dim) are left out."""
    decayed = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    plain = [parameter for parameter in parameters.values() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps)


def norm_of(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> float:
    """The 2-norm of the whole gradient, the same number on every rank. Collective."""
    norms = torch._foreach_norm(_local_gradients(parameters))
    square = torch.stack(norms).double().square().sum()
    dist.all_reduce(square, group=group)
    return float(square.sqrt())


def clip_(parameters: Iterable[nn.Parameter], norm: float, largest: float) -> None:
    """Scale the gradient in place so that its norm is at most `largest`; 0 for no clipping."""
    if largest and norm > largest:
        torch._foreach_mul_(_local_gradients(parameters), largest / (norm + 1e-6))


def _local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
