"""What the tests run inside a rank: one engine per process, its weights made from a seed on every rank alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from rlhf_dist.config import RolloutConfig
from rlhf_dist.reshard.checksum import full_checksum
from rlhf_dist.reshard.layout import Layout, ParameterLayout
from rlhf_dist.sampling import Sampling
from rlhf_dist.wire import WorkerContext

Answers = list[tuple[list[int], list[float], bool]]

_engine: Any = None
_folder: Path


def open_engine(kind: str, folder: Path, device: str = "cpu", **rollout: Any) -> None:
    global _engine, _folder
    close_engine()
    if kind == "vllm":
        from workers.engines.generation.vllm import VllmEngine as Engine
    else:
        from workers.engines.generation.transformers import TransformersEngine as Engine  # type: ignore[assignment]
    limits = {"max_prompt_tokens": 200, "max_response_tokens": 12, "kv_cache_bytes": 16 << 20} | rollout
    _folder = folder
    _engine = Engine(
        model_path=str(folder),
        rollout=RolloutConfig(**limits),
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        device=torch.device(device),
    )


def close_engine() -> None:
    global _engine
    if _engine is not None:
        _engine.close()
        _engine = None


def sync(version: int, seed: int, fault: str = "", fault_rank: int = 0) -> dict[str, Any]:
    """Sends the weights of `seed`, with one fault; returns what came of it."""
    faulty = dist.get_rank() == fault_rank
    weights = _in_files(_model(seed))
    expected = {name: full_checksum(tensor) for name, tensor in weights.items()}
    victim = "model.layers.1.self_attn.k_proj.weight"
    if faulty and fault == "corrupted":
        weights[victim] = weights[victim] + torch.eye(*weights[victim].shape) * 1e-3
    if faulty and fault == "missing":
        del weights[victim]
    if faulty and fault == "nothing":
        weights = {}
    if faulty and fault == "unknown":
        weights["model.layers.1.self_attn.k_proj.scale"] = torch.ones(3)
    if faulty and fault == "dtype":
        weights[victim] = weights[victim].double()
    if faulty and fault == "unannounced":  # what is announced arrives, and the model needs one more
        del weights[victim], expected[victim]
    if faulty and fault == "sender":
        weights[victim] = torch.zeros(0)
    try:
        report = _engine.receive_weights(version, _buckets(weights, fails=faulty and fault == "sender"), expected)
    except RuntimeError as error:
        return {"error": type(error).__name__, "message": str(error), "version": _engine.weights_version}
    return {"parameters": report.parameters, "bytes": report.bytes, "version": _engine.weights_version}


def sync_without_packing(version: int, seed: int) -> dict[str, Any]:
    """A sync in which the packed kernels are not built again: vLLM's own mistake with tied embeddings."""
    from workers.engines.generation import vllm_weights

    pack = vllm_weights.pack
    vllm_weights.pack = lambda model: None
    try:
        return sync(version, seed)
    finally:
        vllm_weights.pack = pack


