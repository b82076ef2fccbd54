"""What a model family can do beside its trainer: be exported, generate in vLLM, and be synced, tried on a tiny model.

    load ─> train a step ─> sync ─> generate: the log-probs of what was drawn are the trainer's
    train another ────────> sync ─> generate: so they are
    export ───────────────> transformers and vLLM read the folder: so are theirs

One process, one rank, no cluster: about 5 s a family. Tests call it, and `python -m tests.models_table --columns vllm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from rlhf_dist.algorithms.losses.nll import nll
from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig, RolloutConfig
from rlhf_dist.sampling import Sampling
from rlhf_dist.wire import WorkerContext
from workers.build_engines import new_generation_engine, new_training_engine
from workers.engines.generation.interface import Response
from workers.engines.training.interface import TrainingEngine
from workers.reshard.colocated import ColocatedSync

Runs = Literal["native", "transformers backend", "none"]
Syncs = Literal["pieces", "whole", "refused"]
TOLERANCE = 5e-4
"""Largest difference of two log-probs in float32, nats."""

_PROMPTS = [np.array(tokens, np.int32) for tokens in ([5, 9, 4], [7], [4, 4, 8, 20, 11, 30, 12])]
_ROLLOUT = RolloutConfig(max_prompt_tokens=64, max_response_tokens=12, kv_cache_bytes=16 << 20, bucket_bytes=1 << 20)


@dataclass(frozen=True, kw_only=True)
class ModelSupport:
    """One family; `ok` or why not, in one line."""

    trains: str
    """Its log-probs after a step are those of transformers reading what was exported."""
    export: str
    vllm: Runs
    sync: Syncs
    why: str = ""
    """Why vLLM does not run it, why whole tensors are sent, or what differs."""
    differences: tuple[float, ...] = ()
    """Largest log-prob differences from the trainer, nats: vLLM after each of two syncs, transformers on the export,
    vLLM on the export."""


def model_support(folder: Path, out: Path, engine: EngineConfig | None = None) -> ModelSupport:
    """Try the tiny model in `folder`; `out` is a new folder, for its export.

    The default process group has this one rank. The model has at least 40 tokens and heads of 32 or more (vLLM's CPU
    attention). Nothing is raised for a family that cannot: the answer says so.
    """
    context = WorkerContext(role="actor", rank=0, world=1, device="cpu", seed=0)
    try:
        trainer = new_training_engine(
            ModelConfig(path=str(folder)), engine or EngineConfig(), OptimizerConfig(lr=1e-2), "policy", context
        )
        trainer.step(_batch(_PROMPTS, [np.array([6, 13, 21], np.int32)] * len(_PROMPTS)), nll())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        return ModelSupport(trains=_line(error), export="not tried", vllm="none", sync="refused")
    found = ModelSupport(trains="ok", export="ok", vllm="none", sync="refused")
    try:
        generating = new_generation_engine(str(folder), _ROLLOUT, context, [[0]])
    except Exception as error:  # noqa: BLE001
        return _exported(trainer, out, replace(found, why=_line(error)))
    try:
        return _exported(trainer, out, _synced(trainer, generating, context, found), generating)
    finally:
        generating.close()


def _synced(trainer: TrainingEngine, generating: Any, context: WorkerContext, found: ModelSupport) -> ModelSupport:
    """Two syncs with a step between them, and what is generated after each."""
    backend = type(generating._model).__module__.startswith("vllm.model_executor.models.transformers")
    found = replace(found, vllm="transformers backend" if backend else "native")
    try:
        sync = ColocatedSync(trainer, generating, replace(_ROLLOUT, sleeps=False), context)
        for moved in (False, True):
            if moved:
                trainer.step(_batch(_PROMPTS, [np.array([8, 5], np.int32)] * len(_PROMPTS)), nll())
            sync.run(must_change=moved)
            found = _with(found, _vllm_difference(trainer, generating))
    except Exception as error:  # noqa: BLE001
        return replace(found, why=_line(error))
    return _judged(replace(found, sync="whole" if sync.fallback else "pieces", why=sync.fallback or ""), 2)


def _exported(trainer: TrainingEngine, out: Path, found: ModelSupport, generating: Any = None) -> ModelSupport:
    """The export as transformers reads it, and as vLLM does where it generates what was synced."""
    try:
        trainer.export(out)
        read = _transformers_difference(trainer, out)
        found = replace(_with(found, read), trains=_verdict(read))
        if generating is not None and found.sync != "refused":
            generating.read_folder(out)
            found = _judged(_with(found, _vllm_difference(trainer, generating)), 1)
    except Exception as error:  # noqa: BLE001
        return replace(found, export=_line(error))
    return found


def _judged(found: ModelSupport, last: int) -> ModelSupport:
    """Refused where one of the last differences is too large."""
    if (worst := max(found.differences[-last:])) <= TOLERANCE:
        return found
    return replace(found, sync="refused", why=f"vLLM's log-probs differ from the trainer's by {worst:.2g} nats")


def _vllm_difference(trainer: TrainingEngine, generating: Any) -> float:
    sampling = Sampling(n=2, temperature=1.0, max_tokens=_ROLLOUT.max_response_tokens)
    prompts = [prompt for prompt in _PROMPTS for _ in range(2)]
    drawn: list[Response] = generating.generate(_PROMPTS, sampling, list(range(len(prompts))))
    trained = _log_probs(trainer, prompts, [one.token_ids for one in drawn])
    return _largest([a - one.log_probs for a, one in zip(trained, drawn, strict=True)])


def _transformers_difference(trainer: TrainingEngine, folder: Path) -> float:
    # Eager: the library's other attentions leave out what some families have (soft caps, sinks).
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    responses = [np.array([10, 4, 6, 30, 8], np.int32)] * len(_PROMPTS)
    trained = _log_probs(trainer, _PROMPTS, responses)
    differences = []
    for prompt, response, ours in zip(_PROMPTS, responses, trained, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].float()
        theirs = logits.log_softmax(-1).gather(-1, torch.tensor(response, dtype=torch.int64)[:, None])[:, 0]
        differences.append(ours - theirs.numpy())
    return _largest(differences)


def _log_probs(
    trainer: TrainingEngine, prompts: Sequence[NDArray[np.int32]], responses: Sequence[NDArray[np.int32]]
) -> list[NDArray[np.float32]]:
    column = trainer.forward(_batch(prompts, responses), ["log_probs"])["log_probs"]
    return [column.row(k) for k in range(len(prompts))]


def _batch(prompts: Sequence[NDArray[np.int32]], responses: Sequence[NDArray[np.int32]]) -> Batch:
    ids = Column.ragged(responses, dtype=np.int32)
    columns = {
        "prompt_ids": Column.ragged(prompts, dtype=np.int32),
        "response_ids": ids,
        "response_mask": Column(np.ones(len(ids.values), np.uint8), ids.offsets),
        "group_id": Column.dense(range(len(prompts)), dtype=np.int64),
    }
    return Batch(columns, len(prompts))


def _with(found: ModelSupport, difference: float) -> ModelSupport:
    return replace(found, differences=(*found.differences, difference))


def _largest(differences: Sequence[NDArray[np.float32]]) -> float:
    largest = max(float(np.abs(one).max()) for one in differences)
    return largest if largest == largest else float("inf")


def _verdict(difference: float) -> str:
    return "ok" if difference <= TOLERANCE else f"log-probs differ from transformers' by {difference:.2g} nats"


def _line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return " ".join(text.split())[:300]
