"""GRPO on what becomes of a program that the response writes, in stages: does it run, does it say what is right.

    staged      r = w_form [there is code] + w_run [it runs] + w_right [its last number is the answer's]      SIRL
    structure   r = w_form [there is code] + w_right (share of tests) + w_same (likeness of syntax trees)     VeriReason

SIRL: Chen et al. 2025, arXiv 2505.11792. VeriReason: 2025, arXiv 2505.11849.

A program runs in a sandbox, in a process of its own that has no network. For `staged` the answer is the number that a
solver would give; for `structure` it is JSON with "tests" (as the code reward takes them) and "program".
"""

import ast
import asyncio
import json
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from math import isclose
from typing import Any

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments.python_tool import sandbox_of
from rlhf_dist.rewards.code import CodeTests, extract_code
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.sandbox import Limits
from rlhf_dist.transforms import combine_rewards, grpo_advantage

_WEIGHTS = {"algorithm.form": 0.1, "algorithm.run": 0.0, "algorithm.right": 1.0, "algorithm.same": 0.4}
PAPERS = {
    "executed": Paper(
        title="SIRL: solver-informed RL",
        year=2025,
        arxiv="2505.11792",
        rows=(159,),
        status="outline",
        needs=("ROLL", "VER", "ADV", "REF", "TOK"),
        assumed="weights of the stages; the last number that the program prints in place of an LP file's objective; "
        "the KL is on the whole response, not on chosen segments; GRPO's baseline",
    ),
    "verireason": Paper(
        title="VeriReason",
        year=2025,
        arxiv="2505.11849",
        rows=(160,),
        status="outline",
        needs=("SFT", "ROLL", "VER", "ADV"),
        settings=_WEIGHTS,
        assumed="Python and tests in place of Verilog and a testbench; weights; the start is the recipe sft",
    ),
}
LIMITS = Limits(wall_s=5.0)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def has_code(response: str) -> float:
    """1 for a response with a program in it that can be parsed."""
    return float(syntax(extract_code(response)) is not None)


def runs(response: str) -> float:
    """1 for a program that ends by itself."""
    code = extract_code(response)
    return float(bool(code) and sandbox_of(LIMITS).run(code).ok)


async def is_right(response: str, answer: str) -> float:
    """The share of the tests that the program passes; where the answer is a number, whether it prints that last."""
    if _NUMBER.fullmatch(answer.strip()) is None:
        return (await _tests(response, json.dumps(json.loads(answer)["tests"])))["reward"]
    code = extract_code(response)
    said = _NUMBER.findall((await asyncio.to_thread(sandbox_of(LIMITS).run, code)).stdout) if code else []
    return float(bool(said) and isclose(float(said[-1]), float(answer), rel_tol=1e-4, abs_tol=1e-6))


def same_structure(response: str, answer: str) -> float:
    """How alike the syntax trees of the program and the row's are, in [0, 1], whatever names they use; 0 without a
    program on either side."""
    wanted = json.loads(answer)["program"] if answer.lstrip().startswith("{") else ""
    mine, theirs = syntax(extract_code(response)), syntax(wanted)
    return SequenceMatcher(None, mine, theirs, autojunk=False).ratio() if mine and theirs else 0.0


def syntax(code: str) -> list[str] | None:
    """Kinds of the nodes of a program's syntax tree, from the top; None for what is no program, or an empty one."""
    try:
        return [type(node).__name__ for node in ast.walk(ast.parse(code))] if code.strip() else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


async def _tests(response: str, tests: str) -> Any:
    global _code_tests
    if _code_tests is None:
        _code_tests = CodeTests(limits=LIMITS)
    return await _code_tests(response, tests)


_code_tests: CodeTests | None = None


@dataclass(frozen=True, kw_only=True)
class Executed:
    """Settings of rewards for programs."""

    form: float = 0.1
    """For a program that can be parsed."""
    run: float = 0.2
    """For one that runs to its end."""
    right: float = 1.0
    """For what it says, or the share of its tests."""
    same: float = 0.0
    """For a syntax tree like the row's."""
    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    kl_coef: float = 0.0
    """Weight of the KL estimate (k3) in the loss; 0 for none."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


@recipe
def executed(
    prompts: Prompts,
    actor: Actor,
    reference: Reference,
    form: Reward,
    run: Reward,
    right: Reward,
    same: Reward,
    cfg: Executed,
) -> None:
    """GRPO on the weighted sum of stages."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    weights = {"form": cfg.form, "run": cfg.run, "right": cfg.right, "same": cfg.same}
    for name, role in (("form", form), ("run", run), ("right", right), ("same", same)):
        if weights[name]:
            batch = role.compute_reward(batch, out=f"{name}_reward")
    used = {f"{name}_reward": weight for name, weight in weights.items() if weight}
    batch = combine_rewards(batch, scores=tuple(used), weights=tuple(used.values()))
    if cfg.kl_coef:
        batch = reference.compute_ref_log_prob(batch)
    actor.update_actor(grpo_advantage(batch), loss=ppo_clip(cfg.clip, kl_coef=cfg.kl_coef, on_policy=True))
