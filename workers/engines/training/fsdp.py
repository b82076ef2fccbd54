"""The FSDP2 training engine: PyTorch's fully sharded data parallel, master weights in float32.

parameters   sharded on dim 0 over the mesh's `shard` axis, gathered layer by layer in `engine.dtype`;
             copied over `replicate`, cut by DTensor over `tp` first where these axes are used;
             with zero_stage=2 they stay gathered until the backward pass
gradients    reduce-scattered as float32 *sums*: the losses are divided by global counts already
optimizer    AdamW on the local shards; the learning rate is a function of `version`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rlhf_dist.algorithms.outputs import Head as OwnHead
from rlhf_dist.algorithms.outputs import Output
from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf_dist.reshard.layout import Layout
from rlhf_dist.reshard.shards import Shards, dtensor_layout, dtensor_shards
from workers.engines.added.lora import Adapter, adapters_of
from workers.engines.files.file_tensors import parameters_of
from workers.engines.files.load import Head
from workers.engines.files.slices import allocate
from workers.engines.model.models import build_model, layers_of
from workers.engines.model.packing import Packed
from workers.engines.movable import Movable
from workers.engines.training.interface import DevicePart, WeightPart
from workers.engines.training.mesh import training_mesh
from workers.engines.training.optimizer import clip_, new_optimizer, norm_of, set_learning_rate
from workers.engines.training.packed_engine import PackedEngine
from workers.engines.training.tensor_parallel import split_over_tensor_ranks


class FsdpEngine(PackedEngine):
    """A model under FSDP2; see `TrainingEngine` for what its methods promise."""

    def __init__(
        self,
        *,
        model: ModelConfig,
        engine: EngineConfig,
        optimizer: OptimizerConfig | None,
        head: Head,
        heads: Sequence[OwnHead] = (),
        device: torch.device,
        seed: int,
        masters: bool = False,
    ) -> None:
        """Build, load and shard over all ranks. Collective; needs the default process group.

        `optimizer` None freezes the model; `masters`: it keeps float32 weights, for sums of others. Raises ValueError
        for a dtype or mesh it cannot use, and what `build_model` raises.
        """
        mesh = training_mesh(engine, device)
        module = build_model(
            model, engine, head=head, heads=heads, seed=seed, trained=optimizer is not None, masters=masters
        )
        super().__init__(module, model, engine, optimizer, mesh, seed)
        if mesh.tensor is not None:
            split_over_tensor_ranks(module.hf, mesh.tensor)
        self._shard()
        if module.weights is not None:
            allocate(module, torch.device("cpu") if self._on_host else device)
        self._parameters = parameters_of(module)
        self._adapters = adapters_of(module, self._parameters)
        self._fill()
        self._optimizer = new_optimizer(self._parameters, optimizer) if optimizer else None
        self._choose_way()
        if engine.compile:
            for layer in layers_of(module):
                layer.compile(dynamic=True)

    @property
    def _on_host(self) -> bool:
        return self._config.offload == "all" and self._device.type == "cuda"

    def _shard(self) -> None:
        policy = MixedPrecisionPolicy(param_dtype=self._dtype, reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy() if self._on_host else OffloadPolicy()
        mesh, resharded = self._mesh.parameters, self._config.zero_stage == 3
        # Inner layers first: some families have layers within layers.
        for module in [*reversed(layers_of(self._module)), self._module]:
            fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=resharded)
            if mesh.size() > 1:
                # Losses are divided by counts over all ranks, so gradients are summed; gloo has no other operation.
                # One rank has nothing to sum, and FSDP would copy every gradient to divide it by 1.
                _fsdp(module).set_gradient_divide_factor(1.0)
                _fsdp(module).set_force_sum_reduction_for_comms(True)

    # --- one pass, one step ------------------------------------------------------------------------
    def _run(self, packed: Packed, outputs: Sequence[Output], temperature: float) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._module(packed, outputs, temperature)
        return found

    def _after_forward(self) -> None:
        # A forward without a backward leaves parameters gathered: the root's, or all.
        for module in [*layers_of(self._module), self._module]:
            _fsdp(module).reshard()

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def _apply(self, lr: float) -> float:
        assert self._optimizer is not None and self._optimizer_config is not None, "a frozen model makes no steps"
        norm = norm_of(self._parameters.values(), self._mesh)
        if np.isfinite(norm):
            clip_(self._parameters.values(), norm, self._optimizer_config.grad_clip)
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _discard(self) -> None:
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)

    # --- weights ---------------------------------------------------------------------------------
    def _parameter_layout(self, *, adapters: bool) -> Layout:
        return dtensor_layout(self._named(adapters=adapters), self._mesh.grid)

    def _parameter_shards(self, part: WeightPart) -> Shards:
        return dtensor_shards(self._merged() if part == "merged" else self._named(adapters=part == "adapters"))

    def _named(self, *, adapters: bool) -> dict[str, DTensor]:
        """The adapters, or the model's own parameters."""
        added = {name for adapter in self._adapters.values() for name in (adapter.down, adapter.up)}
        return {name: _dtensor(p) for name, p in self._parameters.items() if (name in added) == adapters}

    def _merged(self) -> dict[str, DTensor]:
        """The model's parameters with adapters added to what they change: copies there, the parameters elsewhere."""
        return {
            name: self._with_adapter(weight, self._adapters[name]) if name in self._adapters else weight
            for name, weight in self._named(adapters=False).items()
        }

    def _with_adapter(self, weight: DTensor, adapter: Adapter) -> DTensor:
        # A and B are small: every rank has them whole, and adds what belongs to its rows of W.
        assert weight.placements[-1] == Shard(0), "adapters are not cut over tp"
        down, up = (_dtensor(self._parameters[name]).full_tensor().detach() for name in (adapter.down, adapter.up))
        rows, first = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        box = tuple((begin, begin + length) for begin, length in zip(first, rows, strict=True))
        merged = weight.to_local().detach() + adapter.change(down, up, box)
        return DTensor.from_local(
            merged, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )

    # --- memory ----------------------------------------------------------------------------------
    @property
    def gradient_bytes(self) -> int:
        """See `TrainingEngine.gradient_bytes`."""
        trained = (_dtensor(p).to_local() for p in self._parameters.values() if p.requires_grad)
        return sum(4 * local.numel() for local in trained if local.device == self._device)

    def _device_parts(self) -> dict[DevicePart, Movable]:
        # Counters of steps stay: a few bytes each.
        moments = [kept[name] for kept in self._moments().values() for name in ("exp_avg", "exp_avg_sq")]
        parts: dict[DevicePart, Movable] = {"parameters": Movable(self._parameters.values(), self._device)}
        if self._optimizer is not None:
            parts["optimizer"] = Movable(moments, self._device)
        return parts

    # --- files -----------------------------------------------------------------------------------
    def _shapes(self) -> dict[str, Sequence[int]]:
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def _loaded(self) -> None:
        for kept in self._optimizer.state.values() if self._optimizer else ():
            kept["step"].fill_(float(self.version))

    def _state(self) -> dict[str, DTensor]:
        """What a checkpoint holds: trained parameters and Adam's moments."""
        trained = {name: _dtensor(p) for name, p in self._parameters.items() if p.requires_grad or not self._adapters}
        state = {f"model.{name}": cast(DTensor, parameter.detach()) for name, parameter in trained.items()}
        for name, kept in self._moments().items():
            state |= {f"{moment}.{name}": kept[moment] for moment in ("exp_avg", "exp_avg_sq")}
        return state

    def _moments(self) -> dict[str, dict[str, Any]]:
        """Adam's state of every trained parameter: zeros before the first step, as its first step would make them."""
        found: dict[str, dict[str, Any]] = {}
        if (optimizer := self._optimizer) is None:
            return found
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                continue
            kept = found[name] = optimizer.state[parameter]
            if not kept:
                kept["step"] = torch.tensor(float(self.version), device=parameter.device)
                kept["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                kept["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return found


def _fsdp(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule), "fully_shard turns a module into an FSDPModule in place"
    return module


def _dtensor(parameter: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor), "FSDP keeps parameters as sharded DTensors outside the forward pass"
    return parameter
