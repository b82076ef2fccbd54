"""Weights that a recipe sends from role to role, against settings and config.json: what would fail on the workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_dist.compose import Launch
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.typed import ConfigError

SHAPE_KEYS = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias", "n_embd", "n_layer"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "num_labels"),
)
"""Fields of config.json that decide which weights a model has."""


def check_weights(launch: Launch) -> None:
    """Raise ConfigError, with the recipe's line, for weights that cannot go where the recipe sends them."""
    for node in launch.dataflow:
        if node.kind == "weights" and node.op in ("copy_from", "mix_from", "merge_from"):
            _check_target(launch, node)
            for source in node.senders:
                _check_same_model(launch, node, source)


def _check_target(launch: Launch, node: Node) -> None:
    engine, where = launch.roles[node.role].engine, f"{node.line}: {node.name}"
    if engine.lora is not None:
        raise ConfigError(
            f"{where} writes the weights of {node.role!r}, which has adapters, and whole weights cannot be put into "
            f"adapters; set {node.role}.engine.lora=null, or use save_weights and restore_weights"
        )
    frozen = node.role not in launch.dataflow.trained
    if node.op != "copy_from" and frozen and engine.name == "deepspeed" and engine.dtype != "float32":
        raise ConfigError(
            f"{where} sums in float32, and engine deepspeed keeps the weights of {node.role!r}, which no update "
            f"trains, in {engine.dtype}: small changes would be rounded away; set {node.role}.engine.name=fsdp, or "
            f"{node.role}.engine.dtype=float32"
        )


def _check_same_model(launch: Launch, node: Node, source: str) -> None:
    paths = {role: launch.roles[role].model for role in (source, node.role)}
    theirs, mine = (_config_of(getattr(model, "path", None)) for model in paths.values())
    for key in SHAPE_KEYS if theirs and mine else ():
        if theirs.get(key) != mine.get(key):
            raise ConfigError(
                f"{node.line}: {node.name} takes weights of {source!r}, whose model has {key}={theirs.get(key)} in its "
                f"config.json, and that of {node.role!r} has {mine.get(key)}: their weights differ in names or shapes; "
                f"set {node.role}.model.path and {source}.model.path to models of one shape"
            )


def _config_of(path: Any) -> dict[str, Any]:
    file = Path(path or "").expanduser() / "config.json"
    told: dict[str, Any] = json.loads(file.read_text()) if path and file.is_file() else {}
    return {**told, **told.get("text_config", {})} if told else {}
