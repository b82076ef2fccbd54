"""A plan as a file that `rlhf-dist run RECIPE placement=FILE` takes as it is.

Pools and roles become the `placement` section; strategies that the settings know become values of their role's
section, the others comments: the file says all of the plan and sets what can be set.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import yaml

from rlhf_dist.planner.explain import memory_of, workload_text
from rlhf_dist.planner.plan import Plan, headroom_bytes
from rlhf_dist.planner.pools import Pool
from rlhf_dist.planner.strategy import Generation, Strategy


def as_yaml(plan: Plan) -> str:
    """The plan as a placement file."""
    question, best = plan.question, plan.best
    sections, comments = settings_of(plan)
    head = [
        f"# {question.name} on {question.cluster.text}: {best.step_s:.4g} s a step predicted, "
        f"{plan.tokens_per_s:,.0f} tokens/s",
        f"# planned for {workload_text(question.problem.workload)}; weights and activations in bfloat16",
        f"# gap {plan.certificate.gap:g}, {plan.certificate.explored} parts of the space looked at (rlhf-dist plan)",
    ]
    body = yaml.safe_dump(sections, sort_keys=False).rstrip()
    tail = ["# Also part of the plan, and not a setting (yet):", *(f"#   {line}" for line in comments)]
    return "\n".join([*head, body, *(tail if comments else [])]) + "\n"


def settings_of(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """(settings by section, what no setting says).

    On GPUs that includes what the prediction assumes and the settings' defaults (a laptop's) do not: bfloat16, passes
    of as many tokens, and a cache of as many bytes.
    """
    problem = plan.question.problem
    pools: dict[str, dict[str, int]] = {}
    roles: dict[str, str] = {}
    rollouts: dict[str, str] = {}
    comments: list[str] = []
    placement: dict[str, Any] = {"pools": pools, "roles": roles}
    sections: dict[str, Any] = {"placement": placement}
    for name, pool in zip(plan.names, plan.best.pools, strict=True):
        pools[name] = {"slots": pool.gpus}
        for unit in pool.units:
            role, _, half = unit.partition(".")
            if not half:
                roles[role] = name
                _engine(sections, comments, role, pool.holdings[role], role in problem.trained)
            else:
                rollouts[role] = name
            if role in pool.generations:
                _rollout(sections, comments, role, pool.generations[role])
        for work in problem.nodes:
            cost = pool.costs.get(work.name)
            if cost is None:
                continue
            if cost.holding is not None:
                comments.append(f"{work.name}: {cost.holding.text}, weights copied from where it trains")
            elif work.phase == "train":
                sections[work.role]["engine"]["activation_checkpointing"] = cost.recompute
    if plan.question.cluster.gpu.name != "CPU":
        for pool in plan.best.pools:
            for role in pool.holdings:
                sections[role]["engine"] |= _passes(plan, role, pool)
            for role in pool.generations:
                sections[role]["rollout"] |= _cache(plan, role, pool)
    if rollouts:
        everywhere = set(rollouts) == problem.generating and len(set(rollouts.values())) == 1
        placement["rollout"] = next(iter(rollouts.values())) if everywhere else rollouts
    if problem.staleness:
        placement["max_staleness"] = problem.staleness
    return sections, list(dict.fromkeys(comments))


def _passes(plan: Plan, role: str, pool: Pool) -> dict[str, Any]:
    """Tokens of the largest forward pass that one rank of a role makes."""
    load = plan.question.problem.workload
    rows = [cost.rows for work in plan.question.problem.nodes if (cost := pool.costs.get(work.name)) and cost.passes
            and work.role == role]  # fmt: skip
    tokens = max(max(rows, default=1.0) * load.row_tokens, load.longest) / pool.holdings[role].sp
    return {"dtype": "bfloat16", "micro_batch_tokens": ceil(tokens)}


def _cache(plan: Plan, role: str, pool: Pool) -> dict[str, Any]:
    """Bytes of keys and values on each rank, as the plan has it."""
    used, usable = memory_of(plan), headroom_bytes(plan.question)
    sizes = []
    for work in plan.question.problem.nodes:
        if work.role == role and work.phase == "generate" and work.name in pool.costs:
            needed = pool.costs[work.name].memory["kv_cache"]
            # Rows take whole blocks, so a quarter more where there is room.
            sizes.append(needed + min(0.25 * needed, usable - sum(used[work.name].values())))
    return {"dtype": "bfloat16", "kv_cache_bytes": int(max(sizes))}


def _engine(sections: dict[str, Any], comments: list[str], role: str, strategy: Strategy, trained: bool) -> None:
    """Settings of a role's training engine, as its strategy asks for."""
    deepspeed = trained and strategy.tp * strategy.sp == 1 and (strategy.zero == 1 or strategy.offload)
    asked: dict[str, Any] = {"name": "deepspeed" if deepspeed else "fsdp"}
    if trained and strategy.zero < 3:
        asked["zero_stage"] = strategy.zero if deepspeed else 2
        if strategy.zero == 1 and not deepspeed:
            comments.append(f"{role}.engine.zero_stage: 1 (with tensor or sequence parallelism there is 2 and 3)")
    if strategy.tp > 1:
        asked["tensor_parallel"] = strategy.tp
    if strategy.sp > 1:
        asked["sequence_parallel"] = strategy.sp
    if not trained and not strategy.zero and strategy.dp > 1:
        asked["replicas"] = strategy.dp
    if strategy.offload:
        asked["offload"] = "optimizer" if deepspeed else "all"
    sections.setdefault(role, {})["engine"] = asked
    if strategy.pp > 1:
        comments.append(f"{role}: pipeline of {strategy.pp} stages")


def _rollout(sections: dict[str, Any], comments: list[str], role: str, generation: Generation) -> None:
    sections.setdefault(role, {})["rollout"] = {"tensor_parallel": generation.tp}
    if generation.pp > 1:
        comments.append(f"{role} generates with a pipeline of {generation.pp} stages")
