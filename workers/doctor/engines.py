"""Training and generation engines on a tiny model: a step, a verified sync, sleep and wake, and the bytes they hold.

Each check is a role's worker of its own, and finds the engines of those before it among its peers.
"""

from __future__ import annotations

import gc
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_dist.algorithms.losses.nll import nll
from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig, RolloutConfig
from rlhf_dist.sampling import Sampling
from rlhf_dist.wire import WorkerContext
from workers.build_engines import new_generation_engine, new_training_engine
from workers.memory.arbiter import new_arbiter
from workers.reshard.colocated import ColocatedSync

MODEL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 8192}
"""8 M parameters. Heads of 64: vLLM's attention takes no smaller ones everywhere."""
LIMITS: dict[str, Any] = {
    "max_prompt_tokens": 16,
    "max_response_tokens": 8,
    "kv_cache_bytes": 16 << 20,
    "bucket_bytes": 1 << 20,
}
ROLLOUT = {
    "cpu": RolloutConfig(**LIMITS, dtype="float32", canary_tolerance=1e-2),
    # What vLLM's attention is made for on a GPU; in bfloat16 log-probs have outliers of 0.5.
    "cuda": RolloutConfig(**LIMITS, dtype="bfloat16", canary_tolerance=1.0),
}
"""By kind of device."""
_PHASES = ("actor.generate", "actor.update", "actor.sync")
_ANY_BYTES = 1 << 50
"""Of a device, until it is known what the largest phase needs."""
_PROMPTS = [np.array(tokens, np.int32) for tokens in ([5, 9, 4], [7, 11, 12, 13])]


