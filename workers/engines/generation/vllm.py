"""Generation with vLLM, in the process and process group of the training rank (HybridFlow's HybridEngine).

world of W ranks, tensor_parallel t:   W/t copies of the model (data parallel) on t ranks each; which ranks, the
           caller says (`copies`), so that training shards lie inside generation shards

generate:  requests ──> LLMEngine.step() until none is left       every rank of a copy runs the same
           steps on the same requests; the only waits are vLLM's collectives inside the copy
add, step: the same, requests coming and going as the caller says, alike on every rank of a copy
sync:      invalidate ──> load bucket by bucket ──> pack ──> read back ──> prefix cache reset
"""

from __future__ import annotations

import copy
import gc
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from rlhf_dist.config import RolloutConfig
from rlhf_dist.data.ends import end_token_ids
from rlhf_dist.quantised import quantised
from rlhf_dist.reshard.checks import check_tensor_parallel
from rlhf_dist.reshard.layout import Box
from rlhf_dist.reshard.shards import Shards
from rlhf_dist.sampling import Sampling
from workers.engines.files.file_tensors import file_tensors, kept_buffers, parameters_of
from workers.engines.files.load import fill_whole, load
from workers.engines.generation.interface import (
    BOTH,
    DROPPED,
    NOTHING_DRAWN,
    Bucket,
    Ends,
    GenerationEngine,
    Request,
    Response,
    SleepPart,
    SyncedEngine,
    WeightSyncError,
    check_added,
    check_request,
    continued,
    resumed_seed,
    stream_seed,
)

# Read by vLLM when it is imported. In-process, with the one model runner whose sampler we extend; the rest are
# defaults a user's environment may override. VLLM_CPU_KVCACHE_SPACE would override kv_cache_bytes.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import EngineArgs, SamplingParams  # noqa: E402
from vllm.config import LoadConfig  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher  # noqa: E402

from workers.device import sees_its_peers  # noqa: E402
from workers.engines.generation import vllm_classes, vllm_heap, vllm_trace, vllm_weights  # noqa: E402
from workers.engines.generation.vllm_sampler import FullVocabularySampler  # noqa: E402
from workers.engines.generation.vllm_sleep import Bed, CudaBed, HostBed  # noqa: E402

T = TypeVar("T")
_MAX_REQUESTS = 1024
"""Requests in one scheduler step; the KV cache is the tighter limit."""
_MAX_BATCHED_TOKENS = 8192
"""Prompt tokens in one scheduler step."""
_CPU_BLOCK_TOKENS = 32
"""KV cache block on a CPU, tokens: vLLM's 128 would leave most of a short response's block empty."""


