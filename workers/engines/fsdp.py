"""The FSDP2 training engine: PyTorch's fully sharded data parallel, master weights in float32.

parameters   sharded on dim 0 over the mesh, gathered layer by layer in `engine.dtype`
gradients    reduce-scattered as float32 *sums*: the losses are divided by global counts already
optimizer    AdamW on the local shards; the learning rate is a function of `version`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlhf_dist.algorithms.contract import Loss, Output
from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.reshard.checksum import rows_checksum, unsigned
from rlhf_dist.reshard.layout import Layout
from rlhf_dist.reshard.shards import Shards, dtensor_layout, dtensor_shards
from rlhf_dist.schema import SEQUENCE
from workers.engines import checkpoint
from workers.engines.accumulation import Accumulation, equal_passes
from workers.engines.gather import full_tensors
from workers.engines.models import Head, PolicyModel, ValueModel, build_model, layers_of, parameters_of
from workers.engines.optimizer import clip_, new_optimizer, norm_of
from workers.engines.packing import filler, micro_batches, pack
from workers.engines.schedule import learning_rate
from workers.engines.training import NonFiniteLoss, Term

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FsdpEngine:
    """A model under FSDP2; see `TrainingEngine` for what its methods promise."""

    def __init__(
        self,
        *,
        model: ModelConfig,
        engine: EngineConfig,
        optimizer: OptimizerConfig | None,
        head: Head,
        device: torch.device,
        seed: int,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """Build, load and shard. Collective; needs the default process group.

        `optimizer` None freezes the model. `mesh`: one data-parallel axis; None for all ranks.
        Raises ValueError for a dtype or mesh it cannot use, and what `build_model` raises.
        """
        if engine.dtype not in _DTYPES:
            raise ValueError(f"engine.dtype must be one of {', '.join(_DTYPES)}, got {engine.dtype!r}")
        mesh = mesh or init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
        if mesh.ndim != 1:
            raise ValueError(f"FSDP shards over one mesh axis, got {mesh.ndim}; pass the data-parallel axis alone")
        self.version = 0
        self._device, self._mesh, self._group = device, mesh, mesh.get_group()
        self._folder, self._config = Path(model.path), engine
        self._model = build_model(
            model,
            head=head,
            seed=seed,
            logit_chunk_tokens=engine.logit_chunk_tokens,
            activation_checkpointing=engine.activation_checkpointing and optimizer is not None,
        )
        self._model.requires_grad_(optimizer is not None)
        _shard(self._model, mesh, _DTYPES[engine.dtype])
        self._parameters = parameters_of(self._model)
        self._optimizer_config = optimizer
        self._optimizer = new_optimizer(self._parameters, optimizer) if optimizer else None

    # --- forward ---------------------------------------------------------------------------------
    def forward(self, batch: Batch, outputs: Sequence[Output], temperature: float = 1.0) -> dict[str, Column]:
        """See `TrainingEngine.forward`."""
        self._check_outputs(outputs)
        parts: dict[Output, list[npt.NDArray[np.float32]]] = {name: [] for name in outputs}
        cut = micro_batches(batch, self._config.micro_batch_tokens, whole_groups=False) if batch.num_rows else []
        with torch.no_grad():
            for k in range(equal_passes(len(cut), self._group, self._device)):
                rows = batch.select(*SEQUENCE).take(cut[k]) if k < len(cut) else filler()
                result = self._model(pack(rows, self._device), outputs, temperature)
                if k < len(cut):
                    for name in outputs:
                        parts[name].append(result[name].float().cpu().numpy())
        # A forward without a backward leaves the root's parameters gathered.
        _fsdp(self._model).reshard()
        order = np.argsort(np.concatenate([*cut, np.empty(0, np.int64)]))
        columns: dict[str, Column] = {}
        for name in outputs:
            values = np.concatenate([*parts[name], np.empty(0, np.float32)])
            if name == "scores":
                columns[name] = Column(values).take(order)
                continue
            lengths = batch["response_ids"].lengths if batch.num_rows else np.empty(0, np.int64)
            passed = lengths[np.argsort(order)]
            columns[name] = Column(values, np.concatenate([[0], np.cumsum(passed)]).astype(np.int64)).take(order)
        return columns

    def scores(self, batch: Batch) -> npt.NDArray[np.float32]:
        """See `TrainingEngine.scores`."""
        return self.forward(batch, ["scores"])["scores"].values

    # --- training --------------------------------------------------------------------------------
    def step(self, batch: Batch, loss: Loss, temperature: float = 1.0) -> Metrics:
        """See `TrainingEngine.step`."""
        return self.step_many([(1.0, loss, batch)], temperature)

    def step_many(self, terms: Sequence[Term], temperature: float = 1.0) -> Metrics:
        """See `TrainingEngine.step_many`."""
        if self._optimizer is None or self._optimizer_config is None:
            raise RuntimeError("this model is frozen: it was built without an optimizer and makes no steps")
        for _, loss, _ in terms:
            self._check_outputs(loss.outputs)
        passes = Accumulation(
            terms, budget_tokens=self._config.micro_batch_tokens, group=self._group, device=self._device
        )
        if not passes.num_rows:
            return {"tokens": Mean(0.0, 0.0)}
        try:
            self._backward(passes, temperature)
            metrics = passes.metrics(self.version)
            norm = norm_of(self._parameters.values(), self._group)
            if not np.isfinite(norm):
                raise NonFiniteLoss(
                    "the gradient of " + " + ".join(type(t[1]).__name__ for t in terms), self.version, ()
                )
            clip_(self._parameters.values(), norm, self._optimizer_config.grad_clip)
            lr = learning_rate(self.version, self._optimizer_config)
            for settings in self._optimizer.param_groups:
                settings["lr"] = lr
            self._optimizer.step()
            self.version += 1
        finally:
            self._optimizer.zero_grad(set_to_none=True)
        return metrics | {"grad_norm": Mean(norm), "lr": Mean(lr), "tokens": Mean(float(passes.tokens), 0.0)}

    def _backward(self, passes: Accumulation, temperature: float) -> None:
        for one in passes:
            term, rows = one if one else (0, filler())
            outputs = self._model(pack(rows, self._device), passes.terms[term][1].outputs, temperature)
            # FSDP reduces what backward reaches: every output takes part on every rank, with an exact zero.
            loss = sum((output[:0].sum() for output in outputs.values()), torch.zeros((), device=self._device))
            if one:
                loss = loss + passes.add(term, rows, outputs)
            loss.backward()

    def _check_outputs(self, outputs: Sequence[Output]) -> None:
        wrong = [name for name in outputs if name not in self._model.outputs]
        if wrong or not outputs:
            raise ValueError(f"this model gives {' and '.join(self._model.outputs)}, asked for {list(outputs)}")

    # --- weights ---------------------------------------------------------------------------------
    def layout(self) -> Layout:
        """See `TrainingEngine.layout`."""
        return dtensor_layout({name: _dtensor(parameter) for name, parameter in self._parameters.items()})

    def local_shards(self) -> Shards:
        """See `TrainingEngine.local_shards`."""
        return dtensor_shards({name: _dtensor(parameter) for name, parameter in self._parameters.items()})

    def full_weights(self, dtype: torch.dtype, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """See `TrainingEngine.full_weights`."""
        shards = {name: _dtensor(parameter) for name, parameter in self._parameters.items()}
        yield from full_tensors(shards, dtype, bucket_bytes, self._group)

    def checksums(self, dtype: torch.dtype) -> dict[str, int]:
        """See `TrainingEngine.checksums`."""
        sums = []
        for parameter in self._parameters.values():
            sharded = _dtensor(parameter)
            chunk = -(-sharded.shape[0] // self._mesh.size())
            first = min(chunk * self._mesh.get_local_rank(), sharded.shape[0])
            local = sharded.to_local().detach().to(dtype)
            sums.append(rows_checksum(local, first_row=first, shape=sharded.shape).to(self._device))
        total = torch.stack(sums)
        dist.all_reduce(total, group=self._group)
        return {name: unsigned(value) for name, value in zip(self._parameters, total.tolist(), strict=True)}

    def offload(self) -> None:
        """See `TrainingEngine.offload`."""
        self._move(torch.device("cpu"))

    def onload(self) -> None:
        """See `TrainingEngine.onload`."""
        self._move(self._device)

    def _move(self, device: torch.device) -> None:
        if self._device.type == "cpu":
            return
        self._model.to(device)
        for state in self._optimizer.state.values() if self._optimizer else ():
            for name, value in state.items():
                if isinstance(value, DTensor):
                    state[name] = value.to(device)
        torch.cuda.empty_cache()

    # --- files -----------------------------------------------------------------------------------
    def save(self, folder: Path) -> None:
        """See `TrainingEngine.save`."""
        checkpoint.save(folder, self._parameters, self._optimizer, self.version, self._group)

    def load(self, folder: Path) -> None:
        """See `TrainingEngine.load`."""
        self.version = checkpoint.load(folder, self._parameters, self._optimizer, self._group)

    def export(self, folder: Path) -> None:
        """See `TrainingEngine.export`; weights are written in `engine.dtype`."""
        buckets = self.full_weights(_DTYPES[self._config.dtype], checkpoint.EXPORT_FILE_BYTES)
        checkpoint.export(folder, self._model.hf, buckets, self._folder, self._group)


def _shard(model: PolicyModel | ValueModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*layers_of(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        # Losses are divided by counts over all ranks, so gradients are summed; gloo has no other operation.
        _fsdp(module).set_gradient_divide_factor(1.0)
        _fsdp(module).set_force_sum_reduction_for_comms(True)


def _fsdp(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule), "fully_shard turns a module into an FSDPModule in place"
    return module


def _dtensor(parameter: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor), "FSDP keeps parameters as sharded DTensors outside the forward pass"
    return parameter
