"""Which variables of the controller's environment reach its workers, on whatever node: those of libraries they load.

A cluster's processes inherit the environment of `ray start` on their node, not that of the run. What a user exports
before a run is meant for the run; what says where one process runs, and what is secret, stays here.
"""

from __future__ import annotations

from rlhf_dist.secret_settings import is_secret

SENT = (
    "CUDA_",
    "DS_",
    "FI_",
    "GLOO_",
    "GOMP_",
    "HF_",
    "KMP_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "RLHF_DIST_",
    "SAFETENSORS_",
    "TOKENIZERS_",
    "TORCH",
    "TRANSFORMERS_",
    "TRITON_",
    "UCX_",
    "VLLM_",
)
"""Starts of names: collectives and their transports, devices, threads, compilers and their caches, model libraries."""
OF_ONE_PROCESS = frozenset({"CUDA_VISIBLE_DEVICES", "VLLM_HOST_IP"})
"""Another on every node, and Ray's or the worker's to set."""


def is_sent(name: str) -> bool:
    """Whether workers get this variable. They need no secret: models and data are fetched before they start."""
    return name.startswith(SENT) and name not in OF_ONE_PROCESS and not is_secret(name)
