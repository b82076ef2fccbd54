"""Calibration files: efficiencies that were measured, in place of the typical ones.

    efficiency: {matmul: 0.52, link: 0.71}       any field of `Efficiency`
    gpu: {flops: 3.1e+14}                        any field of `Gpu`, for machines whose datasheet is not known
    source: rlhf-dist profile on ..., 2026-11-21

`rlhf-dist profile` writes one; a run refines one from what it measured (`refined`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from rlhf_dist.hardware import Cluster, Gpu
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.planner.work import NodeWork
from rlhf_dist.typed import ConfigError, build, unknown

SHARES = ("matmul", "hbm_weights", "hbm_kv", "link", "network", "overlap", "host_link", "fragmentation")
DIVISORS = (
    "hbm_weights", "hbm_kv", "link", "network", "host_link", "cpu_adam_bytes_per_s", "host_tokens_per_s",
    "load_bytes_per_s",
    "train_scale", "infer_scale", "generate_scale", "reshard_scale",
)  # fmt: skip
"""What cannot be 0: something would take forever, or no time."""
SCALES = {"train": "train_scale", "infer": "infer_scale", "generate": "generate_scale", "reshard": "reshard_scale"}
"""Phase of a node -> the field of `Efficiency` that its measured seconds refine."""


def load_calibration(path: str | Path | None, usual: Efficiency | None = None) -> tuple[Efficiency, dict[str, float]]:
    """Efficiencies, and measured fields of the GPU; what the file does not say is as in `usual` (None: typical).

    Raises ConfigError for a file that cannot be read, an unknown field, and a number that cannot be.
    """
    usual = usual or Efficiency()
    if path is None:
        return usual, {}
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"calibration: no file {str(path)!r} (looked for {file.resolve()}); rlhf-dist profile makes one"
        )
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"calibration: {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"calibration: {file} must be a mapping with efficiency and gpu, got {content!r}")
    for key in content:
        if key not in ("efficiency", "gpu", "source"):
            raise ConfigError(f"calibration: {file}: {unknown(str(key), ('efficiency', 'gpu', 'source'), 'key')}")
    given = _numbers(content.get("efficiency") or {}, f"{file}: efficiency")
    everything = {item.name: getattr(usual, item.name) for item in fields(Efficiency)}
    efficiency: Efficiency = build(Efficiency, {**everything, **given}, f"{file}: efficiency")
    for item in fields(Efficiency):
        value = getattr(efficiency, item.name)
        least_ok = value > 0 if item.name in DIVISORS else value >= 0
        if not least_ok or (item.name in SHARES and value > 1):
            what = "between 0 and 1" if item.name in SHARES else "above 0" if item.name in DIVISORS else "at least 0"
            raise ConfigError(f"{file}: efficiency.{item.name} must be {what}, got {value:g}")
    measured = _numbers(content.get("gpu") or {}, f"{file}: gpu")
    known = {item.name for item in fields(Gpu)} - {"name"}
    for name, value in measured.items():
        if name not in known:
            raise ConfigError(f"{file}: gpu: {unknown(name, known, 'field')}")
        if not value > 0:
            raise ConfigError(f"{file}: gpu.{name} must be above 0, got {value:g}")
    return efficiency, measured


def apply_gpu(cluster: Cluster, measured: Mapping[str, float]) -> Cluster:
    """The cluster with measured numbers in place of the datasheet's."""
    if not measured:
        return cluster
    network = measured.get("network_bytes_per_s")
    values: dict[str, Any] = dict(measured)
    gpu = replace(cluster.gpu, **values)
    if network is None:
        return replace(cluster, gpu=gpu)
    return replace(cluster, gpu=gpu, network_bytes_per_s=network * cluster.gpus_per_node / 8)


def refined(
    efficiency: Efficiency, nodes: tuple[NodeWork, ...], predicted: Mapping[str, float], measured: Mapping[str, float]
) -> Efficiency:
    """Efficiencies after a run: the scale of each phase times the median of measured / predicted over its nodes."""
    changes: dict[str, float] = {}
    for phase, name in SCALES.items():
        ratios = [
            measured[work.name] / predicted[work.name]
            for work in nodes
            if work.phase == phase and measured.get(work.name, 0) > 0 and predicted.get(work.name, 0) > 0
        ]
        if ratios:
            changes[name] = getattr(efficiency, name) * median(ratios)
    return replace(efficiency, **changes)


def calibration_text(
    efficiency: Efficiency, source: str, gpu: Mapping[str, float] | None = None, usual: Efficiency | None = None
) -> str:
    """A calibration file: what differs from the usual efficiencies."""
    usual = usual or Efficiency()
    changed = {
        item.name: float(f"{getattr(efficiency, item.name):.6g}")
        for item in fields(Efficiency)
        if getattr(efficiency, item.name) != getattr(usual, item.name)
    }
    content: dict[str, Any] = {"source": source, "efficiency": changed}
    if gpu:
        content["gpu"] = {name: float(f"{value:.6g}") for name, value in gpu.items()}
    return str(yaml.safe_dump(content, sort_keys=False))


def _numbers(given: Any, key: str) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key} must be a mapping of numbers, got {given!r}")
    found: dict[str, float] = {}
    for name, value in given.items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}.{name} must be a number, got {value!r}") from error
    return found
