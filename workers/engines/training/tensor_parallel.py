"""Tensor parallelism through DTensor, by the plan that each transformers architecture brings along.

    colwise    weight cut on its output dim; every rank computes some heads or some of the MLP's width
    rowwise    weight cut on its input dim; outputs summed over the ranks
    norms over a head's size see only the rank's own heads: their gradient is summed over the ranks

Embedding, head and the other norms are whole on every tp rank (and sharded by FSDP over the other axis); the
head's work is cut by tokens instead (`token_split.py`).
"""

from __future__ import annotations

import fnmatch
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
_PER_HEAD_NORM = "replicated_with_grad_allreduce"


def split_over_tensor_ranks(hf: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cut the linear layers of `hf` over `mesh` [tp], in place.

    Raises ValueError for an architecture without a plan, or with a kind of layer that is not cut here.
    """
    plan: dict[str, str] | None = getattr(hf.config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(f"{type(hf).__name__} has no tensor-parallel plan in transformers; set tensor_parallel=1")
    ends = ("embed_tokens", "lm_head")
    plan = {pattern: style for pattern, style in plan.items() if not pattern.endswith(ends)}
    other = sorted({style for style in plan.values() if style not in _STYLES and style != _PER_HEAD_NORM})
    if other:
        raise ValueError(f"tensor parallelism of {type(hf).__name__} needs {', '.join(other)}; set tensor_parallel=1")
    trunk: Any = hf.base_model
    cut: dict[str, ParallelStyle] = {}
    norms: dict[str, nn.Module] = {}
    for name, module in trunk.named_modules():
        style = next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if style == _PER_HEAD_NORM:
            norms[name] = module
        elif style is not None:
            cut[name] = _STYLES[style]()
    _check_rest(hf, trunk, {*cut, *norms})
    for norm in norms.values():
        if getattr(norm, "weight", None) is not None:
            _norm_per_head(norm, mesh)
    parallelize_module(trunk, mesh, cut)


def _check_rest(hf: PreTrainedModel, trunk: nn.Module, planned: set[str]) -> None:
    """A parameter among cut layers that the plan leaves out sees a part of the width: its gradient would be a part."""
    blocks = {name.rpartition(".")[0] for name in planned}
    inside = [
        name
        for name, _ in trunk.named_parameters()
        if any(name.startswith(f"{block}.") for block in blocks) and name.rpartition(".")[0] not in planned
    ]
    if inside:
        raise ValueError(
            f"tensor parallelism of {type(hf).__name__} leaves {inside[0]} whole among layers that are cut, and its "
            "gradient would be of a part; set tensor_parallel=1"
        )


def _norm_per_head(norm: nn.Module, mesh: DeviceMesh) -> None:
    """Give a norm over [..., heads, size] the whole gradient of its weight although it sees some heads only."""
    norm.weight = nn.Parameter(
        DTensor.from_local(cast(nn.Parameter, norm.weight).detach(), mesh, [Replicate()], run_check=False)
    )

    def heads_sharded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (DTensor.from_local(inputs[0], mesh, [Shard(inputs[0].ndim - 2)], run_check=False), *inputs[1:])

    norm.register_forward_pre_hook(heads_sharded)
    norm.register_forward_hook(lambda _, __, output: output.to_local())
