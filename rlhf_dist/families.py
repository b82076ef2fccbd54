"""What was found when model families were tried (docs/models.md), for a line of `rlhf-dist check`.

A family that is not here, or a size that was not tried, is tried by the engine itself when it starts.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any


def family_of(path: str) -> str:
    """`model_type` of the config.json in a model folder; empty where it has none."""
    return str(_config(path).get("model_type", ""))


def family_line(path: str, uses: list[str]) -> str:
    """A clause about the family of the model at `path`. uses: which of `zero`, `tp`, `sp`, `lora` the launch has."""
    config, family = _config(path), family_of(path)
    found = _found().get(family)
    if found is None or found["fsdp"]["state"] == "untried":
        return f"family {family or 'unknown'}: never tried; the engine tries it when it starts"
    training = found["fsdp"]
    if training["state"] != "exact":
        return f"family {family}: {training['state']} when it was tried: {training.get('why', '')}"
    parts = [f"family {family}: exact when it was tried, {training['way']}"]
    tried = [(use, found.get(use, {"state": "untried"})) for use in uses]
    parts += [f"{use} {one['state']}: {one.get('why', '')}" for use, one in tried if one["state"] != "exact"]
    if config.get("router_aux_loss_coef"):
        parts.append("its router_aux_loss_coef is not used unless engine.router_aux_loss is set")
    return "; ".join(parts)


def _config(path: str) -> dict[str, Any]:
    file = Path(path).expanduser() / "config.json"
    try:
        settings = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


@cache
def _found() -> dict[str, dict[str, dict[str, Any]]]:
    """Family -> column of docs/models.md -> state, way and why."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(
        files("rlhf_dist").joinpath("model_families.json").read_text()
    )
    return found
