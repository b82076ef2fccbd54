"""What each recipe of the shelf is given to run at the smallest size: data, other models, small numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_dist.recipe_files import split_variant
from tests.tiny import save_classifier, save_judge, save_llama

Made = dict[str, Path]
MIXED = "tests.recipes.rules:odd_length"


def make_files(folder: Path) -> Made:
    """What some recipes need beside the kit's own model and data: rows with fields of their own, and other models."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = [(a, b) for a in range(4) for b in range(3)]
    rows = [
        {
            "prompt": f"{a}+1=",
            "response": str(a + b),
            "answer": str(a + 1),
            "desirable": a % 2,
            "score": (b * 7 + a) % 5,
            "reward": float(b),
            "ratings": [a, None, b, 1.0, 0.5],
            "chosen": str(a + 1),
            "rejected": str(a),
            "margin": 1.0 + b,
            "sign": 1.0 - 2 * (b % 2),
            "route": ("verify", "truth", "compare")[b],
            "open": float(b % 2),
            **{"user": a, "task": b, "capability": b},
        }
        for a, b in sums
    ]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = [{"prompt": row["prompt"], "answer": json.dumps([{"name": "add", "parameters": {"a": 1}}])} for row in rows]
    (folder / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in calls))
    selects = [{**row, "answer": "select 1", "schema": "create table t(a); insert into t values(1);"} for row in rows]
    (folder / "selects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in selects))
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    passages = [" ".join(one + two for one in letters[k::6] for two in letters) for k in range(6)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    queries = [{"prompt": row["prompt"], "answer": json.dumps([0, 1, 2, 3, 4, 5])} for row in rows]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    texts = [{"prompt": "text", "answer": f"{a} and {b}. so {a + b}. that is all."} for a, b in sums]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return {
        "selects": folder / "selects.jsonl",
        "corpus": folder / "corpus.jsonl",
        "queries": folder / "queries.jsonl",
        "texts": folder / "texts.jsonl",
        "labelled": folder / "labelled.jsonl",
        "calls": folder / "calls.jsonl",
        "scores": save_classifier(folder / "scores"),
        "other": save_llama(folder / "other", seed=1),
        "judge": save_judge(folder / "judge"),
    }


ASKED = {"algorithm.marker": "", "algorithm.question": "{prompt} {response} score:"}
"""For judges that read a few hundred characters, and say a verdict without more words."""
PAIR = {**ASKED, "algorithm.question": "{response_a} {response_b} better:", "algorithm.votes": 2}

LONG = {"actor.rollout.max_response_tokens": 96, "algorithm.seconds": 300.0}
"""For episodes of several turns; seconds are a loaded machine's."""

SETTINGS: dict[str, Callable[[Made], dict[str, Any]]] = {
    "alol": lambda made: {"data.train.path": made["labelled"], "algorithm.warmup": 0},
    "chord": lambda made: {"algorithm.warmup": 1},
    "dapo": lambda made: {"algorithm.samples_per_prompt": 2, "algorithm.rounds": 2},
    "dro": lambda made: {"data.train.path": made["labelled"]},
    "fine_grained_rlhf": lambda made: {
        **{f"{role}.model.path": made["scores"] for role in ("relevance", "facts")},
        **{"algorithm.relevance_every": 2, "algorithm.facts_every": 3},
    },
    "gkd": lambda made: {"teacher.model.path": made["other"]},
    "greso": lambda made: {"algorithm.samples_per_prompt": 2},
    "iterative_dpo": lambda made: {"reward.function": MIXED, "algorithm.samples_per_prompt": 4},
    "kto": lambda made: {"data.train.path": made["labelled"]},
    "ma_rlhf": lambda made: {"algorithm.segment": 3, "algorithm.mini_batches": 2},
    "adaptive_kl": lambda made: {"algorithm.mini_batches": 2},
    "judge_grpo": lambda made: {
        **ASKED,
        **{"judge.model.path": made["judge"], "algorithm.samples_per_prompt": 3, "algorithm.votes": 2},
    },
    "nash_md": lambda made: {
        "reference.model.path": made["other"],
        "algorithm.mixture": 0.5,
        "algorithm.average": 0.5,
        "algorithm.samples_per_prompt": 2,
    },
    "oaif": lambda made: {**PAIR, "judge.model.path": made["judge"], "data.prompts_per_step": 8},
    "oreal": lambda made: {"algorithm.samples_per_prompt": 4, "algorithm.solved": 0.2, "algorithm.warmup": 1},
    "self_rewarding": lambda made: {**ASKED, "algorithm.iteration": 1, "actor.rollout.max_prompt_tokens": 256},
    "pf_ppo": lambda made: {
        "algorithm.samples_per_prompt": 3,
        "algorithm.replayed": 2,
        "algorithm.keep": "best_random",
    },
    "rankings": lambda made: {"data.train.path": made["labelled"], "data.prompts_per_step": 6},
    "ranked_samples": lambda made: {"reference.model.path": made["other"]},
    "density_ratio": lambda made: {"strong.model.path": made["other"], "algorithm.samples_per_prompt": 3},
    "dense_rewards": lambda made: {
        "dpo_model.model.path": made["other"],
        "rewriter.model.path": made["other"],
        "attentive.model.path": made["scores"],
        "step_model.model.path": made["scores"],
        "algorithm.step_tokens": 3,
        "algorithm.mini_batches": 1,
    },
    "ppo_max": lambda made: {"algorithm.critic_warmup": 0, "algorithm.mini_batches": 1},
    "rejection": lambda made: {
        "algorithm.samples_per_prompt": 4,
        "reward.function": MIXED,
        "reference.model.path": made["other"],
    },
    "shaped_rewards": lambda made: {
        "algorithm.mini_batches": 1,
        "algorithm.references": 2,
        "second.function": MIXED,
    },
    "accelerated": lambda made: {"algorithm.samples_per_prompt": 3},
    "active": lambda made: {
        "reward.function": MIXED,
        "algorithm.unsure_share": 1.0,
        "reference.model.path": made["other"],
    },
    "cream": lambda made: {
        "algorithm.samples_per_prompt": 3,
        "algorithm.every": 1,
        "reference.model.path": made["other"],
    },
    "multipliers": lambda made: {"algorithm.mini_batches": 1},
    "pmpo": lambda made: {"reward.function": MIXED, "reference.model.path": made["other"]},
    "rejection_pairs": lambda made: {"algorithm.samples_per_prompt": 8, "algorithm.temperature": 5.0},
    "armorm": lambda made: {
        "data.sources.ratings.path": made["labelled"],
        "data.sources.pairs.path": made["labelled"],
    },
    "binary_reward_model": lambda made: {"data.train.path": made["labelled"]},
    "heron": lambda made: {"first.function": MIXED},
    "reward_model": lambda made: {"data.train.path": made["labelled"]},
    "denoised": lambda made: {f"{role}.model.path": made["scores"] for role in ("first", "second", "third")},
    "pair_accuracy": lambda made: {"reward.model.path": made["scores"]},
    "weak_to_strong": lambda made: {"weak.model.path": made["scores"], "algorithm.warmup": 1},
    "best_of_list": lambda made: {
        "data.train.path": made["labelled"],
        "reward.model.path": made["scores"],
        "data.prompts_per_step": 6,
        "algorithm.right": 2.0,
    },
    "likelihood_reward": lambda made: {
        "data.sources.followups.path": made["labelled"],
        "data.sources.prompts.path": made["labelled"],
        "data.sources.followups.rows_per_step": 2,
        "frozen.model.path": made["other"],
    },
    "prompt_writer": lambda made: {
        "frozen.model.path": made["other"],
        "algorithm.mini_batches": 1,
        "algorithm.answers": 2,
    },
    "balanced_init": lambda made: {"instruct.model.path": made["other"], "algorithm.mini_batches": 1},
    "diversity": lambda made: {"algorithm.samples_per_prompt": 2},
    "rlccf": lambda made: {"second.model.path": made["other"], "algorithm.samples_per_prompt": 4},
    "frontier": lambda made: {"policy.model.path": made["other"], "algorithm.samples_per_prompt": 2},
    "ghpo": lambda made: {"reward.function": MIXED, "algorithm.samples_per_prompt": 3},
    "resets": lambda made: {"guide.model.path": made["other"], "algorithm.mini_batches": 1, "algorithm.share": 1.0},
    "thinking": lambda made: {
        "algorithm.end": "1",
        "algorithm.samples_per_prompt": 3,
        "reference.model.path": made["other"],
    },
    "vapo": lambda made: {
        "reward.function": MIXED,
        "algorithm.samples_per_prompt": 2,
        "algorithm.mini_batches": 1,
        "algorithm.critic_warmup": 0,
    },
    "reinforce": lambda made: {"reward.function": MIXED},
    "sample_pairs": lambda made: {"reference.model.path": made["other"], "reward.function": MIXED},
    "selm": lambda made: {"reference.model.path": made["other"]},
    "surrogates": lambda made: {"algorithm.samples_per_prompt": 4, "reward.function": MIXED},
    "reward_ensemble": lambda made: {"algorithm.samples_per_prompt": 2},
    "salsa": lambda made: {"second.model.path": made["other"], "algorithm.mini_batches": 1},
    "tool_grpo": lambda made: {
        **{"actor.rollout.max_response_tokens": 24, "algorithm.turn_tokens": 6, "algorithm.samples_per_prompt": 6},
        **{"algorithm.plain": True, "algorithm.begin": ":", "algorithm.end": "=", "algorithm.forgiving": False},
        **{"algorithm.unfinished_reward": -1.0, "algorithm.seconds": 300.0},  # which are a loaded machine's
    },
    "agent_r": lambda made: {
        **{"actor.rollout.max_response_tokens": 16, "algorithm.attempt_tokens": 5, "algorithm.revision": "="},
    },
    "b_star": lambda made: {
        **{
            "algorithm.samples_per_prompt": 3,
            "algorithm.temperatures": [0.7, 1.5],
            "algorithm.thresholds": [-9.0, 0.0],
        },
        **{"scorer.model.path": made["scores"], "reward.function": MIXED},
    },
    "critique_grpo": lambda made: {
        **{"judge.model.path": made["judge"], "algorithm.samples_per_prompt": 3, "reward.function": MIXED},
        **{"algorithm.critique": "{question} {answer_given}", "algorithm.refine": "{question}={answer_given}="},
    },
    "guided_decoding": lambda made: {
        **{"algorithm.steps": 2, "algorithm.step_tokens": 2, "algorithm.expand": 3, "policy.model.path": made["other"]},
        **{"judge.model.path": made["judge"], "algorithm.look_ahead": 2, "algorithm.marker": ""},
        **{"algorithm.question": "{response_a} {response_b} better:"},
    },
    "q_probe": lambda made: {"policy.model.path": made["other"], "algorithm.samples_per_prompt": 3},
    "reex_sql": lambda made: {
        **{"actor.rollout.max_response_tokens": 24, "algorithm.turn_tokens": 6, "algorithm.seconds": 300.0},
        **{"data.train.path": made["selects"], "algorithm.begin": "+", "algorithm.end": "="},
    },
    "smart": lambda made: {
        **{"algorithm.strategies": ["1+1=2;", "2+2=4;"], "reward.function": MIXED},
        "algorithm.samples_per_prompt": 2,
    },
    "step_preferences": lambda made: {
        **{"actor.rollout.max_response_tokens": 48, "algorithm.step_tokens": 4, "algorithm.depth": 3},
        **{"algorithm.simulations": 4, "algorithm.expand": 3, "reference.model.path": made["other"]},
        **{"actor.rollout.max_prompt_tokens": 16, "algorithm.question": "? "},
    },
    "step_values": lambda made: {
        **{"actor.rollout.max_response_tokens": 24, "algorithm.step_tokens": 4, "algorithm.depth": 2},
    },
    "tpo": lambda made: {
        **{"policy.model.path": made["other"], "algorithm.samples_per_prompt": 2, "algorithm.rounds": 1},
        **{"algorithm.loss": "{best}:{worst}", "algorithm.gradient": "{criticism}=", "algorithm.update": "{advice}="},
    },
    "tree_grpo": lambda made: {
        **{"actor.rollout.max_response_tokens": 24, "algorithm.step_tokens": 4, "algorithm.depth": 2},
        "algorithm.expand": 3,
    },
    "turn_ppo": lambda made: {**LONG, "actor.rollout.max_response_tokens": 160},
    "self_play": lambda made: {"algorithm.episodes": 8, "algorithm.moves": "[a,e,i]"},
    "frozen_partner": lambda made: {
        **LONG,
        **{"frozen.model.path": made["other"], "frozen.rollout.max_response_tokens": 160},
        **{"algorithm.turn_tokens": 8, "algorithm.frozen_tokens": 8, "actor.rollout.max_prompt_tokens": 128},
        "frozen.rollout.max_prompt_tokens": 128,
    },
    "query_expansion": lambda made: {
        **{"algorithm.corpus": made["corpus"], "data.train.path": made["queries"]},
        "actor.rollout.max_response_tokens": 48,
    },
    "refuel": lambda made: {
        **LONG,
        **{"user.model.path": made["other"], "user.rollout.max_response_tokens": 64},
        **{"algorithm.turns": 3, "algorithm.turn_tokens": 4, "algorithm.user_tokens": 4},
    },
    "environment_preference": lambda made: {
        **LONG,
        **{"algorithm.turn_tokens": 5, "algorithm.samples_per_prompt": 4, "reference.model.path": made["other"]},
    },
    "expert_steps": lambda made: {"reference.model.path": made["other"]},
    "gameable": lambda made: {**LONG, "algorithm.turn_tokens": 6, "algorithm.samples_per_prompt": 4},
    "ask_for_help": lambda made: {
        **{"agent.rollout.max_response_tokens": 64, "helper.rollout.max_prompt_tokens": 256},
        **{"algorithm.turns": 3, "algorithm.turn_tokens": 4, "algorithm.samples_per_prompt": 2},
        **{"algorithm.seconds": 300.0, "scorer.model.path": made["scores"]},
    },
    "imagined_dialogues": lambda made: {
        **{"imaginer.rollout.max_response_tokens": 64, "imaginer.model.path": made["other"]},
        **{"algorithm.turns": 2, "algorithm.turn_tokens": 4, "algorithm.seconds": 300.0},
    },
    "rlpt": lambda made: {
        **{"data.train.path": made["texts"], "judge.model.path": made["judge"], "algorithm.samples_per_prompt": 4},
        **{"algorithm.question": "{truth} {response} score:", "algorithm.yes": "1", "algorithm.no": "2"},
        **{"actor.rollout.max_prompt_tokens": 128},
        **{"algorithm.next_segment": "{before}", "algorithm.middle_segment": "{before} - {behind}"},
    },
    "executed": lambda made: {
        **{f"{role}.function": MIXED for role in ("form", "run", "right", "same")},
        "algorithm.samples_per_prompt": 4,
    },
    "two_teachers": lambda made: {"first.model.path": made["other"], "algorithm.top_k": 5},
    "vas": lambda made: {"policy.model.path": made["other"], "algorithm.samples_per_prompt": 2},
    "reward_augmented": lambda made: {"reward.model.path": made["scores"], "actor.rollout.max_prompt_tokens": 64},
    "t_reg": lambda made: {"algorithm.better": "good: {prompt}", "algorithm.worse": "bad: {prompt}"},
    "srpo": lambda made: {"algorithm.question": "{prompt} {shown_ids} better:"},
    "self_preferring": lambda made: {
        **PAIR,
        **{"algorithm.rounds": 2, "algorithm.iteration": 1, "actor.rollout.max_prompt_tokens": 256},
        **{"model.path": made["judge"], "data.prompts_per_step": 8},
    },
    "prompted_pairs": lambda made: {
        **{"algorithm.good": "good: {prompt}", "algorithm.negatives": ("bad:", "less bad:"), "algorithm.every": 1},
        "reference.model.path": made["other"],
    },
    "cyclealign": lambda made: {
        **{
            "algorithm.marker": "",
            "algorithm.question": "{prompt} {listing} scores:",
            "algorithm.samples_per_prompt": 4,
        },
        **{"judge.model.path": made["judge"], "data.prompts_per_step": 12},
    },
    "dueling": lambda made: {
        **ASKED,
        **{"judge.model.path": made["judge"], "algorithm.samples_per_prompt": 3, "algorithm.share": 1.0},
        **{"reward.function": MIXED, "reference.model.path": made["other"]},
    },
    "anchored_judge": lambda made: {
        **PAIR,
        **{"judge.model.path": made["judge"], "algorithm.samples_per_prompt": 3, "algorithm.mini_batches": 1},
    },
    "vulpo": lambda made: {
        **ASKED,
        **{"judge.model.path": made["judge"], "algorithm.samples_per_prompt": 3, "located.function": MIXED},
    },
    "oorl": lambda made: {
        **{"data.sources.groups.path": made["labelled"], "data.sources.groups.rows_per_step": 6},
        **{"data.sources.prompts.path": made["labelled"], "algorithm.samples_per_prompt": 3},
        "reward.function": MIXED,
    },
    "reward_router": lambda made: {
        **{"data.train.path": made["labelled"], "data.prompts_per_step": 12, "judge.model.path": made["judge"]},
        **{"algorithm.marker": "", "algorithm.truth": "{answer} {response}?", "algorithm.first_steps": 1},
        **{"algorithm.compare": "{response_a} {response_b} better:", "algorithm.mini_batches": 1},
    },
    "esrl": lambda made: {"reward.function": MIXED},
    "sparrow": lambda made: {
        **{"preference.model.path": made["scores"], "classifier.model.path": made["scores"]},
        **{"algorithm.rules": ("no one:", "no two:"), "algorithm.rule_prompt": "{rule} {prompt}"},
        "algorithm.user_turn": "{prompt} more:",
    },
    "annotators": lambda made: {
        **{"algorithm.pool": ("one", "two"), "algorithm.marker": "", "judge.model.path": made["judge"]},
        **{"algorithm.question": "{annotator} {response_a} {response_b}:", "data.prompts_per_step": 12},
    },
    "improvement": lambda made: {
        **{"algorithm.question": "{prompt} {shown_ids} better:", "algorithm.warmup": 0, "algorithm.harder_after": 1},
        "reward.model.path": made["scores"],
    },
    "credit_beam": lambda made: {
        **{"policy.model.path": made["other"], "algorithm.chunk": 3, "algorithm.depth": 2, "algorithm.branch": 2},
    },
    "ift": lambda made: {"algorithm.mix": 0.5},
    "ultrafeedback": lambda made: {
        **{"judge.model.path": made["judge"], "second.model.path": made["other"]},
        **{"algorithm.marker": "", "algorithm.question": "{prompt} {response} ASPECT: "},
        "algorithm.samples_per_model": 4,
        "judge.rollout.max_response_tokens": 1,
    },
    "rlhs": lambda made: {
        **{"judge.model.path": made["judge"], "world.model.path": made["other"], "algorithm.marker": ""},
        **{"algorithm.world": "{prompt} {response}", "algorithm.question": "{asked} {advice} {response}"},
        **{"data.prompts_per_step": 8, "judge.rollout.max_response_tokens": 1},
    },
    "refcritic": lambda made: {
        **{"solver.model.path": made["other"], "verifier.function": MIXED, "algorithm.refinements": 2},
        **{"algorithm.critique": "{prompt} {response}", "algorithm.refine": "{problem} {solution} {response}"},
    },
    "spark": lambda made: {
        **{"reward.function": MIXED, "algorithm.marker": "", "algorithm.samples_per_prompt": 3},
        **{"algorithm.pointwise": "{prompt} {response}", "algorithm.pairwise": "{response_a} {response_b}"},
        "algorithm.reflect": "{prompt} {response}",
    },
    "reflective": lambda made: {
        **{"reference.model.path": made["other"], "reward.function": MIXED},
        **{"algorithm.feedback": "{prompt} {response}", "algorithm.refine": "{asked} {draft} {response}"},
    },
    "popri": lambda made: {
        "encoder.model.path": made["other"],
        "data.sources.clients.path": made["labelled"],
        "data.sources.prompts.path": made["labelled"],
        "algorithm.samples_per_prompt": 4,
    },
    "nash_mp": lambda made: {"reward.function": MIXED},
    "meta_policy": lambda made: {
        **{"judge.model.path": made["judge"], "meta.model.path": made["other"], "algorithm.marker": ""},
        **{"algorithm.question": "{rubric} {prompt} {response}", "algorithm.meta": "{rubric} {samples}"},
        **{"algorithm.every": 1, "algorithm.begin": "", "algorithm.end": "", "algorithm.shown": 1},
        **{"algorithm.rubric": "short", "algorithm.mini_batches": 1},
    },
    "goal_conditioned": lambda made: {"data.train.path": made["labelled"]},
    "consistency": lambda made: {"reward.model.path": made["scores"]},
    "charm": lambda made: {
        **{f"data.sources.{name}.path": made["labelled"] for name in ("pairs", "unlabelled")},
        **{"reward.model.path": made["scores"], "algorithm.sure": 0.0},
    },
    "relevance": lambda made: {
        **{"data.train.path": made["labelled"], "retriever.function": MIXED, "algorithm.mini_batches": 1},
    },
    "step_consensus": lambda made: {
        **{"judge.model.path": made["judge"], "verifier.function": MIXED, "learner.model.path": made["scores"]},
        **{"algorithm.question": "{prompt} {response_ids}", "algorithm.marker": "", "algorithm.words": ("1", "2")},
        **{"algorithm.samples_per_prompt": 4, "algorithm.completions": 1, "algorithm.step_tokens": 8},
        "judge.rollout.max_response_tokens": 1,
    },
    "personal": lambda made: {"data.train.path": made["labelled"], "encoder.model.path": made["other"]},
    "domain_features": lambda made: {
        **{f"data.sources.{name}.path": made["labelled"] for name in ("prompts", "pairs")},
        **{"judge.model.path": made["judge"], "judge.rollout.max_response_tokens": 30, "algorithm.marker": ""},
        **{"algorithm.question": "{prompt} {response_ids}", "algorithm.samples_per_prompt": 4},
        **{"algorithm.highest": 1e30, "algorithm.mini_batches": 1},  # the judge says numbers of many digits
    },
    "teacher_forced": lambda made: {"teacher.model.path": made["other"]},
    "critic_spans": lambda made: {
        **{"judge.model.path": made["judge"], "reference.model.path": made["other"], "algorithm.mini_batches": 1},
        **{"algorithm.question": "{prompt} {response}", "algorithm.good": "", "algorithm.bad": ""},
    },
    "rlfr": lambda made: {
        "reward.function": MIXED,
        "data.sources.experts.path": made["labelled"],
        "data.sources.prompts.path": made["labelled"],
        "algorithm.samples_per_prompt": 4,
    },
    "deception": lambda made: {f"{role}.model.path": made["scores"] for role in ("weak", "taught", "ceiling")},
    "win_rate": lambda made: {
        **{"judge.model.path": made["judge"], "baseline.model.path": made["other"], "algorithm.marker": ""},
        "algorithm.question": "{response_a} {response_b}",
    },
    "self_improving": lambda made: {
        **{"judge.model.path": made["judge"], "algorithm.marker": "", "algorithm.words": ("1", "2")},
        **{"algorithm.write": "{prompt}", "algorithm.question": "{asked} {response}"},
        **{"algorithm.samples_per_problem": 4, "judge.rollout.max_response_tokens": 1},
    },
    "eva": lambda made: {
        **{"creator.model.path": made["other"], "reference.model.path": made["other"], "reward.function": MIXED},
        **{"algorithm.evolve": "{prompt}", "algorithm.evolved": 2},
    },
    "xpo": lambda made: {"reference.model.path": made["other"]},
}
"""Recipe -> settings that differ from the kit's; a recipe that is not here runs with the kit's."""


def settings_for(name: str, made: Made) -> dict[str, Any]:
    """Of a recipe, or of the file of a variant and what the variant has of its own."""
    given = SETTINGS.get(split_variant(name)[0], lambda made: {})(made)
    return {**given, "data.train.path": made["calls"]} if name == "grpo/toolrl" else given