class VllmEngine(SyncedEngine):
    """See GenerationEngine. The default process group must exist; all its ranks construct the engine together."""

    def __init__(
        self,
        *,
        model_path: str,
        rollout: RolloutConfig,
        rank: int,
        world: int,
        device: torch.device,
        copies: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """copies: the ranks of each copy of the model, ascending; None: consecutive ranks."""
        super().__init__(getattr(torch, rollout.dtype))
        config = json.loads((Path(model_path) / "config.json").read_text())
        if how := quantised(Path(model_path), config):
            raise ValueError(f"{model_path} {how}")
        check_tensor_parallel(config, rollout.tensor_parallel, world)
        if not dist.is_initialized() or dist.get_world_size() != world:
            raise ValueError(
                f"VllmEngine needs the default process group of its {world} ranks, got "
                f"{dist.get_world_size() if dist.is_initialized() else 'none'}; call init_process_group first"
            )
        self._rollout = rollout
        self._end_tokens = end_token_ids(model_path)
        self._request_ids = count()
        self._added: set[str] = set()
        self._tracing: vllm_trace.Tracing | None = None
        self._random_devices = [device] if device.type == "cuda" else []
        name = _shared_name()
        # vLLM seeds the process's random streams; they are the trainer's.
        size = rollout.tensor_parallel
        copies = copies or [range(first, first + size) for first in range(0, world, size)]
        order = [rank for group in copies for rank in group]
        sees_peers = sees_its_peers(copies, _device_indices(device, world))
        kept = vllm_classes.classes_kept()
        heap = vllm_heap.made_beside_a_frozen_heap()
        with heap, torch.random.fork_rng(), vllm_weights.parameters_kept(), _rank_order(order), kept as decorated:
            vllm_config = _engine_args(model_path, rollout, device, sees_peers).create_engine_config()
            self._engine: LLMEngine | None = LLMEngine(
                vllm_config,
                executor_class=_executor_class(name, rank, device),
                log_stats=False,
                multiprocess_mode=False,
            )
        _unlink_shared_memory(name)
        # vLLM's own shutdown, also run at exit, would destroy the default process group: close() does the rest of it.
        self._engine.engine_core._finalizer.detach()
        runner = self._engine.model_executor.driver_worker.worker.model_runner
        runner.sampler = FullVocabularySampler()
        self._model: torch.nn.Module = runner.model
        vllm_classes.move(self._model, decorated)
        vllm_weights.check_experts(self._model)
        self._bed: Bed = CudaBed(self._engine) if device.type == "cuda" else HostBed(self._engine, device)

    def generate(
        self,
        prompts: Sequence[NDArray[np.integer]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        begun: Sequence[Response] | None = None,
        stop: Callable[[], bool] | None = None,
        ends: Ends | None = None,
        mixture: tuple[GenerationEngine, float] | None = None,
        done: Callable[[int, Response], None] | None = None,
    ) -> list[Response]:
        """See GenerationEngine."""
        if mixture is not None:
            raise ValueError("vLLM draws from one model; set rollout.engine=transformers for a mixture of logits")
        engine = self._running("generate")
        self._require_weights()
        rollout = self._rollout
        check_request(
            prompts,
            sampling,
            seeds,
            max_prompt_tokens=rollout.max_prompt_tokens,
            max_response_tokens=rollout.max_response_tokens,
        )
        self._require_idle("generate")
        params = self._sampling_params(sampling)
        if stop is not None or ends is not None:  # what has been drawn so far must be at hand at any time
            params.output_kind = RequestOutputKind.CUMULATIVE
        places: dict[str, int] = {}
        responses: list[Response] = list(begun or [NOTHING_DRAWN] * len(seeds))
        for place, (seed, before) in enumerate(zip(seeds, responses, strict=True)):
            if not before.interrupted:
                continue
            own, request_id, drawn = copy.copy(params), str(next(self._request_ids)), len(before.token_ids)
            # A seed of its own is a kernel for each request and token. Where generation may be stopped at any token,
            # what is drawn depends on the moment anyway, and one stream serves all requests.
            own.seed = None if sampling.greedy or stop is not None else stream_seed(resumed_seed(seed, drawn))
            own.max_tokens = sampling.max_tokens - drawn
            tokens = [*prompts[place // sampling.n].tolist(), *before.token_ids.tolist()]
            engine.add_request(request_id, {"type": "token", "prompt_token_ids": tokens}, own)
            places[request_id] = place
        latest: dict[str, Any] = {}

        def keep(request_id: str, *, ended: bool = False) -> None:
            place, now = places.pop(request_id), self._response(latest.pop(request_id))
            now = replace(now, finished=True, interrupted=False) if ended else now
            responses[place] = continued(responses[place], now)
            if done is not None and not responses[place].interrupted:
                done(place, responses[place])

        with torch.random.fork_rng(devices=self._random_devices):
            if stop is not None and seeds:
                before_all = sum(len(response.token_ids) for response in responses)
                torch.manual_seed(stream_seed(resumed_seed(seeds[0], before_all)))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if (request_id := output.request_id) not in places:
                        continue  # what it says of one that `ends` has ended
                    latest[request_id] = output.outputs[0]
                    ended = ends is not None and _at_its_end(responses[places[request_id]], output, ends)
                    if ended:
                        engine.abort_request([request_id])
                    if ended or output.finished:
                        keep(request_id, ended=ended)
                if stop is not None and engine.has_unfinished_requests() and self._anyone(stop()):
                    engine.abort_request(list(places))
        for request_id in list(latest):
            keep(request_id)
        assert stop is not None or not any(r.interrupted for r in responses), "vLLM left requests without an output"
        return responses

    def add(self, request: Request) -> None:
        """See GenerationEngine."""
        engine, rollout = self._running("generate"), self._rollout
        self._require_weights()
        most = rollout.max_prompt_tokens + rollout.max_response_tokens
        check_added(request, self._added, max_tokens=most)
        params = self._sampling_params(request.sampling)
        params.seed = None if request.sampling.greedy else stream_seed(request.seed)
        self._added.add(request.name)
        engine.add_request(request.name, {"type": "token", "prompt_token_ids": request.token_ids.tolist()}, params)

    def step(self) -> list[tuple[str, Response]]:
        """See GenerationEngine."""
        engine = self._running("generate")
        with torch.random.fork_rng(devices=self._random_devices):
            done = [(output.request_id, self._response(output.outputs[0])) for output in engine.step()]
        self._added -= {name for name, _ in done}
        return done

    def abort(self, name: str) -> Response:
        """See GenerationEngine."""
        engine = self._running("generate")
        self._added.remove(name)
        # Outputs come when a request is done; what one has drawn before that, its state has.
        state = engine.output_processor.request_states[engine.output_processor.external_req_ids[name][0]]
        tokens = np.array(state.detokenizer.output_token_ids, dtype=np.int32)
        log_probs = np.asarray(state.logprobs_processor.logprobs.logprobs, dtype=np.float32)
        engine.abort_request([name])
        return Response(tokens, log_probs[: len(tokens)], self._versions(len(tokens)), finished=False, interrupted=True)

    @property
    def _in_flight(self) -> Collection[str]:
        return self._added

    def _versions(self, tokens: int) -> NDArray[np.int32]:
        return np.full(tokens, self._version, dtype=np.int32)

    def _response(self, completion: Any) -> Response:
        tokens = np.asarray(completion.token_ids, dtype=np.int32)
        log_probs = np.asarray(completion.logprobs.logprobs, dtype=np.float32)
        assert len(tokens) == len(log_probs), f"{len(tokens)} tokens with {len(log_probs)} log-probs"
        reason, versions = completion.finish_reason, self._versions(len(tokens))
        interrupted = reason not in ("stop", "length")
        return Response(tokens, log_probs, versions, finished=reason == "stop", interrupted=interrupted)

    def _anyone(self, wants: bool) -> bool:
        """Whether a rank of this copy wants to stop: all of them must do so after the same step."""
        if self._rollout.tensor_parallel == 1:
            return wants
        flag = torch.tensor([int(wants)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=parallel_state.get_tp_group().cpu_group)
        return bool(flag)

    @property
    def ranks_of_copy(self) -> tuple[int, int]:
        """See GenerationEngine."""
        group = parallel_state.get_tp_group()
        return group.rank_in_group, group.world_size

    def told(self, said: T) -> T:
        """See GenerationEngine."""
        box: list[Any] = [said]
        if self._rollout.tensor_parallel > 1:
            group = parallel_state.get_tp_group()
            dist.broadcast_object_list(box, src=group.ranks[0], group=group.cpu_group)
        told: T = box[0]
        return told

    def held_bytes(self) -> dict[SleepPart, int]:
        """See GenerationEngine."""
        return self._bed.held_bytes()

    def sleep(self, parts: Sequence[SleepPart] = BOTH, *, keep: bool = True) -> int:
        """See GenerationEngine."""
        assert self._engine is not None, "sleep() after close()"
        leaving: Sequence[SleepPart] = ("cache", "weights") if "weights" in parts else parts
        if "weights" in parts and not keep:
            self.refuse(DROPPED)
        keep = keep and self._began  # before the first sync there is nothing to keep
        return sum(self._bed.lay(part, keep) for part in leaving if part not in self._bed.asleep)

    def wake(self, parts: Sequence[SleepPart] = BOTH) -> int:
        """See GenerationEngine."""
        assert self._engine is not None, "wake() after close()"
        return sum(self._bed.wake(part) for part in parts if part in self._bed.asleep)

    def close(self) -> None:
        """See GenerationEngine."""
        if self._engine is None:
            return
        core = self._engine.engine_core.engine_core
        core.structured_output_manager.clear_backend()
        with vllm_heap.frozen_heap_kept():
            core.model_executor.shutdown()
        core.scheduler.shutdown()
        self.refuse("the engine is closed")
        del core, self._model, self._bed
        self._engine = None
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:  # the groups vLLM made of the default group, not that group itself
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        gc.collect()

    def _running(self, call: str) -> LLMEngine:
        if self._engine is None:
            raise RuntimeError(f"{call}() needs an open engine, this one is closed; construct another")
        if self._bed.asleep & (set(BOTH) if call == "generate" else {"weights"}):
            raise RuntimeError(f"{call}() needs an engine that is awake; call wake() first")
        return self._engine

    def _sampling_params(self, sampling: Sampling) -> SamplingParams:
        if sampling.temperature < 0.01:
            raise ValueError(f"temperature must be >= 0.01 for vLLM, got {sampling.temperature}; use greedy=True")
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            top_k=1 if sampling.greedy else sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self._end_tokens,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )

    def _begin_install(self) -> None:
        self._running("receive_weights")
        self._bed.written()
        vllm_weights.invalidate(self._model)

    def _install(self, bucket: Bucket) -> None:
        self._model.load_weights(bucket)  # type: ignore[operator]

    def _finish_install(self, version: int, expected: Mapping[str, int]) -> None:
        if names := vllm_weights.unwritten(self._model):
            raise WeightSyncError(
                version,
                "vLLM's model must be written completely and hold no NaN (or the trained weights have one)",
                names,
            )
        self._make_ready(version)

    def _make_ready(self, version: int) -> None:
        vllm_weights.pack(self._model)
        if names := vllm_weights.mispacked(self._model):
            raise WeightSyncError(version, "vLLM's packed kernels must compute what their parameters say", names)
        if not self._running("receive_weights").reset_prefix_cache():
            raise WeightSyncError(version, "the prefix cache must be empty of the old version; requests still run")

    def trace(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Box]]:
        """See GenerationEngine."""
        self._running("trace")
        vllm_weights.open_for_writing(self._model)
        try:
            self._tracing = vllm_trace.trace(self._model, shapes, self._dtype)
        finally:
            vllm_weights.pack(self._model)
        return {name: [box for box, _ in places] for name, places in self._tracing.boxes.items()}

    def _target_shards(self) -> Shards:
        assert self._tracing is not None, "trace() comes before receive_shards()"
        self._running("receive_shards")
        self._bed.written()
        vllm_weights.open_for_writing(self._model)
        parameters = dict(self._model.named_parameters())
        return {name: [w.view(parameters) for _, w in places] for name, places in self._tracing.boxes.items()}

    def _begin_shards(self) -> None:
        self._running("receive_shards")

    def _finish_shards(self, version: int) -> None:
        assert self._tracing is not None, "trace() comes before receive_shards()"
        self._tracing.complete(self._model)
        self._make_ready(version)

    def read_folder(self, folder: Path) -> None:
        """Take the weights of a model folder the way vLLM reads one; the version held stays what it was.

        Raises ValueError for a parameter that vLLM does not find in it.
        """
        self._begin_install()
        source = DefaultModelLoader.Source(str(folder), revision=None)
        weights = DefaultModelLoader(LoadConfig())._get_weights_iterator(source)
        self._model.load_weights(weights)  # type: ignore[operator]
        if names := vllm_weights.unwritten(self._model):
            raise ValueError(f"{folder} must hold every parameter of vLLM's model, and lacks {', '.join(names[:3])}")
        self._make_ready(self._version)

    def _read(self, folder: Path, init: str, seed: int) -> None:
        if init == "pretrained":
            self.read_folder(folder)
            return
        hf, start, _ = load(folder, init, "policy", seed, trained=False)
        if start is not None:
            fill_whole(hf, start, torch.device("cpu"))
        held = {name: tensor.detach() for name, tensor in (parameters_of(hf) | kept_buffers(hf)).items()}
        files = file_tensors(hf, {name: tensor.shape for name, tensor in held.items()})
        self._begin_install()
        for name in files:
            self._install([(name, files.read(name, held).to(self._dtype))])
        if names := vllm_weights.unwritten(self._model):
            raise ValueError(f"vLLM's model of {folder} must be written completely, and lacks {', '.join(names[:3])}")
        self._make_ready(0)

    def _failures_of_peers(self, failure: str | None) -> list[str]:
        if self._engine is None or self._rollout.tensor_parallel == 1:
            return []
        group = parallel_state.get_tp_group()
        told: list[str | None] = [None] * group.world_size
        dist.all_gather_object(told, failure, group=group.cpu_group)
        return [f"rank {group.ranks[i]}: {text}" for i, text in enumerate(told) if text and i != group.rank_in_group]


@contextmanager
def _rank_order(order: Sequence[int]) -> Iterator[None]:
    """vLLM's groups made inside have rank order[i] where vLLM, which only knows consecutive groups, says i."""
    make = parallel_state.init_model_parallel_group

    def in_order(group_ranks: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        return make([[order[i] for i in group] for group in group_ranks], *args, **kwargs)

    parallel_state.init_model_parallel_group = in_order
    try:
        yield
    finally:
        parallel_state.init_model_parallel_group = make


def _engine_args(model_path: str, rollout: RolloutConfig, device: torch.device, sees_peers: bool) -> EngineArgs:
    cpu = device.type == "cpu"
    max_tokens = rollout.max_prompt_tokens + rollout.max_response_tokens
    where: dict[str, Any] = (
        {"block_size": _CPU_BLOCK_TOKENS}
        if cpu
        # Triton's kernels take experts as they are loaded; the others rearrange them, and a sync would not.
        else {"gpu_memory_utilization": rollout.gpu_memory_share, "enable_sleep_mode": True, "moe_backend": "triton"}
    )
    return EngineArgs(
        model=model_path,
        trust_remote_code=False,
        load_format="dummy",
        dtype=rollout.dtype,
        tensor_parallel_size=rollout.tensor_parallel,
        distributed_executor_backend="external_launcher",
        skip_tokenizer_init=True,
        generation_config="vllm",
        enforce_eager=cpu,
        # It opens the other ranks' memory as devices 0, 1, ... of this process; NCCL needs no such names.
        disable_custom_all_reduce=not sees_peers,
        kv_cache_memory_bytes=rollout.kv_cache_bytes if cpu or rollout.kv_cache_bytes else None,
        max_model_len=max_tokens,
        max_num_seqs=_MAX_REQUESTS,
        max_num_batched_tokens=max(_MAX_BATCHED_TOKENS, max_tokens),
        async_scheduling=False,
        disable_log_stats=True,
        seed=0,
        **where,
    )


def _shared_name() -> str:
    """A name drawn by rank 0: what vLLM's shared memory is called is else the same for every run on a host."""
    name: list[str] = [uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    return name[0]


def _device_indices(device: torch.device, world: int) -> list[int]:
    """[world] the index of each rank's device among those its own process sees."""
    told: list[int] = [0] * world
    dist.all_gather_object(told, device.index or 0)
    return told


def _unlink_shared_memory(name: str) -> None:
    # vLLM's ranks have mapped it by now (a barrier follows the mapping); without a name it goes with the last
    # of them, however they end.
    for file in Path("/dev/shm").glob(f"{name}*"):
        file.unlink(missing_ok=True)


def _executor_class(name: str, rank: int, device: torch.device) -> type[ExecutorWithExternalLauncher]:
    class InDefaultGroup(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            # Never connected to, since the default group exists; vLLM takes names from the part after the colon.
            return f"tcp://default-group:{name}", rank, device.index or 0

    return InDefaultGroup


def _at_its_end(before: Response, output: Any, ends: Ends) -> bool:
    """Whether `ends` says so of a request's tokens, those drawn `before` included; not asked where it ended itself."""
    completion = output.outputs[0]
    return completion.finish_reason != "stop" and ends.after(before.token_ids, completion.token_ids)
