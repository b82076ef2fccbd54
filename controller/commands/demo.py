"""`rlhf-dist demo`: a small Llama learns from an imperfect teacher, then PPO takes it past the teacher. No GPU needed.

The demonstrations forget three carries in five (`rlhf_dist/demo/addition.py`), so supervised fine-tuning ends at a
middling level; PPO, told only whether a sum is right, has to find out which of its habits is the good one.

Two stages (`rlhf_dist/stages.py`). Writes ROOT/model, ROOT/sft, ROOT/ppo (the two runs), ROOT/summary.json and
ROOT/demo.png. An earlier demo in ROOT is replaced, or gone on with by resume=auto. Accuracy is the share of held-out
sums, operand pairs never seen in training, whose most likely answer is right.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from controller.commands.registry import Commands

SFT = {
    "data.train.generator": "rlhf_dist.demo.addition:demonstration",
    "data.heldout": None,
    "data.prompts_per_step": 1024,
    "algorithm.mini_batches": 8,
    "actor.optimizer": {"lr": 1.5e-3, "schedule": "cosine", "warmup_steps": 40, "total_steps": 720},
    "steps": 90,
}
PPO = {
    "data.prompts_per_step": 64,
    "algorithm.samples_per_prompt": 8,
    "algorithm.mini_batches": 2,
    "algorithm.kl_coef": 0.01,
    "actor.rollout.max_response_tokens": 6,
    "actor.optimizer.lr": 1e-4,
    "critic.optimizer.lr": 1e-3,
    "model.path": "${stage.sft.actor}",
    "steps": 100,
    "output.evaluate_every": 20,
}
OWN = re.compile(r"model|(sft|ppo)(\.\d+)?|summary\.json|demo\.png")
"""What a demo leaves in its folder, with runs that ended before their first checkpoint."""


def register(commands: Commands) -> None:
    """`demo`."""
    demo = commands.add(
        "demo",
        demo_command,
        "SFT, then PPO, of a small Llama on two-digit addition",
        "demo",
        "demo --root runs/demo steps=20",
        "demo resume=auto",
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--root", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="default: runs/demo")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the PPO run; resume=auto: of both")


def demo_command(arguments: argparse.Namespace) -> int:
    """Run both stages and write the summary."""
    from controller.lifecycle.stages import check_stages, run_stages
    from rlhf_dist.demo.addition import save_model
    from rlhf_dist.stages import read_stages

    root, seed, started = arguments.root, arguments.seed, time.perf_counter()
    settings = {
        "name": root.name,
        "output.root": str(root.parent),
        "resume": "overwrite",
        "seed": seed,
        "task": "addition",
        "model.dtype": "float32",
        "stages": {"sft": {**SFT, "model.path": str(root / "model")}, "ppo": PPO},
    }
    of_both = [override for override in arguments.overrides if override.startswith("resume=")]
    of_ppo = [re.sub("^([~+]*)", r"\1ppo.", override) for override in arguments.overrides if override not in of_both]
    stages = read_stages(settings, [*of_both, *of_ppo])
    _make_folder(root)
    anew = of_both[-1:] in ([], ["resume=overwrite"])
    if anew or not (root / "model").is_dir():
        save_model(root / "model", seed)
    earlier = [root / name for name in ("sft", "ppo", "summary.json", "demo.png") if anew and (root / name).exists()]
    if earlier:
        check_stages(stages)  # a mistyped setting deletes nothing
    for one in earlier:
        shutil.rmtree(one) if one.is_dir() else one.unlink()
    summaries = run_stages(stages)
    ppo = summaries["ppo"]
    before, after = ppo["evaluations"][0]["heldout/reward"], ppo["evaluations"][-1]["heldout/reward"]
    summary = {
        "heldout_before": before,
        "heldout_after": after,
        "heldout_gain_points": round(100 * (after - before), 1),
        "rl_steps": ppo["steps"],
        "wall_s": round(time.perf_counter() - started, 1),
        "rl_step_s": ppo["step_s"],
        "tokens_per_s": ppo["tokens_per_s"],
        "seed": seed,
        "stages": summaries,
    }
    (root / "summary.json").write_text(json.dumps(summary, indent=2))
    _plot(root, ppo)
    gain = f"held-out accuracy {before:.1%} -> {after:.1%}"
    print(f"\n{gain} after {ppo['steps']} steps of PPO, {summary['wall_s']} s in all")
    print(f"{root / 'summary.json'}, {root / 'demo.png'}")
    return 0


def _make_folder(root: Path) -> None:
    """Raises ConfigError where it cannot be, is not a demo's, or a demo writes to it now."""
    from controller.lifecycle.folder_lock import owner_of
    from controller.lifecycle.run_folder import is_run
    from rlhf_dist.typed import ConfigError

    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{root} cannot be written ({error.strerror}); choose another --root") from error
    there = [root / name for name in ("sft", "ppo") if (root / name).exists()]
    others = [entry.name for entry in root.iterdir() if not OWN.fullmatch(entry.name)]
    others += [folder.name for folder in there if not is_run(folder)]
    if others:
        names = ", ".join(sorted(others)[:3])
        raise ConfigError(f"{root} holds files that are not of a demo ({names}); choose another --root")
    for folder in there:
        state, owner = owner_of(folder)
        if state in ("live", "watch"):  # of another host, which is not known to have ended, neither
            raise ConfigError(f"{root} is written by another demo ({owner}); wait for it or choose another --root")


def _plot(root: Path, ppo: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from controller.record.metrics import read_metrics

    steps = [row for row in read_metrics(root / "ppo") if row.get("kind") != "evaluation"]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["step"] for row in steps], [row["reward/reward"] for row in steps], label="reward (sampled)")
    points = ppo["evaluations"]
    axes.plot(
        [point["step"] for point in points],
        [point["heldout/reward"] for point in points],
        marker="o",
        label="held-out accuracy (greedy)",
    )
    axes.set(xlabel="PPO step", ylabel="share of right answers", ylim=(0, 1), title="Two-digit addition, PPO after SFT")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(root / "demo.png", dpi=120)
