"""Token data never passes through the controller: its bytes do not grow with tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from controller.record.traffic import ControllerTraffic


def test_bytes_through_the_controller_do_not_grow_with_tokens(launch_warm: Callable[..., dict[str, Any]]) -> None:
    reward = f"{Path(__file__).parent}/digit_reward.py:digits"
    bytes_of = {}
    for tokens in (8, 8, 256):  # the first starts the processes
        with ControllerTraffic() as traffic:
            summary = launch_warm(
                "grpo",
                "actor.rollout.engine=transformers",
                f"reward.function={reward}",
                f"actor.rollout.max_response_tokens={tokens}",
                "algorithm.samples_per_prompt=16",
                "algorithm.mini_batches=2",
                "output.rollouts_every=0",
                "steps=1",
            )
        bytes_of[tokens] = traffic.sent + traffic.received
        assert summary["last"]["actor/response_tokens"] > 0.2 * tokens
    assert traffic.sent > 0 and traffic.received > 0
    # 64 rows of up to 256 tokens are far more than this in token ids and log-probs alone.
    # The rule is called once or twice, as the two ranks finish together or apart: some 2 kB.
    assert abs(bytes_of[256] - bytes_of[8]) < 0.1 * bytes_of[8], bytes_of
