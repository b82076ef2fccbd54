"""Losses, a function each, whose settings travel to the workers (see ../loss.py and ../contract.py)."""

from rlhf_dist.algorithms.losses.bradley_terry import bradley_terry
from rlhf_dist.algorithms.losses.distill import distill, distill_top_k
from rlhf_dist.algorithms.losses.dpo import dpo, ipo, simpo
from rlhf_dist.algorithms.losses.nll import nll
from rlhf_dist.algorithms.losses.policy_gradient import policy_gradient
from rlhf_dist.algorithms.losses.ppo_clip import ppo_clip
from rlhf_dist.algorithms.losses.value_clip import value_clip

__all__ = [
    "bradley_terry",
    "distill",
    "distill_top_k",
    "dpo",
    "ipo",
    "nll",
    "policy_gradient",
    "ppo_clip",
    "simpo",
    "value_clip",
]
