"""Steps whose reference has a pool of its own, with and without `placement.pieces`.

    make bench-pieces ARGS="--steps 8"
    make bench-pieces ARGS="--plain"

Each step plays 32 episodes, one of which waits for its tool longer than the reference takes for all rows; `--plain`:
it draws 384 responses, of which the engine has room for 128 at one time. With one piece the reference waits for the
last of them; with four it has done what was finished before. The two runs take turns, so that what else the machine
does falls on both; the first step of each, with its first calls, does not count. One JSON line last: medians, least
and largest, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller import launch
from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Chat, Environment, Row
from rlhf_dist.roles import Actor, Prompts, Reference
from rlhf_dist.testing.tiny_model import save_llama
from rlhf_dist.transforms import grpo_advantage

ROWS, COPIES, SAID, PIECES = 16, 2, 400, 4
"""Prompts of a step, episodes of each, tokens that the environment says in one, and the pieces that are compared."""
PLAIN_TOKENS = 64
"""Most of a plain response."""


class Straggling(Environment):
    """Two short turns around a long text; the first prompt's tool takes a while."""

    rewards = True

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        reply = await chat.generate(max_tokens=4)
        chat.reward(float(len(set(reply.text))))
        if row.answer == "0":
            await chat.run(time.sleep, self.seconds)
        chat.say("1" * SAID)
        await chat.generate(max_tokens=4)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the recipe."""

    seconds: float = 4.0
    """Of the slow tool."""


@recipe
def straggling(prompts: Prompts, actor: Actor, reference: Reference, cfg: Settings) -> None:
    """GRPO with a reference."""
    batch = reference.compute_ref_log_prob(actor.run_episodes(prompts, environment=Straggling(cfg.seconds), n=COPIES))
    actor.update_actor(grpo_advantage(actor.compute_log_prob(batch), kl_coef=0.1), loss=ppo_clip(0.2))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="of each of four runs")
    parser.add_argument("--seconds", type=float, default=4.0, help="of the slow tool")
    parser.add_argument("--plain", action="store_true", help="GRPO on plain responses, more than there is room for")
    arguments = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], PIECES: []}
    reference: dict[int, list[float]] = {1: [], PIECES: []}
    told: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-pieces-") as scratch:
        folder = Path(scratch)
        save_llama(folder / "actor", hidden=32)
        save_llama(folder / "reference", hidden=256, layers=6)
        rows = [{"prompt": f"{row}+0=", "answer": str(row)} for row in range(ROWS)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for pieces in (1, PIECES, PIECES, 1):
            lines = _run(folder, pieces, arguments)
            drawn = {"actor/response_tokens", "actor/reward", "reward/reward"} & set(lines[0])
            told.setdefault(pieces, {name: lines[0][name] for name in drawn})
            seconds[pieces] += [line["step_s"] for line in lines[1:]]
            reference[pieces] += [line["time_s/reference.compute_ref_log_prob"] for line in lines[1:]]
    assert told[1] == told[PIECES], "the same is drawn, whatever is handed over"
    found: dict[str, Any] = {f"pieces_{count}": _spread(values) for count, values in seconds.items()}
    found["reference_s"] = {str(count): round(statistics.median(values), 2) for count, values in reference.items()}
    found["ratio"] = round(found["pieces_1"]["median_s"] / found[f"pieces_{PIECES}"]["median_s"], 3)
    what = {"plain": True} if arguments.plain else {"tool_s": arguments.seconds}
    print(json.dumps({**what, **found}))


def _run(folder: Path, pieces: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {
        **{"task": "none", "model.dtype": "float32", "name": f"pieces{pieces}", "steps": arguments.steps},
        **{"actor.model.path": folder / "actor", "reference.model.path": folder / "reference"},
        **{"data.train.path": folder / "rows.jsonl", "data.prompts_per_step": ROWS, "data.max_response_tokens": 480},
        **{"actor.rollout.engine": "transformers", "actor.rollout.max_prompt_tokens": 16},
        **{"actor.rollout.max_response_tokens": 480},
        **{"placement.pieces": pieces},
        **{"placement.pools.main.slots": 1, "placement.pools.models.slots": 1, "placement.roles.Reference": "models"},
        **{"output.root": folder / "runs", "resume": "overwrite", "output.tracker": "none"},
        **{"output.checkpoint_every": None, "output.save_model": False, "output.rollouts_every": 0},
    }
    if arguments.plain:
        settings |= {"algorithm.samples_per_prompt": 24, "algorithm.kl_coef": 0.1, "data.heldout": None}
        settings |= {"actor.rollout.max_response_tokens": PLAIN_TOKENS, "data.max_response_tokens": PLAIN_TOKENS}
        settings["reward.function"] = "rlhf_dist.rewards:exact_match"
    else:
        settings["algorithm.seconds"] = arguments.seconds
    lines = launch("grpo" if arguments.plain else straggling, settings=settings, quiet=True).metrics
    return [line for line in lines if line.get("kind") != "evaluation"]


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median_s": round(statistics.median(values), 2),
        "least_s": round(min(values), 2),
        "largest_s": round(max(values), 2),
    }


if __name__ == "__main__":
    main()
