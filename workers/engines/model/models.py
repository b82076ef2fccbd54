"""Models as the training engines run them: packed rows in, numbers about response tokens out.

Each wraps a Hugging Face model in `hf`, so that parameter names are that model's names after "hf.",
and does everything inside its own forward: under FSDP the parameters of the root (embedding, final norm,
head) exist whole only there. How rows go through (`ways.py`) comes with the pack.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_dist.algorithms.outputs import (
    OF_LANGUAGE_MODELS,
    OF_VALUE_MODELS,
    Output,
    OverVocabulary,
    argument_of,
    columns_for,
    described,
    key_of,
    kind_of,
)
from rlhf_dist.algorithms.outputs import Head as OwnHead
from rlhf_dist.config import EngineConfig, ModelConfig
from rlhf_dist.quantised import quantised
from workers.engines.added.lora import add_adapters
from workers.engines.added.own_heads import head_module, start_heads, width_of
from workers.engines.files.load import Head, Weights, load
from workers.engines.model.attention import running
from workers.engines.model.attention_map import Watch
from workers.engines.model.distribution import (
    LogitsOf,
    Reduce,
    chosen_and_largest_logits,
    log_probs_at,
    logits_of_matrix,
    over_vocabulary,
    over_vocabulary_of_logits,
    top_k,
)
from workers.engines.model.heads import library_logits, matrix_head, trunk_of
from workers.engines.model.log_probs import Head as MatrixHead
from workers.engines.model.log_probs import log_probs_and_entropy, log_probs_of_logits
from workers.engines.model.mixers import mix_by_row
from workers.engines.model.packing import Packed
from workers.engines.model.rotary import rotate_by_row, row_lengths
from workers.engines.model.router import balance_of_rows
from workers.engines.model.token_split import gather_tokens, summed_gradient

TOP_COLUMNS = ("top_ids", "top_log_probs", "top_log_rest")
"""What `top_k.K` gives: [T, K], [T, K] and [T]."""
LOGIT_COLUMNS = ("logits", "largest_logits")
"""What `logits` gives: [T] each."""


class RoleModel(nn.Module, ABC):
    """What both kinds of model do alike."""

    outputs: tuple[str, ...]
    """Kinds of output of such a model, besides heads of its own."""
    of_its_head: frozenset[str]
    """Those of them that take the head which the model comes with."""

    def __init__(self, hf: PreTrainedModel, heads: Sequence[OwnHead]) -> None:
        super().__init__()
        self.hf = hf
        self.teachers: dict[str, MatrixHead] = {}
        """Role -> head of its model, for distributions beside this one's."""
        self.own_heads = {head.name: head for head in heads}
        self.heads_at_start: dict[str, Tensor] = {}
        """Head -> [K, H], whole: an engine may have to place them itself."""
        for head in heads:
            self.add_module(head_module(head.name), nn.Linear(width_of(hf), head.outputs, bias=False))
        inside = set(trunk_of(hf).modules())
        self._beyond_trunk = [module for module in hf.modules() if module not in inside]
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

    def forward(self, packed: Packed, outputs: Sequence[Output], temperature: float) -> dict[str, Tensor]:
        """`outputs`, by `key_of`, of the pack's tokens or rows, in the order of its rows. A trial pass that fails gives
        none; one with gradients gives `unused` [0] too, where it has weights that the outputs do not depend on."""
        if not packed.trial:
            found = self.run(packed, outputs, temperature)
            if torch.is_grad_enabled():
                found |= self._unused({kind_of(output) for output in outputs}, set(map(key_of, outputs)))
            return found
        self.failure = None
        try:
            return self.run(packed, outputs, temperature)
        except Exception as error:  # noqa: BLE001 - whatever the library makes of a way that it was not written for
            self.failure = error
            return {}

    @abstractmethod
    def run(self, packed: Packed, outputs: Sequence[Output], temperature: float) -> dict[str, Tensor]:
        """See `forward`."""

    def gives(self, output: Output) -> bool:
        """Whether it can be asked for this."""
        if kind_of(output) == "heads":
            return argument_of(output) in self.own_heads
        return kind_of(output) in self.outputs

    def per_row(self, key: str) -> bool:
        """Whether an output has one entry a row, not one a response token."""
        head = self.own_heads.get(argument_of(key)) if kind_of(key) == "heads" else None
        return key == "scores" or (head is not None and head.at == "last_token")

    @property
    def described(self) -> str:
        """What it gives, for messages."""
        return described(self.outputs, self.own_heads.values())

    def _say(self, name: str, hidden: Tensor, packed: Packed) -> Tensor:
        """What a head of its own says of all states [n, H]; in float32, as the value head does."""
        at_end = self.own_heads[name].at == "last_token"
        at, counts = (packed.last_token, packed.row_counts) if at_end else (packed.before_token, packed.token_counts)
        weight = summed_gradient(getattr(self, head_module(name)).weight, packed.split).float()
        return gather_tokens(_answers(hidden[at].float(), weight), counts, packed.split)

    def _unused(self, kinds: set[str], keys: set[str]) -> dict[str, Tensor]:
        """Gives such weights the gradient 0. Ranks reduce gradients together, and each may be at another loss."""
        weights = [getattr(self, head_module(name)).weight for name in self.own_heads if f"heads.{name}" not in keys]
        if not kinds & self.of_its_head:
            weights += list(self._weights_beyond_trunk())
        nothing = [weight.flatten()[:0].float() for weight in weights if weight.requires_grad]
        return {"unused": torch.cat(nothing)} if nothing else {}

    def _weights_beyond_trunk(self) -> Iterator[Tensor]:
        for module in self._beyond_trunk:
            for name, _ in list(module.named_parameters(recurse=False)):
                yield getattr(module, name)

    def take(self, packed: Packed) -> None:
        """Make the library's modules go the way of the pack."""
        if self.hf.config._attn_implementation != packed.way.attention:
            self.hf.config._attn_implementation = packed.way.attention
        for mixer in self._mixers:
            mixer.packing = None if packed.way.grid else packed.packing

    def trunk(self, packed: Packed, watch: Watch | None = None) -> Any:
        """What the library's trunk returns for the pack. watch: what else is asked of its attention, in a pack only."""
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
        with running(packed.packing, watch) as one, row_lengths(packed.row_tokens):
            states = trunk(**inputs)
        self.windows, self.softcaps = one.windows, one.softcaps
        return states