class Training:
    """FSDP2: the model read by slices, and a step."""

    def __init__(self, context: WorkerContext, engine: EngineConfig | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rlhf-dist-doctor-")
        self.path = _save_model(Path(self._folder.name))
        before = live_bytes(context.device)
        config = engine or EngineConfig()
        optimizer = OptimizerConfig(lr=1e-3)
        self.engine = new_training_engine(ModelConfig(path=str(self.path)), config, optimizer, "policy", context)
        (self.path / "model.safetensors").unlink()  # has been read; a process that is killed leaves little behind
        first, second = (self.engine.step(_batch(), nll())["loss"].value for _ in range(2))
        self.held_bytes = live_bytes(context.device) - before
        if not second < first:
            raise RuntimeError(f"the loss of the same rows must fall in a step, got {first:.6f}, then {second:.6f}")
        self.remarks = (f"{config.name} over {context.world} ranks: two steps, loss {first:.3f} to {second:.3f}",)

    def close(self) -> None:
        """Remove the model."""
        self.engine.close()
        self._folder.cleanup()


class Cycle:
    """vLLM in the same process: sync, generate, leave the device to the trainer, sync and wake, generate the same.

    The device is as large as the largest phase needs, so that the others have to leave for it: on a CPU too.
    """

    def __init__(self, context: WorkerContext) -> None:
        """Raises what a sync raises (the log-probs of what is drawn are compared with the trainer's in it)."""
        self.training: Training = context.peers.get("training") or Training(context)
        self.rollout = ROLLOUT[torch.device(context.device).type]
        self.memory = new_arbiter(context.device, _ANY_BYTES, _PHASES, "doctor")
        here = replace(context, role="actor", memory=self.memory)
        self.memory.add_training("actor", self.training.engine, trained=True)
        self.memory.make_room()
        before = live_bytes(context.device)
        alone = [[rank] for rank in range(context.world)]
        self.engine = new_generation_engine(str(self.training.path), self.rollout, here, alone)
        self.held_bytes = live_bytes(context.device) - before
        self.sync = ColocatedSync(self.training.engine, self.engine, self.rollout, here)
        self.memory.ledger.budget = max(map(self.memory.ledger.predicted_bytes, self.memory.ledger.phases))
        report = self.sync.run(must_change=False)
        drawn = self._generate()
        self.memory.turn("actor.update")
        self._must_refuse()
        self.sync.run(must_change=False)
        if self._generate() != drawn:
            raise RuntimeError("greedy responses must be the same after sleep, sync and wake, and they are not")
        how = "whole tensors" if self.sync.fallback else "pieces"
        self.remarks = (
            f"vLLM beside the trainer: {report.parameters} parameters synced in {how} and verified in "
            f"{report.seconds:.2f} s; leaves for the trainer, refuses meanwhile, draws the same after waking",
        )

    def _generate(self) -> list[list[int]]:
        self.memory.turn("actor.generate")
        sampling = Sampling(n=1, greedy=True, temperature=1.0, max_tokens=self.rollout.max_response_tokens)
        return [one.token_ids.tolist() for one in self.engine.generate(_PROMPTS, sampling, [0] * len(_PROMPTS))]

    def _must_refuse(self) -> None:
        sampling = Sampling(n=1, greedy=True, temperature=1.0, max_tokens=1)
        try:
            self.engine.generate(_PROMPTS, sampling, [0] * len(_PROMPTS))
        except RuntimeError:
            return
        raise RuntimeError("vLLM must refuse to generate while it is the trainer's turn, and it generated")

    def close(self) -> None:
        """End the engine; again is no harm."""
        self.engine.close()
        self.training.close()


class Ledger:
    """Bytes that each engine brought, and that are on the device in each turn, beside the ledger's."""

    def __init__(self, context: WorkerContext) -> None:
        """`remarks`: what -> [bytes found, bytes that the ledger has] as JSON, of the rank where they differ most."""
        cycle: Cycle = context.peers.get("generation") or Cycle(context)
        told: list[Any] = [None] * context.world
        dist.all_gather_object(told, _found_and_predicted(cycle))
        worst = max(told, key=lambda rank: max(abs(found - predicted) for found, predicted in rank.values()))
        self.remarks = (json.dumps(worst),)
        self.close = cycle.close


def _found_and_predicted(cycle: Cycle) -> dict[str, tuple[int, int]]:
    """What -> (bytes found, bytes that the ledger has)."""
    ledger, moved = cycle.memory.ledger, cycle.memory.report()
    of = {tenant: sum(size for (who, _), size in ledger.sizes.items() if who == tenant) for tenant, _ in ledger.sizes}
    found = {
        "trainer": (cycle.training.held_bytes, of["actor"]),
        "vLLM": (cycle.held_bytes, of["actor.rollout"]),
    }
    most = max(moved[f"device_bytes_{name.rpartition('.')[2]}"].value for name in _PHASES)
    return {**found, "most in a turn": (int(most), int(ledger.budget or 0))}


class DeepSpeed(Training):
    """DeepSpeed ZeRO-3, the same steps."""

    def __init__(self, context: WorkerContext) -> None:
        super().__init__(context, EngineConfig(name="deepspeed"))


def live_bytes(device: str) -> int:
    """Bytes of all storages that tensors of this process have on a device."""
    kind, storages = torch.device(device).type, {}
    gc.unfreeze()  # vLLM hides what there was before it from the collector
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == kind:
            try:
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # a wrapper without memory of its own
                continue
    return sum(storages.values())


def _save_model(folder: Path) -> Path:
    torch.manual_seed(0)
    heads = MODEL["hidden_size"] // 64
    config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=False, **MODEL)
    # Not save_pretrained: inside a process group it writes on one rank only, and other nodes do not see its folder.
    save_file(LlamaForCausalLM(config).state_dict(), folder / "model.safetensors", {"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.to_json_file(folder / "config.json", use_diff=False)
    return folder


def _batch() -> Batch:
    responses = [np.array(tokens, np.int32) for tokens in ([6, 13, 21], [8, 5])]
    ids = Column.ragged(responses, dtype=np.int32)
    columns = {
        "prompt_ids": Column.ragged(_PROMPTS, dtype=np.int32),
        "response_ids": ids,
        "response_mask": Column(np.ones(len(ids.values), np.uint8), ids.offsets),
        "group_id": Column.dense(range(len(responses)), dtype=np.int64),
    }
    return Batch(columns, len(responses))
