"""Does a policy learn to use a calculator? From a model that seldom calls it, accuracy before and after GRPO, by seed.

    1. SFT   a tiny random Llama (a token a character) on sums of two numbers: `share` of the answers by a call of the
             calculator, the others at once and mostly wrong, since it is too small to add
    2. GRPO  over episodes (recipe tool_grpo): 1 for the right answer, nothing for a call

    python -m benchmarks.calculator_tool --seeds 0 1 2

One line of JSON a seed: accuracy and calls an episode, over the first and the last steps of GRPO. Everything
in one process on its CPU. Not shown so far: the one run that ended (seed 0, 150 steps of SFT, 15 of GRPO) went from
0.030 to 0.022.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from controller.lifecycle.api import launch
from rlhf_dist.testing.tiny_model import save_llama

CALL_TOKENS = 7
"""Of `:12+34=`, which is a call; a turn has no more, so that the calculator's answer follows."""
SHOWN = 5
"""Steps that an accuracy is the mean of."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sft-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--share", type=float, default=0.2, help="of the SFT answers that are by a call")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory(prefix="calculator_") as scratch:
            print(json.dumps(measure(Path(scratch), seed, arguments)), flush=True)


def measure(folder: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy before and after, of one seed."""
    started = time.monotonic()
    write_sums(folder, seed, arguments.share)
    common = {
        **{"task": "none", "model.dtype": "float32", "seed": seed, "resume": "overwrite"},
        **{"output.root": folder / "runs", "output.tracker": "none", "output.rollouts_every": 0},
    }
    sft: dict[str, Any] = {
        **common,
        **{"model.path": save_llama(folder / "start", seed=seed, hidden=64), "name": "sft"},
        **{"data.train.path": folder / "examples.jsonl", "data.prompts_per_step": 64},
        **{"actor.optimizer.lr": 3e-3, "steps": arguments.sft_steps, "output.checkpoint_every": None},
    }
    taught = launch("sft", settings=sft, quiet=True, local=True)
    sft_s = time.monotonic() - started
    grpo: dict[str, Any] = {
        **common,
        **{"model.path": taught.models["actor"], "name": "grpo", "steps": arguments.steps},
        **{"data.train.path": folder / "sums.jsonl", "data.prompts_per_step": 16},
        **{"algorithm.plain": True, "algorithm.begin": ":", "algorithm.end": "=", "algorithm.forgiving": False},
        **{"algorithm.turn_tokens": CALL_TOKENS, "algorithm.turns": 3, "algorithm.samples_per_prompt": 8},
        **{"actor.optimizer.lr": 1e-3, "actor.rollout.engine": "transformers"},
        **{"actor.rollout.max_prompt_tokens": 16, "actor.rollout.max_response_tokens": 24},
        **{"output.checkpoint_every": None, "output.save_model": False},
    }
    steps = launch("tool_grpo", settings=grpo, quiet=True, local=True).metrics
    return {
        "seed": seed,
        **{f"accuracy_{when}": _mean(part, "actor/reward") for when, part in _ends(steps)},
        **{f"turns_{when}": _mean(part, "actor/turns") for when, part in _ends(steps)},
        "sft_s": round(sft_s),
        "grpo_s": round(time.monotonic() - started - sft_s),
    }


def _ends(steps: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [("before", steps[:SHOWN]), ("after", steps[-SHOWN:])]


def _mean(steps: list[dict[str, Any]], name: str) -> float:
    return round(sum(float(step[name]) for step in steps) / len(steps), 3)


def write_sums(folder: Path, seed: int, share: float) -> None:
    """examples.jsonl for SFT, and sums.jsonl for GRPO: sums of two numbers of two digits."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    examples = []
    for a, b in pairs[:4000]:
        called = rng.random() < share
        # Behind a call the calculator's answer stands, and the model says it again.
        said = f":{a}+{b}={a + b}{a + b}" if called else str(a + b)
        examples.append({"prompt": f"{a}+{b}=", "response": said})
    sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs[4000:]]
    for name, rows in (("examples", examples), ("sums", sums)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
