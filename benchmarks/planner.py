"""`make bench-planner`: seconds of the search on one core, of the paper's Algorithm 1, and published steps predicted.

PPO with four Llama-70B on 128 and 1,024 A100s (1,024 prompt + 1,024 response tokens, 1,024 rows, 8 mini-batches), with
and without pipelines. Algorithm 1 on 128 over the same strategies and latency model: as printed (strategies cached,
d_cost simulates every allocation) and with those seconds cached, too. Medians of three; Algorithm 1 once. Then the
steps of published_steps.yaml, predicted beside measured. Prints one JSON line last.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from statistics import median

from benchmarks.published import compare
from rlhf_dist.planner.case import parse_case
from rlhf_dist.planner.catalogue import Catalogue
from rlhf_dist.planner.plan import Plan, Question, make_plan, searcher
from rlhf_dist.planner.rates import Machine
from rlhf_dist.planner.reference import Algorithm1
from rlhf_dist.planner.strategy import Space

REPEATS = 3
STAGES = (1, 2, 4, 8)
PRINTED = Space(
    pipeline=tuple(range(1, 17)), offload=False, sequence=False, zero=(1,), frozen_zero=(0,), reallocate=False
)
ROLES = ("actor", "critic", "reference", "reward")


def question(nodes: int, model: str = "llama2-70b", **more: object) -> Question:
    """PPO as HybridFlow evaluates it (section 8.1), on nodes of 8 A100-80G."""
    load = {"prompts": 1024, "prompt_tokens": 1024, "response_tokens": 1024, "mini_batches": 8}
    models = dict.fromkeys(ROLES, model)
    return parse_case({"recipe": "ppo", "cluster": f"{nodes}x8xA100-80G", "models": models, "workload": load, **more})


def timed(asked: Question) -> tuple[float, Plan]:
    """Median seconds of CPU (one thread), and the plan."""
    found = []
    for _ in range(REPEATS):
        started = time.process_time()
        plan = make_plan(asked)
        found.append(time.process_time() - started)
    return median(found), plan


def main() -> None:
    """Measure and print."""
    answer: dict[str, float] = {}
    for nodes in (16, 128):
        for name, stages in (("", (1,)), ("_with_pipelines", STAGES)):
            seconds, plan = timed(replace(question(nodes), space=Space(pipeline=stages)))
            answer[f"search_{nodes * 8}_gpus{name}_s"] = round(seconds, 3)
            answer[f"gap_{nodes * 8}_gpus{name}"] = plan.certificate.gap
            print(
                f"{nodes * 8} GPUs{name}: {seconds:.2f} s, {plan.certificate.explored} parts, {plan.best.step_s:.1f} s"
            )
    for model in ("llama2-13b", "llama2-70b"):
        # The same space for both: tp, pp and ZeRO-1, as Algorithm 1 has it.
        asked = replace(question(16, model), space=PRINTED)
        catalogue = Catalogue(asked.problem, Machine.of(asked.cluster, asked.efficiency), asked.space)
        ours = median(searcher(asked).run().search_s for _ in range(REPEATS))
        answer[f"ours_{model}_s"] = round(ours, 3)
        for name, cached in (("cached", True), ("as_printed", False)):
            mapped = Algorithm1(catalogue, cached=cached).run() if cached or model == "llama2-70b" else None
            if mapped is not None:
                answer[f"algorithm_1_{name}_{model}_s"] = round(mapped.search_s, 2)
                answer[f"times_faster_than_{name}_{model}"] = round(mapped.search_s / ours, 1)
                print(f"{model}, 128 GPUs: ours {ours:.2f} s, Algorithm 1 {name} {mapped.search_s:.1f} s", flush=True)
    print(json.dumps(answer | compare()))


if __name__ == "__main__":
    main()
