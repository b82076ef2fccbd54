"""Algorithms: losses, advantages, KL, shaping and multipliers, as plain math. Nothing here imports torch.

A recipe names losses: `from rlhf_dist.algorithms import ppo_clip, value_clip`. The advantage formulas are
numpy functions in `advantages/`; recipes use them through `rlhf_dist.transforms`.
"""

from rlhf_dist.algorithms.contract import Average, Loss, ModelOutput, Rows
from rlhf_dist.algorithms.kl import KlEstimator, adapted_kl_coef
from rlhf_dist.algorithms.lagrange import combined_advantages, updated_log_multiplier
from rlhf_dist.algorithms.loss import FunctionLoss, loss
from rlhf_dist.algorithms.losses import (
    bradley_terry,
    distill,
    distill_top_k,
    dpo,
    ipo,
    nll,
    policy_gradient,
    ppo_clip,
    simpo,
    value_clip,
)
from rlhf_dist.algorithms.outputs import Head, Output, OverVocabulary

__all__ = [
    "Average",
    "FunctionLoss",
    "Head",
    "KlEstimator",
    "Loss",
    "ModelOutput",
    "Output",
    "OverVocabulary",
    "Rows",
    "adapted_kl_coef",
    "bradley_terry",
    "combined_advantages",
    "distill",
    "distill_top_k",
    "dpo",
    "ipo",
    "loss",
    "nll",
    "policy_gradient",
    "ppo_clip",
    "simpo",
    "updated_log_multiplier",
    "value_clip",
]
