"""`make comparison`: the shelf's algorithms on the demo's task, from one SFT start, at equal sampled tokens.

    make comparison ARGS="--root runs/comparison --seeds 0,1,2"       docs/comparison.md is made of its last lines

Two-digit addition (`rlhf_dist/demo/addition.py`): one model after SFT on an imperfect teacher, then each algorithm and
seed by itself in this process (`--local`), 512 responses a step, temperature 1, one learning rate for all, held-out
accuracy (greedy) every few steps. A run counts up to the tokens that it has sampled when PPO's budget is used: an
algorithm that draws several rounds a step has fewer steps. Each finished run is a line of ROOT/results.jsonl, and a
second call does what is missing. Prints the table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from controller.cluster.local import local_launch
from controller.lifecycle.run import run
from controller.record.display import Display
from controller.record.metrics import read_metrics
from rlhf_dist.checks import check_launch
from rlhf_dist.compose import compose
from rlhf_dist.demo.addition import save_model

STEPS, EVERY, ROWS = 20, 5, 512
TOKENS = 3.5 * ROWS * STEPS
"""Sampled response tokens that each run may use: a sum of the task is 3.5 tokens with its end."""
COMMON = {
    "task": "addition",
    "model.dtype": "float32",
    "actor.rollout.max_response_tokens": 6,
    "actor.optimizer.lr": 1e-4,
    "output.evaluate_every": EVERY,
    "output.rollouts_every": 0,
    "output.save_model": False,
    "output.checkpoint_every": 0,
    "output.tracker": "none",
}
SFT = {
    "data.train.generator": "rlhf_dist.demo.addition:demonstration",
    "data.prompts_per_step": 1024,
    "algorithm.mini_batches": 8,
    "actor.optimizer": {"lr": 1.5e-3, "schedule": "cosine", "warmup_steps": 40, "total_steps": 720},
    "steps": 90,
    "output.save_model": True,
    "output.evaluate_every": 0,
}
OF_8 = {"data.prompts_per_step": ROWS // 8, "algorithm.samples_per_prompt": 8}
OF_2 = {"data.prompts_per_step": ROWS // 2, "algorithm.samples_per_prompt": 2}
TWICE = {"algorithm.mini_batches": 2}
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "PPO": ("ppo", {**OF_8, **TWICE, "algorithm.kl_coef": 0.01, "critic.optimizer.lr": 1e-3}),
    "GRPO": ("grpo", {**OF_8, **TWICE}),
    "Dr. GRPO": ("grpo/dr_grpo", {**OF_8, **TWICE}),
    "RLOO": ("reinforce", OF_8),
    "ReMax": ("remax", {"data.prompts_per_step": ROWS // 2}),
    "REINFORCE++": ("reinforce/reinforce_plus_plus", OF_8),
    "DAPO": ("dapo", {**OF_8, **TWICE}),
    "GSPO": ("grpo/gspo", {**OF_8, **TWICE}),
    "CISPO": ("surrogates", {**OF_8, **TWICE}),
    "RAFT": ("rejection", OF_8),
    "Reinforce-Rej": ("reinforce/reinforce_rej", {**OF_8, **TWICE}),
    "NFT": ("surrogates/nft", {**OF_8, **TWICE}),
    "CoPG": ("sample_pairs/copg", OF_2),
    "iterative DPO": ("iterative_dpo", OF_8),
    "Nash-MD": ("nash_md", {**OF_2, "reference.rollout.max_response_tokens": 6}),
    "OREAL": ("oreal", OF_8),
    "SPO": ("reinforce/spo", {"data.prompts_per_step": ROWS}),
}
"""Name -> recipe or variant, and what makes a step of ROWS sampled responses of it."""


def main() -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--algorithms", help="names, with commas; default: all")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    names = given.algorithms.split(",") if given.algorithms else list(ALGORITHMS)
    model = _started(given.root)
    for seed in seeds:
        for name in names:
            if not any((one["algorithm"], one["seed"]) == (name, seed) for one in _results(given.root)):
                result = _run(given.root, name, seed, model)
                with (given.root / "results.jsonl").open("a") as out:
                    out.write(json.dumps(result) + "\n")
                print(json.dumps(result), flush=True)
    rows = _table(_results(given.root))
    print("\n| algorithm | recipe | held-out accuracy | seeds | sampled tokens | s a step |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['algorithm']} | `{row['recipe']}` | {row['mean']:.1%} ± {row['spread']:.1%} | "
            f"{', '.join(f'{one:.1%}' for one in row['each'])} | {row['tokens']:,.0f} | {row['step_s']:.2f} |"
        )
    print(json.dumps({"start": _results(given.root)[0]["start"], "ranked": rows}))
    return 0


def _results(root: Path) -> list[dict[str, Any]]:
    file = root / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _started(root: Path) -> Path:
    """The model that all runs start from, made once."""
    made = root / "start"
    if not made.exists():
        save_model(root / "random", 0)
        _local("sft", {**COMMON, **SFT, "model.path": root / "random", "name": "sft", "output.root": root})
        shutil.rmtree(root / ".start", ignore_errors=True)  # of a call that was ended here
        shutil.copytree(root / "sft" / "models" / "actor", root / ".start")
        (root / ".start").rename(made)
    return made


def _run(root: Path, name: str, seed: int, model: Path) -> dict[str, Any]:
    recipe, settings = ALGORITHMS[name]
    folder = root / "runs" / f"{re.sub('[^a-z0-9]+', '_', name.lower())}_{seed}"
    more = {"seed": seed, "steps": STEPS, "model.path": model, "name": folder.name, "output.root": folder.parent}
    began = time.perf_counter()
    _local(recipe, {**COMMON, **settings, **more})
    tokens, reached, used = 0.0, [], 0.0
    for row in read_metrics(folder):
        if row.get("kind") == "evaluation":
            if tokens <= 1.05 * TOKENS:
                reached.append([row["step"], row["heldout/reward"]])
                used = tokens
        else:
            tokens += _sampled(row)
    result = {"algorithm": name, "recipe": recipe, "seed": seed, "tokens": used, "start": reached[0][1]}
    return {**result, "curve": reached, "accuracy": reached[-1][1], "wall_s": round(time.perf_counter() - began, 1)}


def _sampled(row: dict[str, Any]) -> float:
    """Response tokens that all generating nodes of a step drew."""
    drawn = [key.removesuffix("/longest_response") for key in row if key.endswith("/longest_response")]
    return sum(row[f"{node}/response_tokens"] * row[f"{node}/rows"] for node in drawn)


def _local(recipe: str, settings: dict[str, Any]) -> None:
    overrides = [f"{key}={_text(value)}" for key, value in {**settings, "resume": "overwrite"}.items()]
    launch = local_launch(compose(recipe, overrides), overrides)
    check_launch(launch)
    with Display(launch.run.name, launch.run.steps, quiet=True) as display:
        run(launch, display, local=True)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_text(one)}" for key, one in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best first: mean and sample standard deviation over seeds."""
    rows = []
    for name in {one["algorithm"]: None for one in results}:
        own = sorted((one for one in results if one["algorithm"] == name), key=lambda one: one["seed"])
        each = [one["accuracy"] for one in own]
        rows.append(
            {
                "algorithm": name,
                "recipe": own[0]["recipe"],
                "mean": statistics.mean(each),
                "spread": statistics.stdev(each) if len(each) > 1 else 0.0,
                "each": each,
                "tokens": statistics.mean(one["tokens"] for one in own),
                "step_s": statistics.median(one["wall_s"] / STEPS for one in own),
            }
        )
    return sorted(rows, key=lambda row: -row["mean"])


if __name__ == "__main__":
    raise SystemExit(main())
