"""Model shapes: parameters, FLOPs and bytes of a decoder, from the numbers of its Hugging Face config.json.

embedding [V, h] -> L x (attention: q, k, v, o; mlp: gate, up, down, or E experts of which k run) -> head [h, V]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_dist.typed import ConfigError, unknown


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer. Counts are of numbers (parameters), not bytes."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    """Width of a dense MLP; unused where every layer has experts."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    """Whether the output head is the embedding."""
    gated: bool = True
    """Whether the MLP has a gate (SwiGLU): three matrices instead of two."""
    experts: int = 0
    """Experts of a layer; 0 for a dense model."""
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    """Width of the expert that every token uses; 0 for none."""
    dense_layers: int = 0
    """Layers of a mixture that have a dense MLP of width `intermediate` instead of experts."""
    latent: int = 0
    """Width of the compressed keys and values that are kept for a token (multi-head latent attention, DeepSeek-AI 2024:
    kv_lora_rank + qk_rope_head_dim); 0 where keys and values are kept per head."""
    latent_attention: int = 0
    """Parameters of one layer's latent attention."""
    scalar_head: bool = False
    """One output instead of a vocabulary: critics and reward models."""

    @cached_property
    def attention(self) -> int:
        """Parameters of one layer's attention."""
        if self.latent:
            return self.latent_attention
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expanded_kv_heads(self) -> int:
        """Heads of keys and values while a layer computes: latent ones are expanded for every head."""
        return self.heads if self.latent else self.kv_heads

    @cached_property
    def _matrices(self) -> int:
        return 3 if self.gated else 2

    @cached_property
    def expert(self) -> int:
        """Parameters of one expert."""
        return self._matrices * self.hidden * self.expert_intermediate

    @cached_property
    def dense_mlp(self) -> int:
        """Parameters of the part of a layer's MLP that every token uses."""
        if not self.experts:
            return self._matrices * self.hidden * self.intermediate
        return self._matrices * self.hidden * self.shared_intermediate + self.hidden * self.experts

    @cached_property
    def layer(self) -> int:
        """Parameters of one layer."""
        return self.attention + self.dense_mlp + self.experts * self.expert + 2 * self.hidden

    @cached_property
    def head(self) -> int:
        """Parameters of the output head that are not shared with the embedding."""
        if self.scalar_head:
            return self.hidden
        return 0 if self.tied else self.vocabulary * self.hidden

    @cached_property
    def parameters(self) -> int:
        """All parameters."""
        layers = self.layers * self.layer - self.dense_layers * (self.experts * self.expert + self._dense_for_experts)
        return self.vocabulary * self.hidden + layers + self.head + self.hidden

    @cached_property
    def _dense_for_experts(self) -> int:
        """What a dense layer of a mixture has less of in common MLP parameters (negative: more)."""
        return self.dense_mlp - self._matrices * self.hidden * self.intermediate

    @cached_property
    def active_layer(self) -> int:
        """Parameters of one layer that a token is multiplied with."""
        return self.attention + self.dense_mlp + self.experts_per_token * self.expert

    @cached_property
    def active(self) -> int:
        """Parameters that a token is multiplied with: layers and head, not the embedding look-up."""
        dense = self.dense_layers * (self.experts_per_token * self.expert + self._dense_for_experts)
        head = self.hidden if self.scalar_head else self.vocabulary * self.hidden
        return self.layers * self.active_layer - dense + head

    def forward_flops(self, tokens: float, squares: float) -> float:
        """FLOPs of a forward pass over rows with `tokens` = sum of lengths, `squares` = sum of squared lengths.

        2 for each multiplied parameter and token, and causal attention: 4 h_attention L s^2 / 2 for a row of s.
        """
        return 2.0 * self.active * tokens + 2.0 * self.layers * self.heads * self.head_dim * squares

    def expert_flops(self, tokens: float) -> float:
        """Those of a forward pass's FLOPs that are the experts'."""
        return 2.0 * (self.layers - self.dense_layers) * self.experts_per_token * self.expert * tokens

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> float:
        """Keys and values of one token in all layers, bytes."""
        if self.latent:
            return float(self.layers * self.latent * dtype_bytes)
        return 2.0 * self.layers * self.kv_heads * self.head_dim * dtype_bytes

    def decode_weights(self, batch: float) -> float:
        """Parameters read from memory for one token of each of `batch` rows: of the experts, those that some row uses.

        With k of E experts drawn at random for each row, an expert stays unused with probability (1 - k/E)^batch.
        """
        dense = self.layers * (self.attention + self.dense_mlp) + self.vocabulary * self.hidden
        if not self.experts:
            return float(dense)
        unused: float = (1.0 - self.experts_per_token / self.experts) ** max(batch, 1.0)
        used = self.experts * (1.0 - unused)
        return (
            dense - self.dense_layers * self._dense_for_experts + (self.layers - self.dense_layers) * used * self.expert
        )


