"""What every training engine does alike: rows to packs, packs to outputs, losses to one exact optimizer step.

    step    count rows, tokens, groups over all ranks
            for each pass: pack -> model -> loss / global count -> backward        (subclass: _backward)
            every loss value finite on every rank?  else NonFiniteLoss             (subclass: _discard)
            clip, learning rate of this version, AdamW                             (subclass: _apply)

A subclass holds the parameters and decides how gradients travel.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
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
from rlhf_dist.schema import SEQUENCE
from workers.engines.added.lora import without_adapters
from workers.engines.model.models import LOGIT_COLUMNS, TOP_COLUMNS, RoleModel
from workers.engines.model.packing import Packed, filler, longest_row, pack
from workers.engines.model.probe import probe
from workers.engines.model.router import check_balance
from workers.engines.model.token_split import WHOLE
from workers.engines.model.ways import PACKED, Way
from workers.engines.training.accumulation import Accumulation, even_passes
from workers.engines.training.engine_weights import EngineWeights
from workers.engines.training.interface import NonFiniteLoss, Term
from workers.engines.training.learning_rate import learning_rate
from workers.engines.training.mesh import TrainingMesh
from workers.engines.training.teacher_head import teacher_head


class PackedEngine(EngineWeights):
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
        super().__init__(module, model, engine, optimizer, mesh, seed)
        self.teacher_folders: Mapping[str, str] = {}
        self._way = PACKED
        self.remarks: tuple[str, ...] = ()

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


def _nothing(outputs: Sequence[Output]) -> dict[str, npt.NDArray[np.float32]]:
    """Where no rank has rows."""
    several = {"top_k": TOP_COLUMNS, "logits": LOGIT_COLUMNS}
    names = [name for output in outputs for name in several.get(kind_of(output), (key_of(output),))]
    return {name: np.empty(0, np.float32) for name in names}


def _offsets(batch: Batch) -> npt.NDArray[np.int64]:
    """[B + 1] where each row's response tokens start."""
    lengths = batch["response_ids"].lengths if batch.num_rows else np.empty(0, np.int64)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
