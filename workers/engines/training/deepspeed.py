"""The DeepSpeed training engine: ZeRO stages 1, 2 and 3, master weights in float32.

stage 1, 2   parameters whole on every rank in `engine.dtype`; float32 copies, Adam's moments (and gradients, from
             stage 2) as one flat partition a rank of each parameter group: a parameter's part is a flat range
stage 3      each parameter flattened, padded and cut into one equal part a rank; gathered layer by layer
gradients    DeepSpeed averages over ranks, so losses are multiplied by their number first
frozen       stage 3 keeps the cut parameters; stages 1 and 2 the whole ones, with nothing around them
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_dist.algorithms.outputs import Head as OwnHead
from rlhf_dist.algorithms.outputs import Output, key_of
from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf_dist.reshard.layout import Layout, ParameterLayout
from rlhf_dist.reshard.shards import Shards, dtype_name, flat_shards
from workers.engines.files.checkpoint import State, flat_tensor
from workers.engines.files.file_tensors import parameters_of
from workers.engines.files.load import Head, fill_whole
from workers.engines.model.models import build_model
from workers.engines.model.packing import Packed
from workers.engines.movable import Movable
from workers.engines.training.interface import DevicePart, WeightPart
from workers.engines.training.mesh import training_mesh
from workers.engines.training.optimizer import new_optimizer, set_learning_rate
from workers.engines.training.packed_engine import PackedEngine

Range = tuple[int, int]
"""[begin, end) of a flattened parameter."""


class DeepSpeedEngine(PackedEngine):
    """A model under ZeRO; see `TrainingEngine` for what its methods promise."""

    _passed: tuple[str, ...] = ()
    """What the last pass was asked for."""

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
    ) -> None:
        """Build, load and partition over all ranks. Collective; needs the default process group.

        `optimizer` None freezes the model. Raises ValueError for what DeepSpeed is not used for here, and what
        `build_model` raises.
        """
        if engine.sequence_parallel * engine.tensor_parallel * engine.replicas > 1 or engine.lora or engine.compile:
            raise ValueError(
                "engine deepspeed has no sequence_parallel, tensor_parallel, replicas, lora or compile; use engine fsdp"
            )
        module = build_model(model, engine, head=head, heads=heads, seed=seed, trained=optimizer is not None)
        super().__init__(module, model, engine, optimizer, training_mesh(engine, device), seed)
        self._world = dist.get_world_size(self._mesh.world)
        self._rank = dist.get_rank(self._mesh.world)
        self._stage = engine.zero_stage
        self._whole = {name: tuple(parameter.shape) for name, parameter in parameters_of(module).items()}
        self._engine: Any = None
        uses_deepspeed = optimizer is not None or self._stage == 3
        if uses_deepspeed:
            _prepare(self._rank, self._world, device)
        if module.weights is not None:
            if self._stage == 3:
                self._partition(optimizer)
            else:  # A stage that cuts no parameters: every rank's device has them, and nothing else is needed.
                fill_whole(module.hf, module.weights, device)
                module.weights = None
        self._parameters = parameters_of(module)
        if uses_deepspeed:
            self._engine = self._initialize(optimizer)
        else:
            module.to(device)
        if module.weights is not None:
            self._fill()
            self._follow_masters()
        self._choose_way()

    def _partition(self, optimizer: OptimizerConfig | None) -> None:
        """Give parameters on meta their place: one at a time it is made whole, without values, and cut.

        DeepSpeed sends each from rank 0 before it cuts it, values or none: a model's bytes, once.
        """
        import deepspeed

        settings = _settings(self._config, optimizer, self._device)
        made: dict[int, nn.Parameter] = {}
        for module in self._module.modules():
            for name, empty in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(empty) not in made:
                    place = nn.Module()
                    place.weight = made[id(empty)] = nn.Parameter(
                        torch.empty(empty.shape, dtype=self._dtype), requires_grad=empty.requires_grad
                    )
                    deepspeed.zero.Init(module=place, config_dict_or_path=settings, dtype=self._dtype)
                module.register_parameter(name, made[id(empty)])

    def _initialize(self, optimizer: OptimizerConfig | None) -> Any:
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=self._module,
            optimizer=new_optimizer(self._parameters, optimizer) if optimizer else None,
            config=_settings(self._config, optimizer, self._device),
            dist_init_required=False,
        )
        return engine

    # --- one pass, one step ------------------------------------------------------------------------
    def _run(self, packed: Packed, outputs: Sequence[Output], temperature: float) -> dict[str, Tensor]:
        self._forget_other_passes(tuple(map(key_of, outputs)))
        runs = self._engine if self._engine is not None else self._module
        found: dict[str, Tensor] = runs(packed, outputs, temperature)
        return found

    def _forget_other_passes(self, outputs: tuple[str, ...]) -> None:
        """Stage 3 fetches parameters in the order of the pass before, and takes another order for an error; what is
        asked of the model decides which parameters a pass needs."""
        optimizer: Any = getattr(self._engine, "optimizer", None)
        offload: Any = getattr(optimizer, "parameter_offload", optimizer)  # a frozen engine has nothing else there
        if hasattr(offload, "get_param_coordinator") and outputs != self._passed:
            coordinator = offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()
        self._passed = outputs

    def _after_forward(self) -> None:
        # Not by the engine's own method, which also collects Python's garbage and empties the device's cache: with all
        # that is imported here a quarter of a second of every pass.
        optimizer: Any = getattr(self._engine, "optimizer", None)
        if hasattr(optimizer, "empty_partition_cache"):  # stage 3
            optimizer.empty_partition_cache()

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._world)
        if not last:
            self._engine.step()

    def _apply(self, lr: float) -> float:
        set_learning_rate(self._engine.optimizer, lr)
        self._engine.step()
        # It makes no step for a gradient that is not finite, and clears it.
        return float("nan") if self._engine.optimizer.overflow else float(self._engine.get_global_grad_norm())

    def _discard(self) -> None:
        optimizer = self._engine.optimizer
        if optimizer.overflow:
            return
        # DeepSpeed drops gradients only with a step, or with one it refuses: have it refuse this one.
        self._engine.set_gradient_accumulation_boundary(True)
        for gradients in optimizer.averaged_gradients.values():
            for gradient in gradients or ():
                if gradient is not None:
                    gradient.fill_(float("nan"))
        self._engine.step()
        assert optimizer.overflow, "DeepSpeed makes no step with a gradient that is not a number"

    # --- weights ---------------------------------------------------------------------------------
    def _parameter_layout(self, *, adapters: bool) -> Layout:
        assert not adapters, "this engine has no adapters"
        local = self._ranges()
        every: list[dict[str, Range]] = [{} for _ in range(self._world)]
        dist.all_gather_object(every, local, group=self._mesh.world)
        parameters = {}
        for name, shape in self._whole.items():
            held = [(rank, *ranges[name]) for rank, ranges in enumerate(every) if name in ranges]
            parameters[name] = ParameterLayout.from_flat_ranges(shape, dtype_name(self._master(name)), held)
        return Layout(self._world, parameters)

    def _parameter_shards(self, part: WeightPart) -> Shards:
        ranges = self._ranges()
        return {
            name: flat_shards(self._master(name), shape, *ranges[name]) if name in ranges else []
            for name, shape in self._whole.items()
        }

    def _ranges(self) -> dict[str, Range]:
        """The flat range of each parameter that this rank holds the master of; a parameter without one is left out."""
        found = {}
        for name, parameter in self._parameters.items():
            size = prod(self._whole[name])
            if self._stage == 3:
                part = -(-size // self._world)
                begin, end = min(self._rank * part, size), min((self._rank + 1) * part, size)
            elif self._engine is None:
                begin, end = (0, size) if self._rank == 0 else (0, 0)
            elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                begin = mapping.lp_fragment_address.start
                end = begin + mapping.lp_fragment_address.numel
            else:
                continue
            if end > begin:
                found[name] = (begin, end)
        return found

    def _master(self, name: str) -> Tensor:
        """This rank's flat part of the master weight (padding may follow); empty where it has none."""
        parameter: Any = self._parameters[name]
        if self._engine is None:
            frozen: Tensor = parameter.detach()
            return frozen.reshape(-1)
        if self._stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            trained = self._optimizer_config is not None
            part: Tensor = safe_get_local_fp32_param(parameter) if trained else parameter.ds_tensor
            return part.detach().reshape(-1)
        mapping = parameter._hp_mapping
        master: Tensor = mapping.hp_fragment if mapping is not None else parameter.new_empty(0).float()
        return master.detach()

    # --- memory ----------------------------------------------------------------------------------
    @property
    def gradient_bytes(self) -> int:
        """See `TrainingEngine.gradient_bytes`."""
        if self._optimizer_config is None or self._gradient_buffers():
            return 0
        whole = sum(prod(shape) for shape in self._whole.values())
        return 4 * (whole if self._stage == 1 else -(-whole // self._world))

    def _device_parts(self) -> dict[DevicePart, Movable]:
        # By storage, since DeepSpeed's own `offload_states` at stage 3 takes no optimizer but its FusedAdam.
        weights: list[Tensor] = list(self._parameters.values())
        weights += [p.ds_tensor for p in self._parameters.values() if hasattr(p, "ds_tensor")]
        if self._optimizer_config is None:
            return {"parameters": Movable(weights, self._device)}
        optimizer = self._engine.optimizer
        weights += _flat_masters(optimizer, self._stage)
        moments = [kept[name] for kept in self._moments() for name in ("exp_avg", "exp_avg_sq")]
        parts: dict[DevicePart, Movable] = {
            "parameters": Movable(weights, self._device),
            "optimizer": Movable(moments, self._device),
        }
        if buffers := self._gradient_buffers():
            parts["gradients"] = Movable(buffers, self._device, comes_as="zeros")
        if self._stage == 3:
            buckets = [one.buffer for one in optimizer.ipg_buckets.values() if isinstance(one.buffer, Tensor)]
            parts["buckets"] = Movable(buckets, self._device, comes_as="anything")
        return parts

    def _gradient_buffers(self) -> list[Tensor]:
        """Where gradients are summed, if that stays from step to step: nothing of it is wanted between two."""
        optimizer = self._engine.optimizer
        if self._stage == 3:
            return [optimizer.grad_partitions_flat_buffer]
        return list(getattr(optimizer, "fp32_groups_gradients_flat", ()))  # bfloat16 at stage 1

    # --- files -----------------------------------------------------------------------------------
    def _shapes(self) -> dict[str, Sequence[int]]:
        return dict(self._whole)

    def _state(self) -> State:
        layouts: list[dict[str, Range]] = [{} for _ in range(self._world)]
        dist.all_gather_object(layouts, self._ranges(), group=self._mesh.world)
        state: dict[str, Any] = {}
        for name in self._whole:
            held = [(rank, *ranges[name]) for rank, ranges in enumerate(layouts) if name in ranges]
            begin, end = layouts[self._rank].get(name, (0, 0))
            local = {"model": self._master(name)}
            if self._optimizer_config is not None:
                local |= {kind: self._moment(name, kind) for kind in ("exp_avg", "exp_avg_sq")}
            for kind, part in local.items():
                state[f"{kind}.{name}"] = flat_tensor(part[: end - begin], held, self._rank)
        return state

    def _moment(self, name: str, kind: str) -> Tensor:
        """This rank's flat part of one of Adam's moments, zeros before the first step."""
        optimizer, parameter = self._engine.optimizer, self._parameters[name]
        self._moments()
        if self._stage == 3:
            from deepspeed.utils import safe_get_local_optimizer_state

            part: Tensor = safe_get_local_optimizer_state(parameter, kind)
            return part.detach().reshape(-1)
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return parameter.detach().new_empty(0).float()
        group = mapping.param_group_index
        flat = _flat_masters(optimizer, self._stage)[group]
        address = mapping.get_hp_fragment_address()
        moments: Tensor = optimizer.optimizer.state[flat][kind]
        return moments.narrow(0, address.start, address.numel)

    def _moments(self) -> list[dict[str, Any]]:
        """Adam's state of every flat master: zeros before the first step, as its first step would make them."""
        optimizer, found = self._engine.optimizer, []
        for flat in _flat_masters(optimizer, self._stage):
            kept: dict[str, Any] = optimizer.optimizer.state[flat]
            if not kept:
                kept["step"] = torch.tensor(float(self.version), device=flat.device)
                kept["exp_avg"], kept["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
            found.append(kept)
        return found

    def _loaded(self) -> None:
        if self._optimizer_config is not None:
            optimizer = self._engine.optimizer
            self._moments()
            for flat in _flat_masters(optimizer, self._stage):
                optimizer.optimizer.state[flat]["step"].fill_(float(self.version))
        elif self._engine is None and self._world > 1:
            for parameter in self._parameters.values():  # rank 0's are the masters, see `_ranges`
                dist.broadcast(parameter.detach(), group_src=0, group=self._mesh.world)
        # Stage 3 keeps small parameters gathered after a step: they are gathered anew.
        self._after_forward()
        self._follow_masters()

    def _follow_masters(self) -> None:
        """Give what is computed with the values of the master weights."""
        if self._optimizer_config is None:
            return
        optimizer = self._engine.optimizer
        if self._stage == 3:
            for masters, parts in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
                at = 0
                for parameter in parts:
                    parameter.ds_tensor.data.copy_(masters.detach()[at : at + parameter.ds_tensor.ds_numel])
                    at += parameter.ds_tensor.ds_numel
            # Small parameters stay gathered from step to step, with the values they had.
            whole: list[Any] = [p for p in self._parameters.values() if p.ds_status.name == "AVAILABLE"]  # type: ignore[attr-defined]
            if whole:
                whole[0].partition(whole, has_been_updated=False)
        else:
            optimizer.update_lp_params()


def _flat_masters(optimizer: Any, stage: int) -> list[Tensor]:
    """The flat float32 tensors that Adam steps on."""
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    # DeepSpeed has an optimizer of its own for bfloat16 at stage 1.
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return list(next(getattr(optimizer, name) for name in names if hasattr(optimizer, name)))


def _settings(engine: EngineConfig, optimizer: OptimizerConfig | None, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": device.type == "cuda",
    }
    if engine.offload != "none" and device.type == "cuda":
        if optimizer is not None:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if engine.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        # Rows and passes are counted by the accumulation, never by DeepSpeed.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1 << 30,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": optimizer.grad_clip if optimizer else 0.0,
        "bf16": {"enabled": engine.dtype == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def _prepare(rank: int, world: int, device: torch.device) -> None:
    _set_launcher_environment(rank, world, device)
    import deepspeed

    # DeepSpeed's own all-reduce over shared memory is compiled at first use, and leaves 64 MiB a rank in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)


def _set_launcher_environment(rank: int, world: int, device: torch.device) -> None:
    """What DeepSpeed's launcher would have set: it reads these at any time, although the process group is up."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(device.index or 0), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
