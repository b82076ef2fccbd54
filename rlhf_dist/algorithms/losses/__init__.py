"""Losses: frozen dataclasses of numbers that travel to the workers (see ../contract.py)."""

from rlhf_dist.algorithms.losses.bradley_terry import BradleyTerry, bradley_terry
from rlhf_dist.algorithms.losses.dpo import Dpo, Ipo, SimPo, dpo, ipo, simpo
from rlhf_dist.algorithms.losses.nll import Nll, nll
from rlhf_dist.algorithms.losses.policy_gradient import PolicyGradient, policy_gradient
from rlhf_dist.algorithms.losses.ppo_clip import PpoClip, ppo_clip
from rlhf_dist.algorithms.losses.value_clip import ValueClip, value_clip

__all__ = [
    "BradleyTerry",
    "Dpo",
    "Ipo",
    "Nll",
    "PolicyGradient",
    "PpoClip",
    "SimPo",
    "ValueClip",
    "bradley_terry",
    "dpo",
    "ipo",
    "nll",
    "policy_gradient",
    "ppo_clip",
    "simpo",
    "value_clip",
]
