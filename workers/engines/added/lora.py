"""Low-rank adapters through peft: W' = W + (alpha / rank) B A, A [rank, in], B [out, rank] (arXiv 2106.09685).

Adapters sit beside the weights they change:

    model.layers.0.self_attn.q_proj.weight            W, frozen
    model.layers.0.self_attn.q_proj.lora_A.weight     A
    model.layers.0.self_attn.q_proj.lora_B.weight     B, zero at first: the policy starts as its base
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_dist.config import LoraConfig
from rlhf_dist.reshard.layout import Box

_ADAPTER = "default"


@dataclass(frozen=True)
class Adapter:
    """The parameters that change one weight."""

    down: str
    """Name of A."""
    up: str
    """Name of B."""
    scale: float
    transposed: bool = False
    """The weight is [in, out], as GPT-2 has it."""

    def change(self, down: Tensor, up: Tensor, box: Box) -> Tensor:
        """What A [rank, in] and B [out, rank] add to a box of the weight."""
        first, second = (slice(*edges) for edges in box)
        product = down[:, first].T @ up[second].T if self.transposed else up[first] @ down[:, second]
        return product * self.scale


def add_adapters(hf: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freeze `hf` and add adapters to the linear layers `config.targets` names, in place; a value head stays trained.

    Raises ValueError if peft is not installed or no layer has such a name.
    """
    try:
        import peft
    except ModuleNotFoundError:
        raise ValueError("engine.lora needs peft, which is not installed; run pip install 'rlhf-dist[lora]'") from None
    hf.requires_grad_(False)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        # peft's own reading of all-linear fails on mixtures of experts whose experts are one tensor.
        target_modules=_linear_layers(hf) if config.targets == "all-linear" else config.targets,
        lora_dropout=0.0,
        exclude_modules=["score"],
    )
    try:
        peft.inject_adapter_in_model(settings, hf, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ValueError(
            f"engine.lora.targets={config.targets} names no layers of {type(hf).__name__} that adapters fit in; "
            f"give a regular expression such as .*(q|v)_proj ({' '.join(str(error).split())[:200]})"
        ) from error
    _start(hf, seed)
    # Dropout is off everywhere; peft's new modules start in training mode.
    hf.train(False)
    head: Any = getattr(hf, "score", None)
    if head is not None:
        head.weight.requires_grad_(True)


def _start(hf: nn.Module, seed: int) -> None:
    """Give adapters memory, which peft leaves out beside weights that have none, and values as peft does: A uniform
    within 1/sqrt(in), B zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in hf.modules():
        for table in ("lora_A", "lora_B"):
            if _ADAPTER in (adapters := getattr(module, table, {})):
                empty = adapters[_ADAPTER].weight
                values = torch.zeros(empty.shape)
                if table == "lora_A":
                    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
                adapters[_ADAPTER].weight = nn.Parameter(values)


def _linear_layers(hf: PreTrainedModel) -> list[str]:
    """Names of all linear layers but the head's."""
    ends = (hf.get_output_embeddings(), getattr(hf, "score", None))
    return [
        name
        for name, module in hf.named_modules()
        if type(module) in (nn.Linear, Conv1D) and not any(module is end for end in ends)  # routers are kinds of it
    ]


def weight_name(name: str) -> str:
    """A parameter's name without peft's wrapping."""
    return (
        name.replace(".base_layer.", ".").replace(f".{_ADAPTER}.", ".")
        if "lora_" in name or "base_layer" in name
        else name
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter, by `weight_name`, is part of an adapter."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def adapters_of(model: nn.Module, names: Mapping[str, Any]) -> dict[str, Adapter]:
    """Weight -> its adapter, for the parameters `names` of `model`; empty without adapters."""
    found = {}
    for name, module in model.named_modules():
        at = weight_name(name.removeprefix("hf."))
        if isinstance(getattr(module, "scaling", None), dict) and f"{at}.lora_A.weight" in names:
            layer: Any = module
            found[f"{at}.weight"] = Adapter(
                f"{at}.lora_A.weight",
                f"{at}.lora_B.weight",
                float(layer.scaling[_ADAPTER]),
                isinstance(layer.base_layer, Conv1D),
            )
    return found


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base model: adapters are passed by, as the reference that shares the base sees it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
