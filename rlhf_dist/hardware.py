"""Accelerators and clusters: datasheet numbers only, each with its unit and source.

    16x8xA100-80G            16 nodes of 8 GPUs
    8xH100                   one node
    4x8xA100-80G@1600Gbps    another network: bits per second of one node, one direction

Efficiencies (how much of a datasheet number is reached) are not here but in `efficiency.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any

from rlhf_dist.typed import ConfigError, build, unknown

GIB = float(1 << 30)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of accelerator. Rates are per second; link rates are of one direction."""

    name: str
    """What the cluster notation calls it."""
    memory_bytes: float
    """High-bandwidth memory."""
    flops: float
    """Dense bf16 FLOP/s of the matrix units."""
    hbm_bytes_per_s: float
    """Memory bandwidth."""
    link_bytes_per_s: float
    """To the other GPUs of its node (NVLink, Infinity Fabric or PCIe)."""
    link_latency_s: float = 12e-6
    """Start of one collective within a node; nccl-tests all_reduce of 8 bytes takes about 10-20 us."""
    host_bytes_per_s: float = 25e9
    """To the host's memory over PCIe: 80 % of a Gen4 x16 link (31.5 GB/s); Gen5 has twice as much."""
    network_bytes_per_s: float = 400e9
    """All network cards of a node of 8 such GPUs together."""
    host_memory_bytes: float = 128 * GIB
    """Of the host, for each GPU: DGX A100 and p4de have 1 TB and more for eight."""
    matmul_efficiency: float = 0.40
    """Share of `flops` that the matrix multiplications of a transformer layer reach (see docs/planner.md)."""


