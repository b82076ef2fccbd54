"""Learning-rate schedules as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from rlhf_dist.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """The learning rate of optimizer step `step` (0 is the first).

    Warm-up rises linearly from 0 and reaches `lr` with its last step, so that no step is spent at 0;
    the decay then reaches `min_lr_ratio * lr` at `total_steps` and stays there.
    Raises ValueError for an unknown schedule or a decay that ends before it starts.
    """
    if config.schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule must be constant, linear or cosine, got {config.schedule!r}")
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = config.total_steps - config.warmup_steps
    if span <= 0:
        raise ValueError(
            f"a {config.schedule} schedule needs total_steps > warmup_steps ({config.warmup_steps}), "
            f"got {config.total_steps}; set total_steps to the number of optimizer steps"
        )
    progress = min((step - config.warmup_steps) / span, 1.0)
    share = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
