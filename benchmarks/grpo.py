"""`make bench-grpo`: GRPO end to end on SmolLM2-135M-Instruct in bfloat16, through Ray, vLLM and a training engine.

4 prompts x 8 samples of exactly 64 prompt and 64 response tokens (the copy of the model used here has no end token),
one update a step, no KL. Medians over the steps after the first two. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from controller.lifecycle.run import run
from controller.record.display import Display
from controller.record.metrics import read_metrics
from rlhf_dist.checks import check_launch
from rlhf_dist.compose import compose

PROMPTS, SAMPLES, TOKENS = 4, 8, 64
WARM_UP = 2
NODES = {
    "generate_s": "actor.generate_sequences",
    "log_prob_s": "actor.compute_log_prob",
    "train_s": "actor.update_actor",
    "sync_s": "actor.reshard",
}


def endless(model: Path, folder: Path) -> Path:
    """A copy of `model` (weights linked) in which no token ends a response, hence without its chat template."""
    folder.mkdir()
    unsaid = {"eos_token_id": None, "eos_token": None, "chat_template": None}
    for file in model.iterdir():
        if file.name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
            settings = json.loads(file.read_text())
            changed = {name: unsaid.get(name, value) for name, value in settings.items()}
            (folder / file.name).write_text(json.dumps(changed))
        elif file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file.resolve())
    return folder


def prompts(model: Path, file: Path) -> Path:
    """Rows whose prompts are exactly TOKENS tokens long."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for start in range(64):
        text = f"Question {start:02d}:" + " and then count" * TOKENS
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]
        cut = tokenizer.decode(ids)
        assert len(tokenizer(cut, add_special_tokens=False)["input_ids"]) == TOKENS, "the cut must fall between tokens"
        rows.append({"prompt": cut, "answer": str(start)})
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def reward(prompt: str, response: str, answer: str) -> float:
    """Something that differs between the samples of a prompt."""
    return len(set(response)) / 64


def main() -> int:
    """Run it and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("overrides", nargs="*", help="settings, e.g. placement.pools.all.slots=1")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = endless(given.model, folder / "model")
        settings = [
            *("task=none", "name=bench", f"output.root={folder}", f"steps={given.steps}"),
            *(f"model.path={model}", "model.dtype=bfloat16", f"data.train.path={prompts(model, folder / 'p.jsonl')}"),
            *(f"data.prompts_per_step={PROMPTS}", f"algorithm.samples_per_prompt={SAMPLES}", "algorithm.kl_coef=0"),
            *(f"data.max_prompt_tokens={TOKENS}", f"actor.rollout.max_response_tokens={TOKENS}"),
            *(
                f"reward.function={Path(__file__)}:reward",
                "output.save_model=false",
                "actor.engine.zero_stage=2",
                "output.rollouts_every=0",
            ),
        ]
        launch = compose("grpo", [*settings, *given.overrides])
        check_launch(launch)
        with Display("bench", given.steps, quiet=True) as display:
            run(launch, display)
        rows = read_metrics(folder / "bench")
    measured = rows[WARM_UP:]
    tokens = PROMPTS * SAMPLES * 2 * TOKENS
    assert all(row["actor/sequence_tokens"] == tokens for row in measured), "every sequence must be full"
    result: dict[str, float | int | list[float]] = {"step_s": round(median(row["step_s"] for row in measured), 3)}
    for key, node in NODES.items():
        result[key] = round(median(row.get(f"time_s/{node}", 0.0) for row in measured), 3)
    result["tokens_per_s"] = round(tokens / median(row["step_s"] for row in measured), 1)
    result["steps"] = len(measured)
    result["step_s_range"] = [round(f(row["step_s"] for row in measured), 3) for f in (min, max)]
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
