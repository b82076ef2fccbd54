"""What losses ask of models, against the models: whatever a recipe's text alone cannot show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_dist.algorithms.contract import Loss, loss_name
from rlhf_dist.algorithms.outputs import OverVocabulary
from rlhf_dist.compose import Launch
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.model_folder import ModelShape
from rlhf_dist.typed import ConfigError


def check_outputs(launch: Launch, shapes: Mapping[str, ModelShape]) -> None:
    """Raises ConfigError for a teacher whose distributions a student cannot have, a k that is none of its vocabulary,
    and a reward of several labels. shapes: of the roles' models."""
    for node in launch.dataflow:
        shape = shapes.get(node.role)
        if shape is None:
            continue
        for loss in _losses(node.kwargs):
            for output in loss.outputs:
                if isinstance(output, OverVocabulary) and output.teacher is not None:
                    _check_teacher(launch, shapes, node, loss_name(loss), output.teacher)
        if node.op == "compute_top_k" and shape.vocabulary and not 1 <= node.kwargs["k"] < shape.vocabulary:
            raise ConfigError(
                f"{node.line}: {node.name} needs k from 1 to {shape.vocabulary - 1}, one less than its vocabulary, got "
                f"{node.kwargs['k']}"
            )
        if node.op == "compute_reward" and shape.labels > 1 and _classifies(launch, node.role):
            raise ConfigError(
                f"{node.line}: {node.name} gives one number a row, and {node.role}.model.path has {shape.labels} "
                f"labels; call {node.role}.compute_scores(batch), which RewardModel has, and make rewards in a host op"
            )


def frozen_folders(launch: Launch) -> dict[str, str]:
    """Role whose weights no node writes -> the folder that they are in."""
    folders = {}
    for role, settings in launch.used_roles.items():
        model: Any = getattr(settings, "model", None)
        if model is not None and model.init == "pretrained" and role not in launch.learning_roles:
            folders[role] = str(model.path)
    return folders


def _check_teacher(launch: Launch, shapes: Mapping[str, ModelShape], node: Node, loss: str, teacher: str) -> None:
    instead = f"use {teacher}.compute_top_k(batch) and distill_top_k() instead"
    if teacher in launch.learning_roles:
        raise ConfigError(
            f"{node.line}: {loss} reads the head of {teacher} from its folder, and this recipe trains {teacher}; "
            f"{instead}"
        )
    if teacher not in frozen_folders(launch):
        raise ConfigError(
            f"{node.line}: {loss} reads the head of {teacher} from its folder, and {teacher} computes nothing in this "
            f"recipe or has model.init=random; call {teacher}.compute_hidden(batch) first, or {instead}"
        )
    mine, theirs = shapes[node.role].vocabulary, shapes[teacher].vocabulary
    if None not in (mine, theirs) and mine != theirs:
        raise ConfigError(
            f"{node.line}: {loss} compares distributions over one vocabulary, and {node.role} has {mine} logits, "
            f"{teacher} {theirs}; {instead}"
        )


def _losses(value: Any) -> Iterator[Loss]:
    """Losses among settings, however nested."""
    if isinstance(value, Loss):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _losses(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _losses(one)


def _classifies(launch: Launch, role: str) -> bool:
    """Whether the role's folder holds a sequence classifier; another one has no labels."""
    model: Any = getattr(launch.roles[role], "model", None)
    file = Path(model.path) / "config.json"
    kinds = json.loads(file.read_text()).get("architectures") if file.is_file() else ()
    return any("SequenceClassification" in kind for kind in kinds or ())
