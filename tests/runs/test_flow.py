"""What does not wait: a reference that takes episodes piece by piece, and evaluation beside the steps. On Ray, in pools
of their own, with a resume in the middle: the numbers of one process that does one thing after the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from controller.record.metrics import read_metrics

RECIPE = '''
"""One row's tool is slow."""

import time

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Environment
from rlhf_dist.roles import Actor, Prompts, Reference
from rlhf_dist.transforms import grpo_advantage


class Slow(Environment):
    rewards = True

    async def episode(self, chat, row):
        reply = await chat.generate(max_tokens=6)
        chat.reward(float(len(set(reply.text))))
        if row.answer == "6":
            await chat.run(time.sleep, 1.0)
        chat.say(" and?")
        await chat.generate(max_tokens=4)


@recipe
def slow(prompts: Prompts, actor: Actor, reference: Reference) -> None:
    batch = reference.compute_ref_log_prob(actor.run_episodes(prompts, environment=Slow(), n=2))
    actor.update_actor(grpo_advantage(actor.compute_log_prob(batch), kl_coef=0.1), loss=ppo_clip(0.2))
'''
APART = [
    *("placement.pools.main.slots=1", "placement.pools.gen.slots=1", "placement.pools.models.slots=2"),
    *("placement.rollout=gen", "placement.roles.Reference=models", "placement.pieces=4"),
    *("output.evaluate_beside=true", "output.checkpoint_every=1", "output.inputs_every=1", "output.keep_inputs=9"),
]


def test_numbers_are_those_of_one_process_in_which_all_waits(
    launch_warm: Callable[..., dict[str, Any]], tmp_path: Path, tied: Path
) -> None:
    """About 30 s."""
    file = tmp_path / "slow.py"
    file.write_text(RECIPE)
    for name, answers in (("train", range(8)), ("heldout", range(5))):
        rows = [{"prompt": f"{answer}+0=", "answer": str(answer)} for answer in answers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [
        *(f"data.train.path={tmp_path}/train.jsonl", f"data.heldout.path={tmp_path}/heldout.jsonl"),
        *("data.prompts_per_step=8", f"reference.model.path={tied}", "actor.optimizer.lr=1e-3"),
        *("actor.rollout.engine=transformers", "actor.rollout.max_response_tokens=48", "output.evaluate_every=1"),
    ]
    launch_warm(str(file), *settings, "name=here", "steps=2", local=True)
    launch_warm(str(file), *settings, *APART, "name=apart", "steps=1")
    launch_warm(str(file), *settings, *APART, "name=apart", "steps=2", "resume=auto")
    here, apart = read_metrics(tmp_path / "here"), read_metrics(tmp_path / "apart")
    lines = [(row.get("kind", ""), row["step"]) for row in apart]
    assert lines == [("evaluation", 0), ("", 0), ("evaluation", 1), ("", 1), ("evaluation", 2)]
    assert lines == [(row.get("kind", ""), row["step"]) for row in here], "each once, whoever waits"
    for one, other in zip(here, apart, strict=True):
        beside = {name for name in other if name.startswith("heldout/")}
        assert beside == {name for name in one if name.startswith("heldout/")} and bool(beside) == ("kind" in other)
        named = beside & {"heldout/reward", "heldout/response_tokens", "heldout/policy_version", "heldout/rows"}
        for name in named or {"actor/drawn_tokens", "actor/reward", "grpo_advantage/ref_kl"}:
            assert other[name] == pytest.approx(one[name], rel=1e-4), (name, other["step"])
        assert "kind" not in other or other["heldout/policy_version"] == other["step"]

    trace = json.loads((tmp_path / "apart/trace.json").read_text())["traceEvents"]
    ends: dict[str, list[tuple[float, float]]] = {}
    for one in (one for one in trace if one["ph"] == "X"):
        ends.setdefault(one["name"], []).append((one["ts"], one["ts"] + one["dur"]))
    ((_, played),) = ends["actor.run_episodes"]
    early = [end for _, end in ends["reference.compute_ref_log_prob"] if end < played]
    assert len(early) >= 2, "pieces are done while a tool is still waited for"
    ((began, ended),) = ends["heldout/actor.run_episodes"]
    assert played <= began and ended <= ends["actor.reshard"][0][0]
    assert any(
        start < ended and end > began for start, end in ends["actor.update_actor"] + ends["actor.compute_log_prob"]
    )
    saved = list((tmp_path / "apart/inputs/step_000001/reference.compute_ref_log_prob").glob("part_*"))
    assert len(saved) == 8, "each piece on each rank is a call that can be replayed"


def test_plain_responses_go_on_as_episodes_do(
    launch_warm: Callable[..., dict[str, Any]], tmp_path: Path, tied: Path
) -> None:
    """About 15 s."""
    rows = [{"prompt": f"{answer}+0=", "answer": str(answer)} for answer in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [
        *("task=none", f"data.train.path={tmp_path}/rows.jsonl", "data.prompts_per_step=9", "steps=2"),
        *("reward.function=rlhf_dist.rewards:exact_match", f"reference.model.path={tied}", "algorithm.kl_coef=0.1"),
        *("algorithm.samples_per_prompt=2", "actor.optimizer.lr=1e-3", "actor.rollout.engine=transformers"),
        *("actor.rollout.max_response_tokens=24", "data.heldout=null"),
    ]
    apart = [one for one in APART if not one.startswith("output.evaluate")]
    launch_warm("grpo", *settings, "name=here", local=True)
    launch_warm("grpo", *settings, *apart, "name=apart")
    here, apart_lines = read_metrics(tmp_path / "here"), read_metrics(tmp_path / "apart")
    assert len(here) == len(apart_lines) == 2
    for one, other in zip(here, apart_lines, strict=True):
        for name in ("actor/response_tokens", "reward/reward", "actor/loss", "actor/ref_kl"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), (name, other["step"])
    saved = list((tmp_path / "apart/inputs/step_000001/reference.compute_ref_log_prob").glob("part_*"))
    assert len(saved) == 8, "four pieces on two ranks"