def _dense(
    name: str,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv: int,
    vocabulary: int,
    *,
    dim: int = 128,
    tied: bool = False,
) -> ModelSpec:
    return ModelSpec(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv,
        head_dim=dim,
        vocabulary=vocabulary,
        tied=tied,
    )


BUILT_IN: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        # Touvron et al. 2023 (Llama 2), Roziere et al. 2023 (Code Llama), Dubey et al. 2024 (Llama 3), Qwen3
        # report 2025; the numbers are those of the published config.json files.
        _dense("llama2-7b", 32, 4096, 11008, 32, 32, 32000),
        _dense("llama2-13b", 40, 5120, 13824, 40, 40, 32000),
        _dense("llama2-70b", 80, 8192, 28672, 64, 8, 32000),
        _dense("codellama-34b", 48, 8192, 22016, 64, 8, 32000),
        _dense("llama3-8b", 32, 4096, 14336, 32, 8, 128256),
        _dense("llama3-70b", 80, 8192, 28672, 64, 8, 128256),
        _dense("llama3-405b", 126, 16384, 53248, 128, 8, 128256),
        _dense("qwen3-8b", 36, 4096, 12288, 32, 8, 151936),
        _dense("qwen3-32b", 64, 5120, 25600, 64, 8, 151936),
        ModelSpec(
            name="qwen3-30b-a3b",
            layers=48,
            hidden=2048,
            intermediate=6144,
            heads=32,
            kv_heads=4,
            head_dim=128,
            vocabulary=151936,
            experts=128,
            experts_per_token=8,
            expert_intermediate=768,
        ),
    )
}

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
COUNTS = (
    "intermediate_size", "n_inner", "num_key_value_heads", "head_dim", "num_experts", "num_local_experts",
    "n_routed_experts", "num_experts_per_tok", "experts_per_token", "moe_topk", "moe_intermediate_size",
    "shared_expert_intermediate_size", "n_shared_experts", "first_k_dense_replace", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
UNGATED = frozenset({"gpt_neox", "gptj", "gpt2", "opt", "bloom", "falcon", "phi", "starcoder2", "mpt", "gpt_bigcode"})
"""`model_type` of decoders whose MLP has two matrices. GPT-2's old names of fields say so, too."""
OLD_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}


def model_spec(value: Any, key: str) -> ModelSpec:
    """A shape from a built-in name, a config.json (or its folder), or the content of one as a mapping.

    Raises ConfigError for an unknown name, a file that cannot be read, and a config without the fields needed.
    """
    if isinstance(value, Mapping):
        if isinstance(value.get("path"), str):
            return model_spec(value["path"], f"{key}.path")
        return from_hf_config(value, str(value.get("name", "own")), key)
    if not isinstance(value, str):
        raise ConfigError(f"{key} must be a model's name, a config.json or its content, got {value!r}")
    if value.lower() in BUILT_IN:
        return BUILT_IN[value.lower()]
    path = Path(value).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if "/" in value or value.endswith(".json"):
            raise ConfigError(
                f"{key}: no config.json at {value!r} (looked for {file.resolve()}); give a model's folder, or a shape "
                f"such as {key}=llama3-8b"
            )
        raise ConfigError(f"{key}: {unknown(value, BUILT_IN, 'model')} A config.json or its folder will do, too")
    try:
        settings = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {file} is not JSON ({error})") from error
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{key}: {file} must hold a JSON object")
    return from_hf_config(settings, file.parent.name or file.stem, f"{key} ({file})")


