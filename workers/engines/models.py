"""Models as the training engines run them: packed rows in, numbers about response tokens out.

Each wraps a Hugging Face model in `hf`, so that parameter names are the checkpoint's names after "hf.",
and does everything inside its own forward: under FSDP the parameters of the root (embedding, final norm,
head) exist whole only there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_dist.algorithms.contract import Output
from rlhf_dist.config import EngineConfig, ModelConfig
from workers.engines.attention import Packing
from workers.engines.log_probs import log_probs_and_entropy
from workers.engines.lora import add_adapters, weight_name
from workers.engines.packing import Packed
from workers.engines.token_split import gather_tokens, summed_gradient

Head = Literal["policy", "value"]

# Changes to the logits that log_probs_and_entropy does not make: computing without them would be silently wrong.
_UNSUPPORTED = {"final_logit_softcapping": None, "logit_scale": None, "logits_scaling": 1.0}


class PolicyModel(nn.Module):
    """A causal language model that gives log-probabilities and entropy of response tokens."""

    outputs: tuple[Output, ...] = ("log_probs", "entropy")

    def __init__(self, hf: PreTrainedModel, logit_chunk_tokens: int) -> None:
        super().__init__()
        self.hf = hf
        self.logit_chunk_tokens = logit_chunk_tokens

    def forward(self, packed: Packed, outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
        """`outputs` of log_probs [T], entropy [T] (float32, nats, at `temperature`) and hidden [T, H] (float32)."""
        split = packed.split
        hidden = summed_gradient(_trunk(self.hf, packed), split)[packed.before_token]
        found: dict[str, Tensor] = {}
        if "hidden" in outputs:
            found["hidden"] = hidden.float()
        if {"log_probs", "entropy"} & set(outputs):
            found["log_probs"], found["entropy"] = log_probs_and_entropy(
                hidden,
                summed_gradient(_weight(self.hf.get_output_embeddings()), split),  # type: ignore[no-untyped-call]
                packed.targets,
                temperature=temperature,
                chunk_tokens=self.logit_chunk_tokens,
                with_entropy="entropy" in outputs,
            )
        return {name: gather_tokens(found[name], packed.token_counts, split) for name in outputs}


class ValueModel(nn.Module):
    """A trunk with a linear head: values before each response token, or one score at the end of each row."""

    outputs: tuple[Output, ...] = ("values", "scores")

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, packed: Packed, outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
        """`outputs` of values [T], scores [B] and hidden [T, H], float32; the temperature is not used."""
        hidden = summed_gradient(_trunk(self.hf, packed), packed.split)
        # The head in float32: bfloat16 has three digits, too few for returns to be fitted.
        head = summed_gradient(_weight(self.hf.score), packed.split)[0].float()
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


RoleModel = PolicyModel | ValueModel


def build_model(config: ModelConfig, engine: EngineConfig, *, head: Head, seed: int, trained: bool) -> RoleModel:
    """The model of a folder on the CPU, dropout off; the same on every rank.

    In float32 if it is trained (master weights); a frozen one in the engine's dtype, in which it computes anyway.

    A value model from a language model's folder gets a zero head: it says 0 until it is trained. A model that is
    not `trained` needs no gradient; of one with adapters only they (and a value head) do.
    Raises FileNotFoundError without a model there, ValueError for a model whose logits we would get wrong.
    """
    folder = Path(config.path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model at {folder} (no config.json there); give a Hugging Face model folder")
    hf = _load(folder, config.init, head, seed)
    # Dropout would make old and new log-probs of the same weights differ. Evaluation mode turns it off;
    # the layers' own flag only switches checkpointing on, and is not passed on to what they contain.
    hf.train(False)
    hf.requires_grad_(trained)
    if not trained:
        for parameter in hf.parameters():  # Not buffers: rotary frequencies stay in float32.
            parameter.data = parameter.data.to(getattr(torch, engine.dtype))
    if engine.lora is not None and trained:
        add_adapters(hf, engine.lora, seed)
    if engine.activation_checkpointing and trained:
        # ZeRO-3 frees the weights that the other kind would compare its recomputation with.
        hf.gradient_checkpointing_enable({"use_reentrant": engine.name == "deepspeed"})
        for layer in layers_of(hf):
            layer.training = True
    return PolicyModel(hf, engine.logit_chunk_tokens) if head == "policy" else ValueModel(hf)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the units that are sharded and recomputed."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their name in a Hugging Face checkpoint; tied parameters once, as the embedding.

    Adapters come under the names of `lora.py`, beside the weights they change.
    """
    return {weight_name(name.removeprefix("hf.")): parameter for name, parameter in model.named_parameters()}


def _load(folder: Path, init: str, head: Head, seed: int) -> PreTrainedModel:
    if init not in ("pretrained", "random"):
        raise ValueError(f"model.init must be pretrained or random, got {init!r}")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    _check(config, folder)
    family: Any = AutoModelForCausalLM
    if head == "value":
        family = AutoModelForSequenceClassification
        has_head = any("SequenceClassification" in name for name in config.architectures or ())
        if has_head and config.num_labels != 1:
            raise ValueError(f"a value or reward model has one label, got {config.num_labels} in {folder}/config.json")
        config.num_labels = 1
    options = {"attn_implementation": "packed", "dtype": torch.float32}
    new_head = head == "value"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if init == "random":
            hf = family.from_config(config, **options)
        else:
            hf, info = family.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
            )
            missing = set(info["missing_keys"]) - {"score.weight"}
            if missing:
                raise ValueError(f"the weights in {folder} lack {sorted(missing)[:5]}; is the folder complete?")
            new_head = new_head and "score.weight" in info["missing_keys"]
    if new_head:
        nn.init.zeros_(hf.score.weight)
    assert isinstance(hf, PreTrainedModel)
    return hf


def _check(config: Any, folder: Path) -> None:
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(config, name, neutral)
        if value not in (neutral, None):
            raise ValueError(f"{folder}: {name} = {value} is not supported (log-probs would be wrong without it)")


def _weight(head: Any) -> Tensor:
    """The weight [out, hidden] of a linear head."""
    weight: Tensor = head.weight
    return weight


def _trunk(hf: PreTrainedModel, packed: Packed) -> Tensor:
    """Hidden states [N, H] of the pack."""
    packing: Packing = packed.packing
    states = hf.base_model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, packing=packing
    )
    hidden: Tensor = states.last_hidden_state[0]
    return hidden