KINDS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 datasheet (2021): 312 TFLOP/s bf16 dense, 2,039 GB/s (80 GB SXM), NVLink 600 GB/s both ways. The
        # network is that of the paper's testbed: 200 Gbit/s between machines (HybridFlow, section 8.1).
        Gpu(
            name="A100-80G",
            memory_bytes=80 * GIB,
            flops=312e12,
            hbm_bytes_per_s=2.039e12,
            link_bytes_per_s=300e9,
            network_bytes_per_s=25e9,
            matmul_efficiency=0.48,
        ),
        Gpu(
            name="A100-40G",
            memory_bytes=40 * GIB,
            flops=312e12,
            hbm_bytes_per_s=1.555e12,
            link_bytes_per_s=300e9,
            network_bytes_per_s=25e9,
            matmul_efficiency=0.48,
        ),
        # NVIDIA H100 SXM datasheet: 989 TFLOP/s bf16 dense, 3.35 TB/s, NVLink 900 GB/s both ways; the DGX H100 has
        # 8 x 400 Gbit/s.
        Gpu(
            name="H100",
            memory_bytes=80 * GIB,
            flops=989e12,
            hbm_bytes_per_s=3.35e12,
            link_bytes_per_s=450e9,
            host_bytes_per_s=50e9,
        ),
        # NVIDIA H200 datasheet: as H100, with 141 GB at 4.8 TB/s.
        Gpu(
            name="H200",
            memory_bytes=141e9,
            flops=989e12,
            hbm_bytes_per_s=4.8e12,
            link_bytes_per_s=450e9,
            host_bytes_per_s=50e9,
        ),
        # NVIDIA DGX B200 datasheet: 36 PFLOP/s bf16 sparse over 8 GPUs = 2.25 PFLOP/s dense, 180 GB at 8 TB/s, NVLink
        # 1.8 TB/s both ways.
        Gpu(
            name="B200",
            memory_bytes=180e9,
            flops=2250e12,
            hbm_bytes_per_s=8e12,
            link_bytes_per_s=900e9,
            host_bytes_per_s=50e9,
            matmul_efficiency=0.35,
        ),
        # NVIDIA L40S datasheet: 362 TFLOP/s bf16 dense, 48 GB GDDR6 at 864 GB/s, PCIe Gen4 x16 and no NVLink.
        Gpu(
            name="L40S",
            memory_bytes=48e9,
            flops=362e12,
            hbm_bytes_per_s=864e9,
            link_bytes_per_s=25e9,
            link_latency_s=20e-6,
            network_bytes_per_s=50e9,
        ),
        # AMD MI300X datasheet: 1,307 TFLOP/s bf16 dense, 192 GB at 5.3 TB/s, Infinity Fabric 896 GB/s both ways over 7
        # links.
        Gpu(
            name="MI300X",
            memory_bytes=192e9,
            flops=1307e12,
            hbm_bytes_per_s=5.3e12,
            link_bytes_per_s=448e9,
            host_bytes_per_s=50e9,
            matmul_efficiency=0.28,
        ),
    )
}
ALIASES = {
    "A100": "A100-80G",
    "A100-80GB": "A100-80G",
    "A100-40GB": "A100-40G",
    "H100-80G": "H100",
    "H100-80GB": "H100",
}
NETWORK_LATENCY_S = 20e-6
"""Start of one collective step between nodes (InfiniBand or RoCE with GPUDirect, nccl-tests)."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network_bytes_per_s: float
    """Of one node, one direction, all its network cards together."""
    network_latency_s: float = NETWORK_LATENCY_S

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def text(self) -> str:
        """The cluster in its own notation."""
        usual = self.gpu.network_bytes_per_s * self.gpus_per_node / 8
        network = "" if self.network_bytes_per_s == usual else f"@{self.network_bytes_per_s * 8 / 1e9:g}Gbps"
        return f"{self.nodes}x{self.gpus_per_node}x{self.gpu.name}{network}"

    def resized(self, nodes: int) -> Cluster:
        """The same cluster with another number of nodes."""
        return replace(self, nodes=nodes)


NOTATION = re.compile(
    r"(?:(?P<nodes>\d+)x)?(?P<gpus>\d+)x(?P<kind>[A-Za-z][\w-]*?)(?:@(?P<network>\d+(?:\.\d+)?)Gbps)?"
)


def parse_cluster(value: Any, kinds: Mapping[str, Any] | None = None, key: str = "cluster") -> Cluster:
    """A cluster from its notation, or from a mapping {nodes, gpus_per_node, gpu, network_gbps}.

    kinds: GPU kinds of the user's own, name -> fields of `Gpu` (`base` names a kind to start from).
    Raises ConfigError for a malformed cluster or an unknown kind.
    """
    known = {**KINDS, **{name: _own_kind(name, given) for name, given in (kinds or {}).items()}}
    if isinstance(value, Mapping):
        return _from_mapping(value, known, key)
    match = NOTATION.fullmatch(str(value).strip())
    if match is None:
        raise ConfigError(
            f"{key} must be NODESxGPUSxKIND, such as 16x8xA100-80G or 8xH100 (with @400Gbps for another network), "
            f"got {value!r}"
        )
    nodes, gpus = int(match["nodes"] or 1), int(match["gpus"])
    network = float(match["network"]) if match["network"] else None
    return _cluster(nodes, gpus, _kind(match["kind"], known, key), network, key)


def _cluster(nodes: int, gpus: int, gpu: Gpu, network_gbps: float | None, key: str) -> Cluster:
    if nodes < 1 or gpus < 1:
        raise ConfigError(f"{key} needs at least one node and one GPU on it, got {nodes}x{gpus}")
    if network_gbps is not None and not 0 < network_gbps < inf:
        raise ConfigError(f"{key}: the network must be above 0 Gbps, got {network_gbps:g}")
    network = gpu.network_bytes_per_s * gpus / 8 if network_gbps is None else network_gbps * 1e9 / 8
    return Cluster(nodes=nodes, gpus_per_node=gpus, gpu=gpu, network_bytes_per_s=network)


def _from_mapping(value: Mapping[str, Any], known: Mapping[str, Gpu], key: str) -> Cluster:
    allowed = ("nodes", "gpus_per_node", "gpu", "network_gbps")
    for name in value:
        if name not in allowed:
            raise ConfigError(f"{key}: {unknown(str(name), allowed, 'key')}")
    gpu = value.get("gpu")
    if gpu is None:
        raise ConfigError(f"{key}.gpu has no value and needs one; set it to one of {', '.join(known)}")
    kind = _own_kind(str(gpu.get("name", "own")), gpu) if isinstance(gpu, Mapping) else _kind(str(gpu), known, key)
    numbers = {name: value.get(name, default) for name, default in (("nodes", 1), ("gpus_per_node", 8))}
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise ConfigError(f"{key}.{name} must be a whole number, got {number!r}")
    network = value.get("network_gbps")
    if network is not None and not isinstance(network, (int, float)):
        raise ConfigError(f"{key}.network_gbps must be a number, got {network!r}")
    return _cluster(numbers["nodes"], numbers["gpus_per_node"], kind, network, key)


def _kind(name: str, known: Mapping[str, Gpu], key: str) -> Gpu:
    folded = {other.upper(): other for other in (*known, *ALIASES)}
    found = folded.get(name.upper(), name)
    found = ALIASES.get(found, found)
    if found not in known:
        raise ConfigError(
            f"{key}: unknown GPU kind {name!r}; there is {', '.join(known)}; "
            f"describe one of your own under `gpus` in a case file"
        )
    return known[found]


def _own_kind(name: str, given: Any) -> Gpu:
    key = f"gpus.{name}"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key} must be a mapping with {', '.join(item.name for item in fields(Gpu))}, got {given!r}")
    values = {str(field): value for field, value in given.items() if field not in ("base", "name")}
    # YAML reads 1e12 as text; numbers written that way are meant as numbers.
    values = {field: _number(value, f"{key}.{field}") for field, value in values.items()}
    if "base" in given:
        base = _kind(str(given["base"]), KINDS, f"{key}.base")
        plain = {item.name: getattr(base, item.name) for item in fields(Gpu)}
        values = {**plain, **values}
    gpu: Gpu = build(Gpu, {**values, "name": name}, key)
    for item in fields(Gpu):
        value = getattr(gpu, item.name)
        if item.name != "name" and not 0 < value < inf:
            raise ConfigError(f"{key}.{item.name} must be above 0, got {value:g}")
    return gpu


def _number(value: Any, key: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} must be a number, got {value!r}") from error