class PolicyModel(RoleModel):
    """A causal language model that gives log-probabilities and entropy of response tokens."""

    outputs = (*OF_LANGUAGE_MODELS, "top_k", "logits")
    of_its_head = frozenset({"log_probs", "entropy", "log_probs_at", "over_vocabulary"})

    def __init__(self, hf: PreTrainedModel, heads: Sequence[OwnHead], logit_chunk_tokens: int) -> None:
        super().__init__(hf, heads)
        self.logit_chunk_tokens = logit_chunk_tokens

    def run(self, packed: Packed, outputs: Sequence[Output], temperature: float) -> dict[str, Tensor]:
        """Float32, nats at `temperature`. `top_k.32` gives top_ids and top_log_probs [T, 32] and top_log_rest [T];
        `logits`, whatever the temperature, logits and largest_logits [T]."""
        split = packed.split
        found: dict[str, Tensor] = {}
        if packed.way.head == "whole":
            self.take(packed)
            logits = self.hf(input_ids=packed.input_ids).logits.flatten(0, 1)[packed.before_token].float()
            log_p = (logits / temperature).log_softmax(-1)
            found["log_probs"] = log_p.gather(-1, packed.targets[:, None]).squeeze(-1)
            found["entropy"] = -(log_p.exp() * log_p).sum(-1)
            return {key_of(output): found[key_of(output)] for output in outputs}
        states = self.trunk(packed)
        whole = summed_gradient(states.last_hidden_state.flatten(0, 1), split)
        hidden = whole[packed.before_token]
        if {"log_probs", "entropy"} & set(outputs):
            log_probs, entropy = self._log_probs(packed, states, hidden, temperature, "entropy" in outputs)
            found |= {
                name: values for name, values in (("log_probs", log_probs), ("entropy", entropy)) if name in outputs
            }
        for output in outputs:
            if output == "hidden":
                found["hidden"] = hidden.float()
            elif kind_of(output) == "top_k":
                found |= self._top_k(packed, states, hidden, int(argument_of(output)), temperature)
            elif output == "logits":
                found |= self._logits(packed, states, hidden)
            elif kind_of(output) in ("log_probs_at", "over_vocabulary"):
                found[key_of(output)] = self._over_vocabulary(packed, states, hidden, output, temperature)
        result = {name: gather_tokens(values, packed.token_counts, split) for name, values in found.items()}
        result |= {
            key_of(one): self._say(argument_of(one), whole, packed) for one in outputs if kind_of(one) == "heads"
        }
        if self.balances and torch.is_grad_enabled():
            result["router_balance"] = balance_of_rows(self.hf, states, packed)
        return result

    def _log_probs(
        self, packed: Packed, states: Any, hidden: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        asked: dict[str, Any] = {
            "temperature": temperature,
            "chunk_tokens": self.logit_chunk_tokens,
            "with_entropy": with_entropy,
        }
        head = self._head(packed)
        if head is not None:
            # Of some families the last states are float32 whatever the weights are.
            return log_probs_and_entropy(hidden.to(head.weight.dtype), head, packed.targets, **asked)
        return log_probs_of_logits(hidden, partial(library_logits, self.hf, states), packed.targets, **asked)

    def _head(self, packed: Packed) -> MatrixHead | None:
        """The head as a matrix; None where it is the library's code."""
        if packed.way.head == "matrix":
            head = matrix_head(self.hf, packed.split)
            if head is None:
                raise ValueError(f"{type(self.hf).__name__} has no matrix for a head")
            return head
        if packed.split.tensor_group is not None:
            raise ValueError(f"the head of {type(self.hf).__name__} is not one matrix; set tensor_parallel=1")
        return None

    def _logits_of(self, packed: Packed, states: Any) -> LogitsOf:
        head = self._head(packed)
        return logits_of_matrix(head) if head else partial(library_logits, self.hf, states)

    def _logits(self, packed: Packed, states: Any, hidden: Tensor) -> dict[str, Tensor]:
        logits_of = self._logits_of(packed, states)
        found = chosen_and_largest_logits(hidden, logits_of, packed.targets, chunk_tokens=self.logit_chunk_tokens)
        return dict(zip(LOGIT_COLUMNS, found, strict=True))

    def _top_k(self, packed: Packed, states: Any, hidden: Tensor, k: int, temperature: float) -> dict[str, Tensor]:
        logits_of, chunk_tokens = self._logits_of(packed, states), self.logit_chunk_tokens
        found = top_k(hidden, logits_of, k, temperature=temperature, chunk_tokens=chunk_tokens)
        return dict(zip(TOP_COLUMNS, found, strict=True))

    def _over_vocabulary(
        self, packed: Packed, states: Any, hidden: Tensor, output: Output, temperature: float
    ) -> Tensor:
        head = self._head(packed)
        if not set(columns_for([output])) <= packed.columns.keys():
            # A filler: it has none of the columns, and takes part with an exact zero.
            nothing = hidden.flatten()[:0].sum() + sum(w.flatten()[:0].sum() for w in self._weights_beyond_trunk())
            return nothing + torch.zeros(len(hidden), device=hidden.device)
        reduce: Reduce = log_probs_at
        given = [packed.columns[argument_of(output)]] if isinstance(output, str) else []
        if isinstance(output, OverVocabulary):
            given = [packed.columns[name] for name in output.reads]
            reduce = output.function
            if output.teacher is not None:
                given = [packed.columns[output.hidden], *given]
                reduce = partial(_beside, reduce, logits_of_matrix(self.teachers[output.teacher]), temperature)
        asked: dict[str, Any] = {"temperature": temperature, "chunk_tokens": self.logit_chunk_tokens}
        if head is not None:
            return over_vocabulary(hidden.to(head.weight.dtype), head, reduce, given, **asked)
        return over_vocabulary_of_logits(hidden, partial(library_logits, self.hf, states), reduce, given, **asked)


def _beside(
    function: Reduce, teacher: LogitsOf, temperature: float, log_p: Tensor, hidden: Tensor, *given: Tensor
) -> Tensor:
    """`function` of a model's log_p [t, V] and the teacher's, whose last states are `hidden` [t, H]."""
    with torch.no_grad():
        theirs = (teacher(hidden) / temperature).log_softmax(-1)
    return function(log_p, theirs, *given)


def _answers(hidden: Tensor, weight: Tensor) -> Tensor:
    """[n, H] and a head [K, H] -> [n, K]; [n] where K is 1."""
    return hidden @ (weight[0] if len(weight) == 1 else weight.t())


class ValueModel(RoleModel):
    """A trunk with a linear head: values before each response token, or scores at the end of each row."""

    outputs = (*OF_VALUE_MODELS, "attention")
    of_its_head = frozenset({"values", "scores"})

    def run(self, packed: Packed, outputs: Sequence[Output], temperature: float) -> dict[str, Tensor]:
        """Float32; values and scores have K numbers each of a head with K > 1 labels. The temperature is not used.

        attention [T]: the share of the last layer's attention that a row's last token gives to each response token.
        """
        watch = self._watch(packed) if "attention" in outputs else None
        states = self.trunk(packed, watch)
        hidden = summed_gradient(states.last_hidden_state.flatten(0, 1), packed.split)
        # The head in float32: bfloat16 has three digits, too few for returns to be fitted.
        head = summed_gradient(self.hf.score.weight, packed.split).float()
        places = {
            "values": (packed.before_token, packed.token_counts),
            "scores": (packed.last_token, packed.row_counts),
            "hidden": (packed.before_token, packed.token_counts),
        }
        found: dict[str, Tensor] = {}
        for name in map(key_of, outputs):
            if name == "attention":
                assert watch is not None, "asked for above"
                found[name] = self._watched(watch)
                continue
            if kind_of(name) == "heads":
                found[name] = self._say(argument_of(name), hidden, packed)
                continue
            at, counts = places[name]
            picked = hidden[at].float()
            said = picked if name == "hidden" else _answers(picked, head)
            found[name] = gather_tokens(said, counts, packed.split)
        return found

    def _watch(self, packed: Packed) -> Watch:
        if packed.way.grid or packed.split.sequence > 1:
            way = "a piece of each row a rank" if packed.split.sequence > 1 else str(packed.way)
            raise ValueError(f"attention is given of packed whole rows, and {type(self.hf).__name__} runs {way} here")
        layer = self.hf.config.get_text_config().num_hidden_layers - 1
        return Watch(layer, packed.last_token, packed.response_tokens)

    def _watched(self, watch: Watch) -> Tensor:
        if watch.found is None:
            raise ValueError(f"the last layer of {type(self.hf).__name__} has no attention to look at")
        return watch.found


def build_model(
    config: ModelConfig,
    engine: EngineConfig,
    *,
    head: Head,
    heads: Sequence[OwnHead] = (),
    seed: int,
    trained: bool,
    masters: bool = False,
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
    module = PolicyModel(hf, heads, engine.logit_chunk_tokens) if head == "policy" else ValueModel(hf, heads)
    module.weights, module.read_whole = weights, read_whole
    dtype = torch.float32 if trained or masters else getattr(torch, engine.dtype)
    start_heads(module, folder if config.init == "pretrained" else None, seed, trained, dtype)
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