def generate(prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> Answers | str:
    try:
        responses = _engine.generate([np.array(prompt, dtype=np.int32) for prompt in prompts], sampling, seeds)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    assert all(r.token_ids.dtype == np.int32 and r.log_probs.dtype == np.float32 for r in responses)
    return [(r.token_ids.tolist(), r.log_probs.tolist(), r.finished) for r in responses]


def by_request(prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> tuple[Answers, list[int], str]:
    """The same one by one, each added a step after the one before, the last first; what one that was aborted after
    three steps had drawn; and what a sync meanwhile is told."""
    from workers.engines.generation.interface import Request

    one = replace(sampling, n=1)
    rows = [np.array(prompt, dtype=np.int32) for prompt in prompts for _ in range(sampling.n)]
    waiting = [Request(name=f"r{k}", token_ids=rows[k], sampling=one, seed=seeds[k]) for k in range(len(rows))]
    _engine.add(replace(waiting[0], name="aborted"))
    done: dict[str, Any] = {}
    steps, so_far, refused = 0, [], ""
    while len(done) < len(rows):
        if waiting:
            _engine.add(waiting.pop())
        done |= dict(_engine.step())
        steps += 1
        if steps == 3:
            refused = str(sync(9, 9).get("message", "it was taken"))
            so_far = _engine.abort("aborted").token_ids.tolist()
    found = [done[f"r{k}"] for k in range(len(rows))]
    assert all(set(r.versions.tolist()) == {_engine.weights_version} for r in found)
    return [(r.token_ids.tolist(), r.log_probs.tolist(), r.finished) for r in found], so_far, refused


def told_of(prompts: list[list[int]], sampling: Sampling, seeds: list[int], stop_after: int) -> tuple[list[int], bool]:
    """Places that `done` was told of, in one wave and in one that was stopped after some tokens and went on; and
    whether it was told what was then returned."""
    rows = [np.array(prompt, dtype=np.int32) for prompt in prompts]
    places, same = list[int](), True
    for stops in (False, True):
        told: dict[int, Any] = {}
        left = [stop_after if stops else 0]

        def done(place: int, response: Any, told: dict[int, Any] = told) -> None:
            assert place not in told, "once each"
            told[place] = response

        def stop(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] == 0

        wave: dict[str, Any] = {"stop": stop if stops else None, "done": done}
        responses = _engine.generate(rows, sampling, seeds, **wave)
        assert any(one.interrupted for one in responses) == stops
        if stops:
            assert 0 < len(told) < len(responses), "some were done by then"
            responses = _engine.generate(rows, sampling, seeds, begun=responses, **wave)
        same = same and all(
            told[k].token_ids.tolist() == one.token_ids.tolist() and told[k].finished == one.finished
            for k, one in enumerate(responses)
        )
        places += sorted(told)
    return places, same


def random_launches(
    prompts: list[list[int]], sampling: Sampling, seeds: list[int], stops: bool
) -> tuple[int, int, bool]:
    """(calls that draw random numbers, tokens of the longest response, whether responses of one prompt differ)."""
    rows = [np.array(prompt, dtype=np.int32) for prompt in prompts]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        responses = _engine.generate(rows, sampling, seeds, stop=(lambda: False) if stops else None)
    calls = sum(event.count for event in profile.key_averages() if event.key in ("aten::random_", "aten::exponential_"))
    tokens = [tuple(response.token_ids.tolist()) for response in responses]
    return calls, max(map(len, tokens)), len(set(tokens)) > len(prompts)


def eager_on(device: str) -> bool:
    """Whether vLLM runs without CUDA graphs there."""
    from workers.engines.generation.vllm import _engine_args

    return bool(_engine_args(str(_folder), RolloutConfig(), torch.device(device), sees_peers=True).enforce_eager)


def own_share(prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> Answers | str:
    """Data parallel: rank r generates every world-th prompt, starting at r."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = [seeds[i * sampling.n : (i + 1) * sampling.n] for i in range(len(prompts))][rank::world]
    return generate(prompts[rank::world], sampling, [seed for row in rows for seed in row])


def largest_difference(seed: int, prompts: list[list[int]], answers: Answers, sampling: Sampling) -> float:
    """Largest |log-prob - the one a plain forward pass of the weights of `seed` gives|."""
    model, worst = _model(seed), 0.0
    for prompt, (tokens, log_probs, _) in zip(
        [prompt for prompt in prompts for _ in range(sampling.n)], answers, strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        wanted = (logits / sampling.temperature).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, float((wanted - torch.tensor(log_probs)).abs().max()))
    return worst


def random_stream() -> list[float]:
    return torch.rand(2).tolist()


def seed_random_stream(seed: int) -> None:
    torch.manual_seed(seed)


def sleep_then(prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> tuple[Answers | str, Answers | str]:
    _engine.sleep()
    asleep = generate(prompts, sampling, seeds)
    _engine.wake()
    return asleep, generate(prompts, sampling, seeds)


def group_works() -> float:
    one = torch.ones(())
    dist.all_reduce(one)
    return float(one)


def shared_memory_names() -> list[str]:
    """Shared-memory files of this process's engine."""
    return [name for name in os.listdir("/dev/shm") if os.environ["VLLM_DIST_IDENT"] in name]


def _model(seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(_folder)).eval()


def _in_files(model: Any) -> dict[str, Tensor]:
    """What transformers would save of a model."""
    held = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, held).items()}


def _buckets(weights: dict[str, Tensor], fails: bool) -> Iterator[list[tuple[str, Tensor]]]:
    items = list(weights.items())
    for start in range(0, len(items), 3):
        if fails and start:
            raise RuntimeError("the gather timed out")
        yield items[start : start + 3]


class HeldWeights:
    """A trainer that trains nothing: the weights of a seed, sharded on dim 0 over the ranks, float32."""

    def __init__(self, seed: int, version: int) -> None:
        self.version = version
        self._full = _in_files(_model(seed))

    adapters: dict[str, Any] = {}

    def layout(self, part: str = "merged") -> Layout:
        ranks = np.arange(dist.get_world_size())
        return Layout(
            len(ranks),
            {n: ParameterLayout.from_mesh(tuple(t.shape), "float32", ranks, [0]) for n, t in self._full.items()},
        )

    def local_shards(self, part: str = "merged") -> dict[str, list[Tensor]]:
        boxes = {name: p.boxes_of(dist.get_rank()) for name, p in self.layout().parameters.items()}
        return {n: [t[tuple(slice(*edge) for edge in box)] for box in boxes[n]] for n, t in self._full.items()}

    def full_weights(self, dtype: torch.dtype, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        for name, tensor in self._full.items():
            yield [(name, tensor.to(dtype))]

    def checksums(self, dtype: torch.dtype) -> dict[str, int]:
        return {name: full_checksum(tensor.to(dtype)) for name, tensor in self._full.items()}


_colocated: Any = None


def reshard(version: int, seed: int, traces: bool = True) -> dict[str, Any]:
    """A colocated sync of the weights of `seed`; `traces` False: as if the model could not be traced."""
    global _colocated
    from workers.engines.generation.interface import Untraceable
    from workers.reshard.colocated import ColocatedSync

    if version == 1:
        if not traces:

            def refuse(shapes: Any) -> Any:
                raise Untraceable("this test wants whole tensors")

            _engine.trace = refuse
        context = WorkerContext(role="actor", rank=dist.get_rank(), world=dist.get_world_size(), device="cpu", seed=0)
        config = RolloutConfig(bucket_bytes=1 << 20, sleeps=False)
        _colocated = ColocatedSync(HeldWeights(seed, version), _engine, config, context)
    _colocated._engine = HeldWeights(seed, version)
    report = _colocated.run(must_change=version > 1)
    world = dist.get_world_size()
    return {
        "fallback": _colocated.fallback,
        "version": _engine.weights_version,
        "received": report.bytes_received,
        "planned": _colocated.pieces.planned_bytes if _colocated.pieces else None,
        "world": world,
    }


def episodes(prompts: list[str]) -> list[list[tuple[list[int], int, list[int]]]]:
    """Two turns of each with a tool between, one of them let go of: (context, seed, drawn tokens) of every turn."""
    import asyncio

    from rlhf_dist.batch import Batch, Column
    from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
    from rlhf_dist.sampling import seed_of
    from rlhf_dist.testing.tiny_model import VOCABULARY
    from rlhf_dist.wire import Call
    from workers.episodes.copies import Copy
    from workers.episodes.run import run_episodes

    class Turns(Environment):
        async def episode(self, chat: Chat, row: Row) -> None:
            await chat.generate(max_tokens=4)
            await asyncio.sleep(0.05 * len(row.prompt))
            chat.say("?")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(chat.generate(max_tokens=5), 1e-3 if row.prompt == "2" else 60)
            chat.reward(1.0)

    ids = [[1, *(VOCABULARY[one] for one in text)] for text in prompts]
    batch = Batch({"prompt_ids": Column.ragged(ids, np.int32), "prompt": Column.strings(prompts)})
    call = Call(num_rows=len(prompts), row_index=np.arange(len(prompts)), step=0, node="n", line="", seed=0)
    limits, sampling = EpisodeLimits(), Sampling(max_tokens=12)
    with Copy([_engine]) as copy:
        if not copy.leads:
            copy.follow()
            played = []
        else:
            played = run_episodes(copy.of(_engine), str(_folder), batch, call, Turns(), limits, sampling, 200)
    assert not _engine._added, "nothing is left in flight, on any rank"
    found = []
    for episode in played:
        turns, context = [], list(episode.chat.conversation.prompt)
        for piece in episode.chat.conversation.pieces:
            if piece.turn >= 0:
                turns.append((list(context), seed_of(episode.chat.seed, piece.turn), piece.token_ids.tolist()))
            context += piece.token_ids.tolist()
        found.append(turns)
    return found
