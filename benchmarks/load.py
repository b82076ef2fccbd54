"""`make bench-load`: memory that a rank takes to start each engine, beside what its process had.

Two gloo ranks (a GPU each where there are two), a Llama of 42M parameters stored in bfloat16 and computed in float32.
`shard_bytes` is a rank's part of the weights, `held_bytes` its private memory in the end (DeepSpeed makes gradients
and moments at the start), `peak_extra_bytes` the most on the way, of the rank that took most; `within_bound` says
whether that is under two shards and the largest tensor; `whole` is the library's own loading. Each engine starts twice,
first on a tiny model: what imports and first buffers take is not the model's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_dist.config import LoraConfig
from tests.engines.loading import WIDE, Peak, peak_of_building
from tests.engines.world import World

WAYS: dict[str, dict[str, Any]] = {
    "fsdp_frozen": {"engine": {}},
    "fsdp": {"engine": {}, "trained": True},
    "fsdp_random": {"engine": {"init": "random"}, "trained": True},
    "fsdp_lora": {"engine": {"lora": LoraConfig(rank=16)}, "trained": True},
    "fsdp_tensor_parallel": {"engine": {"tensor_parallel": 2}, "trained": True},
    "fsdp_replicas": {"engine": {"replicas": 2}, "trained": True},
    "zero1_frozen": {"engine": {"name": "deepspeed", "zero_stage": 1}},
    "zero1": {"engine": {"name": "deepspeed", "zero_stage": 1}, "trained": True},
    "zero2": {"engine": {"name": "deepspeed", "zero_stage": 2}, "trained": True},
    "zero3_frozen": {"engine": {"name": "deepspeed", "zero_stage": 3}},
    "zero3": {"engine": {"name": "deepspeed", "zero_stage": 3}, "trained": True},
    "whole": {"engine": {}, "trained": True, "whole": True},
}


def main() -> None:
    """Print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", default=list(WAYS), help=f"which of {', '.join(WAYS)}")
    chosen = parser.parse_args().engines
    if unknown := set(chosen) - set(WAYS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    found = {}
    with tempfile.TemporaryDirectory() as root:
        tiny = _model(Path(root) / "tiny", {**WIDE, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512})
        wide = _model(Path(root) / "wide", WIDE)
        for name in chosen:
            world = World(2, device)
            try:
                world.run(_start, tiny, WAYS[name], device)
                found[name] = _record(world.run(_start, wide, WAYS[name], device))
            finally:
                world.close()
            print(f"{name:22} {json.dumps(found[name])}", flush=True)
    print(json.dumps({"ranks": 2, "device": device, "parameters": 42_000_000, "engines": found}))


def _start(folder: Path, way: dict[str, Any], device: str) -> Peak:
    return peak_of_building(folder, way["engine"], way.get("trained", False), way.get("whole", False), device)


def _record(ranks: list[Peak]) -> dict[str, Any]:
    most = max(ranks, key=lambda peak: peak.peak_extra_bytes)
    return {
        "shard_bytes": most.shard_bytes,
        "held_bytes": most.held_bytes,
        "largest_tensor_bytes": most.largest_tensor_bytes,
        "peak_extra_bytes": {"host": most.peak_extra_bytes, "device": most.peak_extra_device_bytes},
        "within_bound": all(peak.peak_extra_bytes <= peak.bound for peak in ranks),
    }


def _model(folder: Path, sizes: dict[str, int]) -> Path:
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="30MB")
    return folder


if __name__ == "__main__":
    main()
