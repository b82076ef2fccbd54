"""Models as the training engines run them: packed rows in, numbers about response tokens out.

Each wraps a Hugging Face model in `hf`, so that parameter names are that model's names after "hf.",
and does everything inside its own forward: under FSDP the parameters of the root (embedding, final norm,
head) exist whole only there. How rows go through (`ways.py`) comes with the pack.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_dist.algorithms.contract import Output
from rlhf_dist.config import EngineConfig, ModelConfig
from rlhf_dist.quantised import quantised
from workers.engines.attention import running
from workers.engines.heads import library_logits, matrix_head, trunk_of
from workers.engines.load import Head, Weights, load
from workers.engines.log_probs import log_probs_and_entropy, log_probs_of_logits
from workers.engines.lora import add_adapters
from workers.engines.mixers import mix_by_row
from workers.engines.packing import Packed
from workers.engines.rotary import rotate_by_row, row_lengths
from workers.engines.router import balance_of_rows
from workers.engines.token_split import gather_tokens, summed_gradient


class RoleModel(nn.Module, ABC):
    """What both kinds of model do alike."""

    outputs: tuple[Output, ...]

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self._mixers = mix_by_row(trunk_of(hf))
        self.alike_up_to = rotate_by_row(hf)
        """Tokens up to which a row's positions do not depend on its length; None for any."""
        self.weights: Weights | None = None
        """Has the values of the parameters, which are on the meta device until then; None: they are there."""
        self.read_whole = ""
        """Why every rank has held the whole model for a moment; empty where none has."""
        self.failure: Exception | None = None
        """What the last trial pass raised."""
        self.windows: set[int] = set()
        """Local attention that the last pass over a pack knew of, in tokens."""
        self.softcaps: set[float] = set()
        """Caps on scores that layers of that pass asked attention for."""
        self.balances = False
        """Training passes give `router_balance` [B] as well (`router.py`)."""
        self._accepts = set(inspect.signature(trunk_of(hf).forward).parameters)

    def forward(self, packed: Packed, outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
        """`outputs` of the pack's tokens or rows, in the order of its rows. A trial pass that fails gives none."""
        if not packed.trial:
            return self.run(packed, outputs, temperature)
        self.failure = None
        try:
            return self.run(packed, outputs, temperature)
        except Exception as error:  # noqa: BLE001 - whatever the library makes of a way that it was not written for
            self.failure = error
            return {}

    @abstractmethod
    def run(self, packed: Packed, outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
        """See `forward`."""

    def take(self, packed: Packed) -> None:
        """Make the library's modules go the way of the pack."""
        if self.hf.config._attn_implementation != packed.way.attention:
            self.hf.config._attn_implementation = packed.way.attention
        for mixer in self._mixers:
            mixer.packing = None if packed.way.grid else packed.packing

    def trunk(self, packed: Packed) -> Any:
        """What the library's trunk returns for the pack."""
        self.take(packed)
        way = packed.way
        inputs: dict[str, Any] = {"input_ids": packed.input_ids}
        if "use_cache" in self._accepts:
            inputs["use_cache"] = False
        if self.balances:
            inputs["output_router_logits"] = True
        trunk = trunk_of(self.hf)
        if way.rows == "alone":
            return trunk(**inputs)
        # Of ones for a pack: without a mask the library looks for packs itself, in positions.
        inputs["attention_mask"] = packed.mask
        if way.grid:
            with row_lengths(packed.row_tokens):
                return trunk(**inputs)
        if "position_ids" in self._accepts:
            inputs["position_ids"] = packed.position_ids
        if "kwargs" in self._accepts:
            inputs["packing"] = packed.packing
        with running(packed.packing) as one, row_lengths(packed.row_tokens):
            states = trunk(**inputs)
        self.windows, self.softcaps = one.windows, one.softcaps
        return states


class PolicyModel(RoleModel):
    """A causal language model that gives log-probabilities and entropy of response tokens."""

    outputs: tuple[Output, ...] = ("log_probs", "entropy")

    def __init__(self, hf: PreTrainedModel, logit_chunk_tokens: int) -> None:
        super().__init__(hf)
        self.logit_chunk_tokens = logit_chunk_tokens

    def run(self, packed: Packed, outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
        """`outputs` of log_probs [T], entropy [T] (float32, nats, at `temperature`) and hidden [T, H] (float32)."""
        split = packed.split
        found: dict[str, Tensor] = {}
        if packed.way.head == "whole":
            self.take(packed)
            logits = self.hf(input_ids=packed.input_ids).logits.flatten(0, 1)[packed.before_token].float()
            log_p = (logits / temperature).log_softmax(-1)
            found["log_probs"] = log_p.gather(-1, packed.targets[:, None]).squeeze(-1)
            found["entropy"] = -(log_p.exp() * log_p).sum(-1)
            return {name: found[name] for name in outputs}
        states = self.trunk(packed)
        hidden = summed_gradient(states.last_hidden_state.flatten(0, 1), split)[packed.before_token]
        if "hidden" in outputs:
            found["hidden"] = hidden.float()
        if {"log_probs", "entropy"} & set(outputs):
            found["log_probs"], found["entropy"] = self._log_probs(packed, states, hidden, temperature, outputs)
        result = {name: gather_tokens(found[name], packed.token_counts, split) for name in outputs}
        if self.balances and torch.is_grad_enabled():
            result["router_balance"] = balance_of_rows(self.hf, states, packed)
        return result

    def _log_probs(
        self, packed: Packed, states: Any, hidden: Tensor, temperature: float, outputs: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        asked: dict[str, Any] = {
            "temperature": temperature,
            "chunk_tokens": self.logit_chunk_tokens,
            "with_entropy": "entropy" in outputs,
        }
        if packed.way.head == "matrix":
            head = matrix_head(self.hf, packed.split)
            if head is None:
                raise ValueError(f"{type(self.hf).__name__} has no matrix for a head")
            # Of some families the last states are float32 whatever the weights are.
            return log_probs_and_entropy(hidden.to(head.weight.dtype), head, packed.targets, **asked)
        if packed.split.tensor_group is not None:
            raise ValueError(f"the head of {type(self.hf).__name__} is not one matrix; set tensor_parallel=1")
        return log_probs_of_logits(hidden, partial(library_logits, self.hf, states), packed.targets, **asked)


class ValueModel(RoleModel):
    """A trunk with a linear head: values before each response token, or one score at the end of each row."""

    outputs: tuple[Output, ...] = ("values", "scores")

    def run(self, packed: Packed, outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
        """`outputs` of values [T], scores [B] and hidden [T, H], float32; the temperature is not used."""
        states = self.trunk(packed)
        hidden = summed_gradient(states.last_hidden_state.flatten(0, 1), packed.split)
        # The head in float32: bfloat16 has three digits, too few for returns to be fitted.
        head = summed_gradient(self.hf.score.weight, packed.split)[0].float()
        places = {
            "values": (packed.before_token, packed.token_counts),
            "scores": (packed.last_token, packed.row_counts),
            "hidden": (packed.before_token, packed.token_counts),
        }
        found: dict[str, Tensor] = {}
        for name in outputs:
            at, counts = places[name]
            picked = hidden[at].float()
            found[name] = gather_tokens(picked if name == "hidden" else picked @ head, counts, packed.split)
        return found


def build_model(
    config: ModelConfig, engine: EngineConfig, *, head: Head, seed: int, trained: bool, masters: bool = False
) -> RoleModel:
    """The model of a folder, dropout off; the same on every rank.

    Its parameters are on the meta device where they can be had in slices, and `weights` has them; else on the CPU, with
    their values (folders in an older form). Adapters are there always: they are small.

    In float32 if it is trained (master weights), or `masters`; another frozen one in the engine's dtype, in which it
    computes anyway.

    A value model from a language model's folder gets a zero head: it says 0 until it is trained. A model that is
    not `trained` needs no gradient; of one with adapters only they (and a value head) do.
    Raises FileNotFoundError without a model there, ValueError for one that has no such head.
    """
    folder = Path(config.path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model at {folder} (no config.json there); give a Hugging Face model folder")
    if how := quantised(folder, json.loads((folder / "config.json").read_text())):
        raise ValueError(f"{folder} {how}")
    hf, weights, read_whole = load(folder, config.init, head, seed, trained)
    # Dropout would make old and new log-probs of the same weights differ. Evaluation mode turns it off.
    hf.train(False)
    hf.requires_grad_(trained)
    if not trained and not masters:
        for parameter in hf.parameters():  # Not buffers: rotary frequencies stay in float32.
            parameter.data = parameter.data.to(getattr(torch, engine.dtype))
    if engine.lora is not None and trained:
        add_adapters(hf, engine.lora, seed)
    if engine.activation_checkpointing and trained:
        # ZeRO-3 frees the weights that the other kind would compare its recomputation with.
        hf.gradient_checkpointing_enable({"use_reentrant": engine.name == "deepspeed"})
        for layer in layers_of(hf):
            _recompute(layer)
    module = PolicyModel(hf, engine.logit_chunk_tokens) if head == "policy" else ValueModel(hf)
    module.weights, module.read_whole = weights, read_whole
    return module


def _recompute(layer: nn.Module) -> None:
    """Have the library recompute a layer, as it does of layers in training mode; the layer runs without that mode."""

    def mode(training: bool) -> Any:
        return lambda module, *_: setattr(module, "training", training)

    layer.training = True
    layer.register_forward_pre_hook(mode(False))
    layer.register_forward_hook(mode(True), always_call=True)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the units that are sharded and recomputed."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
