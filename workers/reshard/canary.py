"""A canary after a weight sync: what the generation engine says of some tokens, against what the trainer says.

Checksums prove that the right bits are in the right places; this proves that the model which runs on them is the
one that was trained: kernels, tied weights, positions. Greedy responses to one fixed prompt, log-probs compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import RolloutConfig
from rlhf_dist.failure import FailureKind
from rlhf_dist.sampling import Sampling
from workers.engines.generation.interface import GenerationEngine
from workers.engines.training.interface import TrainingEngine

_TOKENS = 8
"""Of the prompt and of the response, at most."""


class CanaryDied(RuntimeError):
    """The generation engine's log-probs are not the trainer's, though every checksum matched; raised on all ranks."""

    failure_kind = FailureKind.NUMERICS


def send_canary(
    engine: TrainingEngine | None,
    rollout: GenerationEngine | None,
    config: RolloutConfig,
    gather: Callable[[Any], list[Any]],
) -> float:
    """Largest |difference| of log-probs found; every rank calls it, `gather` gives each rank's value to all, as JSON.

    Raises CanaryDied above `config.canary_tolerance`; engines that generate then refuse to.
    """
    prompt = np.arange(min(_TOKENS, config.max_prompt_tokens), dtype=np.int32)
    sampling = Sampling(
        n=1, greedy=True, temperature=config.temperature, max_tokens=min(_TOKENS, config.max_response_tokens)
    )
    drawn = None
    if rollout is not None:
        [response] = rollout.generate([prompt], sampling, [0])
        drawn = (response.token_ids.tolist(), response.log_probs.tolist())
    told = [(tuple(one[0]), np.array(one[1])) for one in gather(drawn) if one is not None]
    rows = sorted({tokens for tokens, _ in told})
    worst = 0.0
    if engine is not None:
        batch = Batch(
            {
                "prompt_ids": Column.ragged([prompt] * len(rows), dtype=np.int32),
                "response_ids": Column.ragged([np.array(tokens) for tokens in rows], dtype=np.int32),
            },
            len(rows),
        )
        column = engine.forward(batch, ["log_probs"], config.temperature)["log_probs"]
        trained = {tokens: column.row(k) for k, tokens in enumerate(rows)}
        worst = float(np.max([np.abs(trained[tokens] - log_probs).max() for tokens, log_probs in told]))
    found = float(np.max(gather(worst)))  # a NaN stays one
    if not found <= config.canary_tolerance:
        reason = (
            f"log-probs of the canary's tokens must be the trainer's within {config.canary_tolerance:g} "
            f"(rollout.canary_tolerance), got a difference of {found:.3g}; the weights arrived bit by bit, so look at "
            "the two models' kernels, dtypes and settings"
        )
        if rollout is not None:
            rollout.refuse(reason)
        raise CanaryDied(reason)
    return found
