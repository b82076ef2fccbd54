"""How much of the datasheet's numbers software reaches, and what it costs beside them: one place, named, with sources.

All of it is measured of public software on the hardware, part by part (ADR 044); no factor is fitted to the seconds of
a whole step. A calibration file (`rlhf-dist profile`, or what a run left behind) overrides any: see `calibration.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares are of a datasheet number, 0 to 1."""

    matmul: float = 0.0
    """Share of FLOP/s that a layer's matrix multiplications reach; 0: the GPU kind's own (`hardware.py`)."""
    matmul_half_tokens: float = 256.0
    """Tokens in a forward pass at which matmuls reach half of that: small batches leave matrix units idle."""
    experts_half_width: float = 6144.0
    """Width of an expert at which its matmuls reach half of a dense layer's rate: tokens are permuted, matrices are
    small, loads uneven. Megatron-Core's public recipes on H100 in bf16 reach 24 % of peak for Qwen3-30B-A3B (768 wide),
    31 % for Qwen3-235B-A22B (1,536), where dense models reach 45-50 %; RL runs reach a quarter of that."""
    hbm_weights: float = 0.80
    """Share of memory bandwidth when decoding reads weights; GEMV kernels and STREAM reach 80-90 %."""
    hbm_kv: float = 0.65
    """Share of memory bandwidth when paged attention reads keys and values (Kwon et al. 2023: gather by block)."""
    link: float = 0.75
    """Share of link bandwidth of large collectives in a node: nccl-tests reach 230 of 300 GB/s on A100."""
    network: float = 0.90
    """Share of network bandwidth of collectives between nodes: nccl-tests reach 22-23 of 25 GB/s from hundreds of
    megabytes on, which is what a layer of a 7B model and larger is."""
    overlap: float = 0.95
    """Share of a pass that its collectives can hide behind: the first and last bucket have nothing to hide behind."""
    host_link: float = 0.80
    """Share of PCIe bandwidth of large pinned copies."""
    cpu_adam_bytes_per_s: float = 100e9
    """Memory traffic of an optimizer that runs on a node's CPUs (DeepSpeedCPUAdam on two sockets, STREAM)."""
    decode_step_s: float = 3e-3
    """Host time of a decode step however small: scheduling, launching CUDA graphs."""
    decode_layer_s: float = 2e-5
    """Of a layer in a decode step, on every rank: norms, rotary embedding, cache writes and activation are about ten
    kernels that move next to nothing and take 2 us each in a CUDA graph."""
    decode_sequence_s: float = 4e-5
    """Host time of a decode step for each running sequence: block tables, sampling, detokenising. The vLLM project
    reported in 2024 that 62 % of an 8B decode step on an H100 was such work (blog, 2024-09-05)."""
    load_bytes_per_s: float = 4e9
    """Rate at which a generation engine takes in new weights, per GPU: a Python loop over tensors, each found by name,
    cut and copied. NeMo-RL's published refits (2025, H100): 16 GB a GPU in 5 s (8B), 16 GB in 7 s (32B on 4), 30 GB in
    12 s (30B-A3B on 2), 35 GB in 14 s (70B on 4)."""
    call_s: float = 0.05
    """Start and end of one operation on a worker group; Ray calls take milliseconds, kernels must warm up."""
    host_tokens_per_s: float = 50e6
    """Tokens a host op (advantages, whitening) works through."""
    fragmentation: float = 0.05
    """Share of memory lost to the allocator's fragments."""
    context_bytes: float = 3.0 * (1 << 30)
    """CUDA context, NCCL buffers, and workspaces of kernels."""
    graphs_bytes: float = 1.0 * (1 << 30)
    """CUDA graphs of the generation engine (vLLM reports 0.5-2 GiB for a full set of batch sizes)."""
    train_scale: float = 1.0
    """Seconds of training nodes over what the model says; a run measures it. 1: as modelled."""
    infer_scale: float = 1.0
    """The same of inference nodes."""
    generate_scale: float = 1.0
    """The same of generation."""
    reshard_scale: float = 1.0
    """The same of weight syncs."""
