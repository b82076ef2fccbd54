"""Predicted against published: seconds of RL steps that others measured, in ratio and in rank.

    published_steps.yaml  ->  questions to the planner  ->  predicted / published, by step and by phase

The strategies that were used are asked for where they are published; else the best there is, which few run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import yaml

from rlhf_dist.planner.case import parse_case
from rlhf_dist.planner.plan import Plan, make_plan

FILE = Path(__file__).with_name("published_steps.yaml")
PROMPT_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Published:
    """One measured step and the question it answers."""

    source: str
    name: str
    cluster: str
    case: Mapping[str, Any]
    step_s: float
    phases: Mapping[str, float] = field(default_factory=dict)
    """train, infer, generate, reshard -> seconds, where published."""


def published_steps() -> Iterator[Published]:
    """All rows of the file."""
    content = yaml.safe_load(FILE.read_text())
    shapes = content.pop("models")
    for source, rows in content.items():
        for row in rows:
            case = _deepspeed_chat(row, shapes) if source == "deepspeed_chat" else _one_model(row, shapes)
            yield Published(
                source=source,
                name=row["name"],
                cluster=row["cluster"],
                case=case,
                step_s=float(row["step_s"]),
                phases=row.get("nodes", {}),
            )


def predicted(row: Published) -> tuple[float, dict[str, float]]:
    """Seconds of the step, and of its phases."""
    plan = make_plan(parse_case(row.case), 0)
    return plan.best.step_s, phase_seconds(plan)


def phase_seconds(plan: Plan) -> dict[str, float]:
    """Seconds of all nodes of a phase."""
    found: dict[str, float] = {}
    for work in plan.question.problem.nodes:
        if work.name in plan.best.costs:
            found[work.phase] = found.get(work.phase, 0.0) + plan.best.costs[work.name].seconds
    return found


def geometric(ratios: Sequence[float]) -> tuple[float, float]:
    """Geometric mean and geometric standard deviation."""
    logs = [log(ratio) for ratio in ratios]
    return exp(fmean(logs)), exp(pstdev(logs))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: 1 if both put all in the same order."""
    ranks = [[sorted(values).index(value) for value in values] for values in (one, other)]
    means = [fmean(rank) for rank in ranks]
    products = sum((a - means[0]) * (b - means[1]) for a, b in zip(*ranks, strict=True))
    return products / (len(one) * pstdev(ranks[0]) * pstdev(ranks[1]))


def _one_model(row: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    recipe, shape = row.get("recipe", "grpo"), shapes.get(row["model"], row["model"])
    roles = ("actor", "reference") if recipe == "grpo" else ("actor", "critic", "reference")
    samples = row.get("samples", min(32, row["rows"] // 16) if recipe == "grpo" else 1)
    prompt = row.get("prompt", PROMPT_TOKENS)
    strategies = {f"actor.{phase}": row[phase] for phase in ("train", "generate") if phase in row}
    case: dict[str, Any] = {
        "recipe": recipe,
        "cluster": row["cluster"],
        "models": {**dict.fromkeys(roles, shape), "reward": "rule"},
        "workload": {
            "prompts": row["rows"] // samples,
            "samples_per_prompt": samples,
            "prompt_tokens": prompt,
            "response_tokens": {"mean": row["mean"], "max": row["max"] - (0 if "prompt" in row else prompt)},
            "mini_batches": row["updates"],
        },
        "placement": {"preset": "colocate", "strategies": strategies} if strategies else "colocate",
    }
    if "pp" in row.get("train", {}):
        case["pipeline"] = [1, row["train"]["pp"]]
    if row.get("async"):
        case |= {"placement": {"preset": "async", "strategies": strategies}, "staleness": 1}
    return case


def _deepspeed_chat(row: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    large, small = shapes[row["model"]], shapes["opt-350m"]
    return {
        "recipe": "ppo",
        "cluster": row["cluster"],
        "models": {"actor": large, "reference": large, "critic": small, "reward": small},
        "workload": {"prompts": 1024, "prompt_tokens": 256, "response_tokens": 256, "mini_batches": 1},
        "placement": "colocate",
    }


def compare() -> dict[str, float]:
    """Print the table; how well predictions agree, over all rows."""
    ratios, published, asked = [], [], []
    for row in published_steps():
        seconds, phases = predicted(row)
        ratios.append(seconds / row.step_s)
        published.append(row.step_s)
        asked.append(seconds)
        by_phase = ", ".join(f"{phase} {s:g}: {phases[phase]:.1f}" for phase, s in row.phases.items())
        times = f"{row.step_s:7.1f} {seconds:7.1f} {ratios[-1]:5.2f}"
        print(f"{row.source:14s} {row.name:18s} {row.cluster:13s} {times}  {by_phase}")
    mean, spread = geometric(ratios)
    rank = rank_correlation(published, asked)
    print(f"{len(ratios)} steps: ratio {mean:.2f}, times or over {spread:.2f}; rank correlation {rank:.3f}")
    return {"published_ratio": round(mean, 3), "published_spread": round(spread, 3), "published_rank": round(rank, 3)}
