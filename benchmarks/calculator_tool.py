"""Does a policy learn to use a calculator? From a model that seldom calls it, accuracy before and after GRPO, by seed.

    1. SFT   a tiny random Llama (a token a character) on products of two numbers: `share` of the answers by a call of
             the calculator, the others at once, which such a model gets wrong on products that it has not seen
    2. GRPO  over episodes (recipe tool_grpo): 1 for the right answer, nothing for a call

    34*56=                  the prompt
    :34*56=                 a call, cut where it ends; the calculator says 1904
    1904                    the answer: the model has to copy it

    make bench-tool ARGS="--seeds 0 1 2"

One line of JSON a seed, and one for all of them: accuracy on held-out products (in neither SFT nor GRPO) played
greedily, the share of them with a call, how often an answer was right with and without one; and the same of the
episodes that GRPO drew (`_drawn`), in its first step and its last five. In one process on one thread of its CPU.

SFT has to go on until the numbers of a call and the calculator's answer are copied, which `right_if_called` shows: of
a model that cannot copy, a call earns no more than a guess, and GRPO finds nothing (`docs/benchmarks.md`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from controller.lifecycle.api import launch
from rlhf_dist.batch import Batch
from rlhf_dist.testing.tiny_model import save_llama

NUMBERS = range(32, 100)
"""Of two digits, so that every product has four and what is copied always stands as far back."""
CALL_TOKENS = 7
"""Of `:34*56=`, which is a call; a turn has no more, so that the calculator's answer follows."""
HELD_OUT, TAUGHT = 128, 1500
"""Products of the 2,346 that there are; the others are GRPO's."""
SHOWN = 5
"""Steps at the end that what was drawn is the mean of."""


def main() -> None:
    """Measure the seeds one by one, and print a line of JSON for each and one for all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sft-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--share", type=float, default=0.25, help="of the SFT answers that are by a call")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory(prefix="calculator_") as scratch:
            found.append(measure(Path(scratch), seed, arguments))
        print(json.dumps(found[-1]), flush=True)
    print(json.dumps({"seeds": arguments.seeds, **spread(found)}))


def measure(folder: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one seed has learned, before and after GRPO."""
    started = time.monotonic()
    write_products(folder, seed, arguments.share)
    common = {
        **{"task": "none", "model.dtype": "float32", "seed": seed, "resume": "overwrite"},
        **{"output.root": folder / "runs", "output.tracker": "none", "output.checkpoint_every": None},
    }
    sft: dict[str, Any] = {
        **common,
        **{"model.path": save_llama(folder / "start", seed=seed, hidden=64), "name": "sft"},
        **{"data.train.path": folder / "examples.jsonl", "data.prompts_per_step": 128},
        **{"actor.optimizer.lr": 3e-3, "steps": arguments.sft_steps, "output.rollouts_every": 0},
    }
    taught = launch("sft", settings=sft, quiet=True, local=True)
    sft_s = time.monotonic() - started
    grpo: dict[str, Any] = {
        **common,
        **{"model.path": taught.models["actor"], "name": "grpo", "steps": arguments.steps},
        **{"data.train.path": folder / "products.jsonl", "data.heldout.path": folder / "heldout.jsonl"},
        **{"data.prompts_per_step": 16, "algorithm.samples_per_prompt": 8},
        **{"algorithm.plain": True, "algorithm.begin": ":", "algorithm.end": "=", "algorithm.forgiving": False},
        **{"algorithm.turn_tokens": CALL_TOKENS, "algorithm.turns": 3},
        **{"actor.optimizer.lr": 1e-3, "actor.rollout.engine": "transformers"},
        **{"actor.rollout.max_prompt_tokens": 8, "actor.rollout.max_response_tokens": 16},
        **{"output.rollouts_every": arguments.steps, "output.save_model": False},
    }
    lines = launch("tool_grpo", settings=grpo, quiet=True, local=True).metrics
    steps = [line for line in lines if line.get("kind") != "evaluation"]
    heldout = folder / "runs/grpo/rollouts/heldout"
    return {
        "seed": seed,
        "before": {**_drawn(steps[:1]), **_greedy(heldout / "step_000000.parquet")},
        "after": {**_drawn(steps[-SHOWN:]), **_greedy(heldout / f"step_{arguments.steps:06d}.parquet")},
        "sft_s": round(sft_s),
        "grpo_s": round(time.monotonic() - started - sft_s),
    }


def spread(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and largest accuracy over seeds."""
    return {
        f"{name}_{when}": {"mean": round(statistics.mean(values), 3), "least": min(values), "largest": max(values)}
        for when in ("before", "after")
        for name in ("accuracy", "accuracy_drawn")
        for values in [[one[when][name] for one in found]]
    }


def _drawn(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Of episodes as GRPO drew them."""
    rewards, turns = ([float(step[f"actor/{name}"]) for step in steps] for name in ("reward", "turns"))
    return {
        "accuracy_drawn": round(statistics.mean(rewards), 3),
        "calls_drawn": round(statistics.mean(turns) - 1, 3),
    }


def _greedy(dump: Path) -> dict[str, float | None]:
    """Of the held-out products."""
    batch = Batch.read_parquet(dump)
    right, called = batch["rewards"].values, batch["turns"].values > 1

    def share(of: Any) -> float | None:
        return round(float(of.mean()), 3) if len(of) else None

    return {
        "accuracy": share(right),
        "calls": share(called),
        "right_if_called": share(right[called]),
        "right_if_not": share(right[~called]),
    }


def write_products(folder: Path, seed: int, share: float) -> None:
    """examples.jsonl for SFT, products.jsonl for GRPO, heldout.jsonl: no product is in two, either way round."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS if a <= b]
    rng.shuffle(pairs)

    def part(of: slice) -> list[tuple[int, int]]:
        return [both for a, b in pairs[of] for both in ((a, b), (b, a))]

    examples = []
    for a, b in part(slice(HELD_OUT, HELD_OUT + TAUGHT)):
        called = rng.random() < share
        # Behind a call the calculator's answer stands, and the model says it again.
        said = f":{a}*{b}={a * b}{a * b}" if called else str(a * b)
        examples.append({"prompt": f"{a}*{b}=", "response": said})
    files = {"examples": examples}
    for name, of in {"heldout": slice(HELD_OUT), "products": slice(HELD_OUT + TAUGHT, None)}.items():
        files[name] = [{"prompt": f"{a}*{b}=", "answer": str(a * b)} for a, b in part(of)]
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