def from_hf_config(settings: Mapping[str, Any], name: str, key: str) -> ModelSpec:
    """A shape from the fields of a Hugging Face config.json. Raises ConfigError naming the fields that are missing."""
    text = settings["text_config"] if isinstance(settings.get("text_config"), Mapping) else settings
    got = {OLD_NAMES.get(str(field), str(field)): value for field, value in text.items()}
    for field in (*NEEDED, *COUNTS):
        value = got.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < (field in NEEDED)):
            raise ConfigError(f"{key}: {field} must be a whole number, above 0 where it is needed, got {value!r}")
    missing = [field for field in NEEDED if got.get(field) is None]
    experts = _count(got, "num_experts", "num_local_experts", "n_routed_experts")
    if not experts and got.get("intermediate_size") is None and "n_inner" not in got and "n_embd" not in text:
        missing.append("intermediate_size")
    per_token = _count(got, "num_experts_per_tok", "experts_per_token", "moe_topk")
    if experts and not per_token:
        missing.append("num_experts_per_tok")
    if missing:
        raise ConfigError(f"{key}: the model's config lacks {', '.join(missing)} (whole numbers above 0); add them")
    if experts and per_token > experts:
        raise ConfigError(f"{key}: num_experts_per_tok = {per_token} is more than the {experts} experts there are")
    hidden, heads, layers = got["hidden_size"], got["num_attention_heads"], got["num_hidden_layers"]
    intermediate = _count(got, "intermediate_size", "n_inner") or 4 * hidden
    width = (_count(got, "moe_intermediate_size") or intermediate) if experts else 0
    shared = _count(got, "shared_expert_intermediate_size") or _count(got, "n_shared_experts") * width
    latent = _latent_attention(got, hidden, heads)
    kv_heads = _count(got, "num_key_value_heads") or heads
    if not latent and (heads % kv_heads or (not _count(got, "head_dim") and hidden % heads)):
        raise ConfigError(
            f"{key}: num_attention_heads = {heads} must divide hidden_size = {hidden} (or head_dim be given) and be a "
            f"multiple of num_key_value_heads = {kv_heads}"
        )
    return ModelSpec(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=1 if latent else kv_heads,
        head_dim=latent["head_dim"] if latent else _count(got, "head_dim") or hidden // heads,
        vocabulary=got["vocab_size"],
        tied=bool(got.get("tie_word_embeddings", False)),
        gated="n_embd" not in text and got.get("model_type") not in UNGATED,
        experts=experts,
        experts_per_token=per_token if experts else 0,
        expert_intermediate=width,
        shared_intermediate=shared if experts else 0,
        dense_layers=min(layers, _count(got, "first_k_dense_replace")) if experts else 0,
        latent=latent.get("latent", 0),
        latent_attention=latent.get("parameters", 0),
    )


def _latent_attention(got: Mapping[str, Any], hidden: int, heads: int) -> dict[str, int]:
    """Widths of multi-head latent attention; empty for any other.

    Queries go through q_lora_rank (or directly), keys and values through kv_lora_rank; a part of the key, that with the
    rotary embedding, is shared by all heads. Scores are over nope + rope numbers and values have a width of their own:
    `head_dim` is the mean of both, which counts the same FLOPs.
    """
    rank = _count(got, "kv_lora_rank")
    if not rank:
        return {}
    nope, rope, value = (_count(got, key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    score, query = nope + rope, _count(got, "q_lora_rank")
    queries = query * (hidden + heads * score) if query else hidden * heads * score
    others = hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    return {"latent": rank + rope, "parameters": queries + others, "head_dim": (score + value) // 2}


def _count(settings: Mapping[str, Any], *names: str) -> int:
    return next((settings[name] for name in names if isinstance(settings.get(name), int)), 0)
