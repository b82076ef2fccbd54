"""What every training engine does alike: rows to packs, packs to outputs, losses to one exact optimizer step.

    step    count rows, tokens, groups over all ranks
            for each pass: pack -> model -> loss / global count -> backward        (subclass: _backward)
            every loss value finite on every rank?  else NonFiniteLoss             (subclass: _discard)
            clip, learning rate of this version, AdamW                             (subclass: _apply)

A subclass holds the parameters and decides how gradients travel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_dist.algorithms.contract import Loss, loss_name
from rlhf_dist.algorithms.outputs import Output, OverVocabulary, argument_of, columns_for, key_of, kind_of
from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.reshard.checksum import box_checksum, unsigned
from rlhf_dist.reshard.file_tensors import Cut
from rlhf_dist.reshard.layout import Layout, ParameterLayout
from rlhf_dist.reshard.shards import Shards, dtype_name
from rlhf_dist.schema import SEQUENCE
from rlhf_dist.weights_files import export_dtype
from workers.engines.added.lora import Adapter, is_adapter, without_adapters
from workers.engines.added.own_heads import head_name, is_head, write_heads
from workers.engines.files import checkpoint
from workers.engines.files.checkpoint import CheckpointWriter, ModelCard
from workers.engines.files.export import FILE_BYTES, write_model
from workers.engines.files.file_tensors import file_tensors, kept_buffers, parameters_of
from workers.engines.files.rank_state import RankState, copied, put_back
from workers.engines.files.weight_set import WeightSet, copy_state, room_for, sets_of_card
from workers.engines.model.models import TOP_COLUMNS, RoleModel
from workers.engines.model.packing import Packed, filler, longest_row, pack
from workers.engines.model.probe import probe
from workers.engines.model.router import check_balance
from workers.engines.model.token_split import WHOLE
from workers.engines.model.ways import PACKED, Way
from workers.engines.movable import Movable
from workers.engines.training.accumulation import Accumulation, even_passes
from workers.engines.training.gather import full_tensors
from workers.engines.training.interface import DevicePart, NonFiniteLoss, Term, Use, WeightPart
from workers.engines.training.mesh import TrainingMesh
from workers.engines.training.schedule import learning_rate
from workers.engines.training.teacher_head import teacher_head

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PackedEngine(ABC):
    """A model and its optimizer over packed rows; see `TrainingEngine` for what the methods promise."""

    def __init__(
        self,
        module: RoleModel,
        model: ModelConfig,
        engine: EngineConfig,
        optimizer: OptimizerConfig | None,
        mesh: TrainingMesh,
        seed: int,
    ) -> None:
        if engine.dtype not in DTYPES:
            raise ValueError(f"engine.dtype must be one of {', '.join(DTYPES)}, got {engine.dtype!r}")
        self.version = 0
        self.before_use: Callable[[Use], None] = lambda use: None
        self.teacher_folders: Mapping[str, str] = {}
        self._parts: dict[DevicePart, Movable] | None = None
        self._module, self._folder, self._config, self._optimizer_config = module, Path(model.path), engine, optimizer
        self._mesh, self._device, self._seed = mesh, mesh.device, seed
        self._dtype = DTYPES[engine.dtype]
        self._way = PACKED
        self.remarks: tuple[str, ...] = ()
        self._export_dtype = export_dtype(model.path, engine.export_dtype, engine.dtype)
        self._writer = CheckpointWriter(mesh.world)
        self._adapters: Mapping[str, Adapter] = {}
        self._sets: dict[str, WeightSet] = {}
        self._layouts: dict[str, Layout] = {}
        """Of the adapters, of heads of its own, and of everything else: nothing moves from rank to rank."""
        parameters = parameters_of(module).items()
        held = {name: parameter for name, parameter in parameters if not is_adapter(name) and not is_head(name)}
        held_shapes = {name: tensor.shape for name, tensor in (held | kept_buffers(module.hf)).items()}
        self._files = file_tensors(module.hf, held_shapes)

    def _fill(self) -> None:
        """Read what this rank holds, where the model came without values."""
        weights, self._module.weights = self._module.weights, None
        if weights is not None:
            weights.fill(self.layout("base"), self.local_shards("base"), dist.get_rank(self._mesh.world))
            self._fill_heads()

    def _fill_heads(self) -> None:
        rank, shards = dist.get_rank(self._mesh.world), self.local_shards("heads")
        for name, held in self.layout("heads").parameters.items():
            for box, shard in zip(np.flatnonzero(held.rank == rank), shards[name], strict=True):
                place = tuple(slice(int(a), int(b)) for a, b in held.box(int(box)))
                shard.copy_(self._module.heads_at_start[head_name(name)][place])

    def _choose_way(self) -> None:
        """Find out how rows go through this model; the last thing a constructor does. Collective.

        Raises InexactModel where no way is exact.
        """
        module = self._module
        finding = probe(
            self._trial,
            dtype=self._config.dtype,
            policy="log_probs" in module.outputs,
            asked=lambda: (module.windows, module.softcaps),
            config=module.hf.config,
            whole_rows=self._mesh.tokens.sequence == 1,
        )
        self._way = finding.way
        if finding.way.head == "library" and self._mesh.tokens.tensor > 1:
            raise ValueError(f"the head of {type(module.hf).__name__} is not one matrix; set tensor_parallel=1")
        if finding.refused:
            self.remarks = (f"{type(module.hf).__name__}: {finding.way} ({'; '.join(finding.refused)})",)
        if module.read_whole and self._mesh.world.size() > 1:
            self.remarks += (f"every rank read the whole model before it was cut: {module.read_whole}",)
        if self._config.router_aux_loss and self._optimizer_config is not None:
            if self._mesh.tokens.size > 1:
                raise ValueError(
                    "engine.router_aux_loss needs whole rows; set tensor_parallel=1 and sequence_parallel=1"
                )
            check_balance(module.hf, self._config)
            module.balances = True

    def _trial(self, batch: Batch, way: Way) -> dict[str, npt.NDArray[np.float32]] | Exception:
        """What the probe asks: outputs of the rows by this way, the same on every rank, or why there are none."""
        split = WHOLE if way.grid else self._mesh.tokens
        packed = replace(pack(batch, self._device, way=way, split=split), trial=True)
        names = ("log_probs", "entropy") if "log_probs" in self._module.outputs else ("hidden",)
        with torch.no_grad():
            found = self._run(packed, names, 1.0)
        self._after_forward()
        failed = torch.tensor(int(self._module.failure is not None), device=self._device)
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._mesh.world)
        if failed:
            return self._module.failure or RuntimeError("it failed on another rank")
        for name in names:  # Rounding may differ between ranks; what they choose may not.
            found[name] = found[name].contiguous()
            dist.broadcast(found[name], group_src=0, group=self._mesh.world)
        return {name: found[name].float().cpu().numpy() for name in names}

    # --- forward ---------------------------------------------------------------------------------
    def forward(
        self, batch: Batch, outputs: Sequence[Output], temperature: float = 1.0, *, base: bool = False
    ) -> dict[str, Column]:
        """See `TrainingEngine.forward`."""
        self._check_outputs(outputs)
        found = self._outputs(batch, outputs, temperature, base)
        offsets = _offsets(batch)
        return {name: Column(value, None if self._module.per_row(name) else offsets) for name, value in found.items()}

    def scores(self, batch: Batch) -> npt.NDArray[np.float32]:
        """See `TrainingEngine.scores`."""
        return self.forward(batch, ["scores"])["scores"].values

    def hidden_states(self, batch: Batch) -> list[npt.NDArray[np.float32]]:
        """See `TrainingEngine.hidden_states`."""
        states = self._outputs(batch, ["hidden"], 1.0, base=False)["hidden"]
        return np.split(states, _offsets(batch)[1:-1]) if batch.num_rows else []

    def _outputs(
        self, batch: Batch, outputs: Sequence[Output], temperature: float, base: bool
    ) -> dict[str, npt.NDArray[np.float32]]:
        """The outputs by name, rows in the order of `batch`; token ids are int32."""
        self.before_use("forward")
        pad_to = longest_row(batch) if self._padded else 0
        cut = even_passes(batch, self._budget, False, pad_to, self._mesh.rows, self._device)
        parts: dict[str, list[npt.NDArray[Any]]] = {}
        with torch.no_grad(), without_adapters(self._module) if base else nullcontext():
            for rows in cut:
                chosen = batch.select(*SEQUENCE).take(rows) if len(rows) else self._filler()
                result = self._run(self._pack(chosen, pad_to), outputs, temperature)
                for name, found in result.items():
                    array = (found.float() if found.is_floating_point() else found.int()).cpu().numpy()
                    # Of a filler the shape alone: a rank without rows gives no entries of the same kind.
                    parts.setdefault(name, []).append(array if len(rows) else array[:0])
        self._after_forward()
        if not batch.num_rows:
            return {name: arrays[0] for name, arrays in parts.items()} or _nothing(outputs)
        passed = np.concatenate(cut)
        lengths = batch["response_ids"].lengths
        starts = np.cumsum(lengths[passed]) - lengths[passed]
        back = np.argsort(passed)
        tokens = np.concatenate([np.arange(starts[k], starts[k] + lengths[passed[k]]) for k in back])
        return {
            name: np.concatenate(arrays)[back if self._module.per_row(name) else tokens]
            for name, arrays in parts.items()
        }

    # --- training --------------------------------------------------------------------------------
    def step(self, batch: Batch, loss: Loss, temperature: float = 1.0) -> Metrics:
        """See `TrainingEngine.step`."""
        return self.step_many([(1.0, loss, batch)], temperature)

    def step_many(self, terms: Sequence[Term], temperature: float = 1.0) -> Metrics:
        """See `TrainingEngine.step_many`."""
        if self._optimizer_config is None:
            raise RuntimeError("this model is frozen: it was built without an optimizer and makes no steps")
        for _, loss, _ in terms:
            self._check_outputs(loss.outputs)
            self._meet_teachers(loss.outputs)
        self.before_use("update")
        passes = Accumulation(
            terms,
            budget_tokens=self._budget,
            padded=self._padded,
            group=self._mesh.rows,
            device=self._device,
        )
        if not passes.num_rows:
            return {"tokens": Mean(0.0, 0.0)}
        try:
            with self._random_of_step():
                for number, one in enumerate(passes, start=1):
                    self._backward(self._loss(passes, one, temperature), last=number == len(passes))
            metrics = passes.metrics(self.version)
            lr = learning_rate(self.version, self._optimizer_config)
            norm = self._apply(lr)
            if not np.isfinite(norm):
                names = " + ".join(loss_name(loss) for _, loss, _ in terms)
                raise NonFiniteLoss(f"the gradient of {names}", self.version, ())
            self.version += 1
        except NonFiniteLoss:
            self._discard()
            raise
        return metrics | {"grad_norm": Mean(norm), "lr": Mean(lr), "tokens": Mean(float(passes.tokens), 0.0)}

    def _loss(self, passes: Accumulation, one: tuple[int, Batch] | None, temperature: float) -> Tensor:
        term, rows = one if one else (0, self._filler())
        asked = passes.terms[term][1].outputs
        packed = self._pack(rows, passes.pad_to, columns_for(asked))
        self._check_ids(rows, asked)
        size = packed.packing.tokens
        passes.note("padding_share", packed.padding if one else size, size)
        outputs = self._run(packed, asked, temperature)
        # Gradients are reduced where backward reaches: every output takes part on every rank, with an exact zero.
        loss = sum((output[:0].sum() for output in outputs.values()), torch.zeros((), device=self._device))
        balance = outputs.pop("router_balance", None)
        outputs.pop("unused", None)
        if not one:
            return loss
        if balance is not None:
            passes.note("router_balance", float(balance.detach().sum()), rows.num_rows)
            loss = loss + balance.sum() * (self._config.router_aux_loss / passes.num_rows)
        return loss + passes.add(term, rows, outputs)

    def _meet_teachers(self, outputs: Sequence[Output]) -> None:
        """Read the heads of teachers that are new, each once."""
        for output in outputs:
            teacher = output.teacher if isinstance(output, OverVocabulary) else None
            if teacher is None or teacher in self._module.teachers:
                continue
            if teacher not in self.teacher_folders:
                raise ValueError(f"{teacher} is no frozen language model of this run; distil its top_k instead")
            self._module.teachers[teacher] = teacher_head(
                Path(self.teacher_folders[teacher]), self._dtype, self._device
            )

    def _check_ids(self, rows: Batch, outputs: Sequence[Output]) -> None:
        vocabulary = int(self._module.hf.config.get_text_config().vocab_size)
        for column in (argument_of(output) for output in outputs if kind_of(output) == "log_probs_at"):
            if column in rows and (worst := rows[column].values.max(initial=0)) >= vocabulary:
                raise ValueError(
                    f"{column} holds token id {worst}, and this model's vocabulary has {vocabulary}; distil between "
                    "models of one vocabulary"
                )

    def _pack(self, rows: Batch, pad_to: int, columns: Sequence[str] = ()) -> Packed:
        # Pieces of a sequence are gathered in the order of its tokens: there each row keeps its own prompt. So it does
        # where its positions depend on its own length.
        limit = self._module.alike_up_to
        shares = self._config.share_prompts and self._mesh.tokens.sequence == 1 and not self._module.balances
        shares = shares and (limit is None or longest_row(rows) <= limit)
        way = self._way if shares else self._way.unshared()
        return pack(rows, self._device, way=way, pad_to=pad_to, split=self._mesh.tokens, columns=columns)

    def _filler(self) -> Batch:
        return filler(0 if self._module.hf.config.get_text_config().pad_token_id != 0 else 1)

    @property
    def _padded(self) -> bool:
        return not self._config.packing or self._way.grid

    @property
    def _budget(self) -> int:
        """Tokens of one pack: each rank of a sequence holds a share of them."""
        return self._config.micro_batch_tokens * self._mesh.tokens.sequence

    # --- memory ------------------------------------------------------------------------------------
    def device_parts(self) -> Mapping[DevicePart, Movable]:
        """See `TrainingEngine.device_parts`."""
        if self._parts is None:
            self._parts = self._device_parts()
        return self._parts

    def _require_here(self) -> None:
        if self._parts is not None and not self._parts["parameters"].here:
            raise RuntimeError("the parameters must be on their device, and are in host memory; take the turn first")

    # --- weights and files -------------------------------------------------------------------------
    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """See `TrainingEngine.adapters`."""
        file_of = {parameter: name for name, parameter in self._files.same.items()}
        return (
            {file_of[name]: a for name, a in self._adapters.items()} if self._adapters.keys() <= file_of.keys() else {}
        )

    def layout(self, part: WeightPart = "merged") -> Layout:
        """See `TrainingEngine.layout`."""
        return self._file_layout if part in ("merged", "base") else self._held(part)

    def local_shards(self, part: WeightPart = "merged") -> Shards:
        """See `TrainingEngine.local_shards`."""
        self._require_here()
        shards = self._parameter_shards(part)
        if part in ("adapters", "heads"):
            return {name: boxes for name, boxes in shards.items() if is_head(name) == (part == "heads")}
        buffers = {name: [buffer] for name, buffer in kept_buffers(self._module.hf).items()}
        return self._files.shards(self._cuts, {**shards, **buffers})

    @cached_property
    def _file_layout(self) -> Layout:
        return self._files.layout(self._held("base"))

    @cached_property
    def _cuts(self) -> Mapping[str, Sequence[Cut]]:
        return self._files.cuts(self._held("base"), dist.get_rank(self._mesh.world))

    def _held(self, part: WeightPart) -> Layout:
        """What each rank holds, by names in memory: of adapters, heads of its own, or all else (`base`)."""
        if part not in self._layouts:
            held = self._parameter_layout(adapters=part == "adapters")
            parameters = {name: one for name, one in held.parameters.items() if is_head(name) == (part == "heads")}
            buffers = kept_buffers(self._module.hf) if part == "base" else {}
            ranks = np.arange(held.world)
            copies = {
                name: ParameterLayout.from_mesh(tuple(buffer.shape), dtype_name(buffer), ranks, [None])
                for name, buffer in buffers.items()
            }
            self._layouts[part] = Layout(held.world, {**parameters, **copies})
        return self._layouts[part]

    def full_weights(self, dtype: torch.dtype, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """See `TrainingEngine.full_weights`."""
        yield from full_tensors(self.layout(), self.local_shards(), dtype, bucket_bytes, self._mesh.world, self._device)

    def checksums(self, dtype: torch.dtype) -> dict[str, int]:
        """See `TrainingEngine.checksums`."""
        layout, shards, rank = self.layout(), self.local_shards(), dist.get_rank(self._mesh.world)
        sums = torch.zeros(len(layout.parameters), dtype=torch.int64, device=self._device)
        for k, (name, parameter) in enumerate(layout.parameters.items()):
            counted = set(parameter.distinct[0].tolist())
            for box, shard in zip(np.flatnonzero(parameter.rank == rank), shards[name], strict=True):
                if int(box) in counted:  # of copies, the first
                    place = parameter.box(int(box))
                    sums[k] += box_checksum(shard, place, parameter.shape, dtype.itemsize, dtype).to(self._device)
        dist.all_reduce(sums, group=self._mesh.world)
        return {name: unsigned(value) for name, value in zip(layout, sums.tolist(), strict=True)}

    def save(self, folder: Path) -> Future[None]:
        """See `TrainingEngine.save`."""
        self.before_use("update" if self._optimizer_config is not None else "forward")
        return self._writer.save(folder, self._whole_state(), self._card(), self._module.hf.config, self._folder)

    def load(self, folder: Path) -> None:
        """See `TrainingEngine.load`."""
        self.before_use("update" if self._optimizer_config is not None else "write")
        state = self._with_buffers()
        saved = checkpoint.load(folder, state, self._card(), self._mesh.world)
        self._sets = sets_of_card(saved.sets, state)
        for name, kept in self._sets.items():
            checkpoint.read_state(folder, kept.of_checkpoint(name), self._mesh.world)
        self.version = saved.version
        self._loaded()

    def copy_state(self) -> RankState:
        """See `TrainingEngine.copy_state`."""
        self.before_use("update" if self._optimizer_config is not None else "forward")
        return copied(self._whole_state(), self.version, self._card().sets)

    def put_back(self, copy: RankState) -> None:
        """See `TrainingEngine.put_back`."""
        self.before_use("update" if self._optimizer_config is not None else "write")
        self._sets = sets_of_card(copy.sets, self._with_buffers())
        put_back(copy, self._whole_state())
        self.version = copy.version
        self._loaded()

    def _whole_state(self) -> checkpoint.State:
        """With the named sets."""
        state = dict(self._with_buffers())
        for name, kept in self._sets.items():
            state |= kept.of_checkpoint(name)
        return state

    def weights_written(self) -> None:
        """See `TrainingEngine.weights_written`."""
        self._loaded()

    def save_weights(self, name: str, *, optimizer: bool) -> None:
        """See `TrainingEngine.save_weights`."""
        self.before_use("update" if optimizer else "forward")
        state, before = self._with_buffers(), self._sets.get(name)
        if before is None or before.optimizer != optimizer:
            before = room_for(state, optimizer=optimizer, version=self.version)
        self._sets[name] = replace(before, version=self.version)
        copy_state(state, before.tensors)

    def restore_weights(self, name: str) -> None:
        """See `TrainingEngine.restore_weights`."""
        self.before_use("write")
        kept, state = self._sets[name], self._with_buffers()
        copy_state(kept.tensors, {key: state[key] for key in kept.tensors})
        if kept.optimizer:
            self.version = kept.version
        self._loaded()

    def _with_buffers(self) -> checkpoint.State:
        return {**self._state(), **{f"model.{name}": b for name, b in kept_buffers(self._module.hf).items()}}

    def export(self, folder: Path) -> None:
        """See `TrainingEngine.export`; in `engine.export_dtype`, else that of the weights it started from."""
        self.before_use("forward")
        buckets = self.full_weights(getattr(torch, self._export_dtype), FILE_BYTES)
        hf = self._module.hf
        writes = dist.get_rank(self._mesh.world) == 0
        write_model(folder, buckets, hf.config, self._folder, type(hf).__name__, writes=writes)
        heads = self._whole_heads()
        if writes:
            write_heads(folder, heads)
        dist.barrier(group=self._mesh.world)

    def _whole_heads(self) -> dict[str, Tensor]:
        layout, shards = self.layout("heads"), self.local_shards("heads")
        whole = full_tensors(layout, shards, torch.float32, FILE_BYTES, self._mesh.world, self._device)
        return {head_name(name): weight for bucket in whole for name, weight in bucket}

    def _card(self) -> ModelCard:
        """Whose state a checkpoint of this engine is."""
        lora = self._config.lora
        return ModelCard(
            engine=self._config.name,
            model=type(self._module.hf).__name__,
            dtype=self._export_dtype,
            source=str(self._folder.resolve()),
            shapes={name: list(shape) for name, shape in {**self._files.shapes, **self._shapes()}.items()},
            files=self._files.as_json(),
            adapters={name: [a.down, a.up, a.scale, a.transposed] for name, a in self._adapters.items()},
            lora=asdict(lora) if lora is not None and self._adapters else {},
            version=self.version,
            sets={name: {"version": kept.version, "optimizer": kept.optimizer} for name, kept in self._sets.items()},
        )

    @contextmanager
    def _random_of_step(self) -> Iterator[None]:
        """What a user's loss draws depends on seed, step and rank only: there is no generator state to save."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(hash((self._seed, self.version, self._mesh.rows_rank)) & 0xFFFF_FFFF)
            yield

    def _check_outputs(self, outputs: Sequence[Output]) -> None:
        if not outputs or not all(map(self._module.gives, outputs)):
            asked = ", ".join(map(key_of, outputs)) or "nothing"
            raise ValueError(f"this model gives {self._module.described}, asked for {asked}")

    # --- what engines differ in --------------------------------------------------------------------
    @abstractmethod
    def _run(self, packed: Packed, outputs: Sequence[Output], temperature: float) -> dict[str, Tensor]:
        """The model on one pack."""

    @abstractmethod
    def _after_forward(self) -> None:
        """Free what a forward pass without a backward pass leaves gathered."""

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, summed over ranks; `last` of the step."""

    @abstractmethod
    def _apply(self, lr: float) -> float:
        """Clip and make the optimizer's step, unless the gradient is not finite; returns the gradient's norm."""

    @abstractmethod
    def _discard(self) -> None:
        """Drop the gradients of a step that is not made."""

    @abstractmethod
    def _parameter_layout(self, *, adapters: bool) -> Layout:
        """What each rank holds of the adapters, or of the other parameters, by names in memory. Collective."""

    @abstractmethod
    def _parameter_shards(self, part: WeightPart) -> Shards:
        """This rank's boxes of it."""

    @property
    @abstractmethod
    def gradient_bytes(self) -> int:
        """See `TrainingEngine.gradient_bytes`."""

    @abstractmethod
    def _device_parts(self) -> dict[DevicePart, Movable]:
        """What is on the device between steps."""

    @abstractmethod
    def _shapes(self) -> Mapping[str, Sequence[int]]:
        """Whole shape of every parameter, adapters included."""

    @abstractmethod
    def _state(self) -> checkpoint.State:
        """What a checkpoint holds: trained parameters and Adam's moments, as views that a load writes to."""

    @abstractmethod
    def _loaded(self) -> None:
        """Bring everything else in line with the state and `version` that were loaded."""


def _nothing(outputs: Sequence[Output]) -> dict[str, npt.NDArray[np.float32]]:
    """Where no rank has rows."""
    names = [name for output in outputs for name in (TOP_COLUMNS if kind_of(output) == "top_k" else (key_of(output),))]
    return {name: np.empty(0, np.float32) for name in names}


def _offsets(batch: Batch) -> npt.NDArray[np.int64]:
    """[B + 1] where each row's response tokens start."""
    lengths = batch["response_ids"].lengths if batch.num_rows else np.empty(0, np.int64)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
