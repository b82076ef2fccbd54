"""Generation with transformers alone: the embedded fallback, one copy of the model per rank.

Rows are padded on the left, join while others are being drawn, and leave when they end (`cohort.py`). Slower than vLLM
(no paging, a copy of the cache a token), and short enough to read.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from rlhf_dist.config import RolloutConfig
from rlhf_dist.data.ends import end_token_ids
from rlhf_dist.reshard.checksum import full_checksum
from rlhf_dist.reshard.layout import Box
from rlhf_dist.reshard.shards import Shards
from rlhf_dist.sampling import Sampling
from workers.engines.files.file_tensors import file_tensors, kept_buffers, parameters_of
from workers.engines.files.load import load
from workers.engines.generation.cohort import Cohort, Row, joined
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
    Untraceable,
    WeightSyncError,
    check_added,
    check_request,
    continued,
    resumed_seed,
    stream_seed,
)
from workers.engines.model.unseen import caps_scores
from workers.engines.movable import Movable

_ROWS_AT_ONCE = 128
"""Responses generated together; bounds the KV cache and the logits."""


class TransformersEngine(SyncedEngine):
    """See GenerationEngine."""

    def __init__(self, *, model_path: str, rollout: RolloutConfig, rank: int, world: int, device: torch.device) -> None:
        super().__init__(getattr(torch, rollout.dtype))
        if rollout.tensor_parallel != 1:
            raise ValueError(
                f"rollout.tensor_parallel must be 1 for the transformers engine, got {rollout.tensor_parallel}; "
                "use rollout.engine=vllm"
            )
        self._rollout, self._device = rollout, device
        self._end_tokens = frozenset(end_token_ids(model_path))
        self._added: dict[str, Row] = {}
        self._waiting: list[Row] = []
        self._cohorts: list[Cohort] = []
        # Random weights, never generated with; the process's random streams are the trainer's.
        with torch.random.fork_rng():
            config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
            # The library's sdpa leaves caps on scores out.
            attention = {"attn_implementation": "eager"} if caps_scores(config) else {}
            model = AutoModelForCausalLM.from_config(config, dtype=self._dtype, trust_remote_code=False, **attention)
        self._model: PreTrainedModel | None = model.to(device).eval().requires_grad_(False)
        _check_cache(self._model, device)
        self._files = file_tensors(model, {name: tensor.shape for name, tensor in self._weights().items()})
        self._held = Movable(self._weights().values(), device)

    @torch.no_grad()
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
        models = [(self._ready(), 1.0)] if mixture is None else self._mixed(*mixture)
        check_request(
            prompts,
            sampling,
            seeds,
            max_prompt_tokens=self._rollout.max_prompt_tokens,
            max_response_tokens=self._rollout.max_response_tokens,
        )
        self._require_idle("generate")
        contexts = [prompt for prompt in prompts for _ in range(sampling.n)]
        responses: list[Response] = list(begun or [NOTHING_DRAWN] * len(contexts))
        left = [at for at, response in enumerate(responses) if response.interrupted]
        for start in range(0, len(left), _ROWS_AT_ONCE):
            here = left[start : start + _ROWS_AT_ONCE]
            rows = []
            for at in here:
                before = responses[at].token_ids
                context = np.concatenate([contexts[at], before])
                seed = resumed_seed(seeds[at], len(before))
                row = self._row(str(at), context, sampling, seed, sampling.max_tokens - len(before))
                rows.append(replace(row, ends=ends, before=before))
            cohort = self._cohort(models, rows)
            while cohort.rows and not (stop is not None and stop()):
                for row in cohort.step():
                    at = int(row.name)
                    responses[at] = continued(responses[at], row.response(self._version))
                    if done is not None:
                        done(at, responses[at])
            for row in cohort.rows:
                responses[int(row.name)] = continued(responses[int(row.name)], row.response(self._version))
        return responses

    def add(self, request: Request) -> None:
        """See GenerationEngine."""
        self._running("add")
        self._require_weights()
        check_added(request, self._in_flight, max_tokens=self._max_tokens)
        sampling = request.sampling
        row = self._row(request.name, request.token_ids, sampling, request.seed, sampling.max_tokens)
        self._added[request.name] = row
        self._waiting.append(row)

    def step(self) -> list[tuple[str, Response]]:
        """See GenerationEngine."""
        model = self._running("step")
        room = _ROWS_AT_ONCE - sum(len(cohort.rows) for cohort in self._cohorts)
        if new := self._waiting[: max(room, 0)]:
            self._waiting = self._waiting[len(new) :]
            self._cohorts.append(self._cohort([(model, 1.0)], new))
        done = [row for cohort in self._cohorts for row in cohort.step()]
        self._cohorts = joined(self._cohorts)
        return [(row.name, self._added.pop(row.name).response(self._version)) for row in done]

    def abort(self, name: str) -> Response:
        """See GenerationEngine."""
        row = self._added.pop(name)
        so_far = row.response(self._version)
        self._waiting = [one for one in self._waiting if one is not row]
        for cohort in self._cohorts:
            cohort.let_go([row])
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]
        return so_far

    @property
    def _in_flight(self) -> Collection[str]:
        return self._added

    @property
    def _max_tokens(self) -> int:
        return self._rollout.max_prompt_tokens + self._rollout.max_response_tokens

    def _row(self, name: str, context: NDArray[np.integer], sampling: Sampling, seed: int, limit: int) -> Row:
        stream = torch.Generator(self._device).manual_seed(stream_seed(seed))
        return Row(name, context, sampling, stream, limit)

    def _cohort(self, models: Sequence[tuple[PreTrainedModel, float]], rows: Sequence[Row]) -> Cohort:
        return Cohort(models, rows, self._end_tokens, _draw, self._device)

    def held_bytes(self) -> dict[SleepPart, int]:
        """See GenerationEngine. The cache lives inside `generate` only."""
        return {"weights": self._held.held_bytes}

    def sleep(self, parts: Sequence[SleepPart] = BOTH, *, keep: bool = True) -> int:
        """See GenerationEngine."""
        assert self._model is not None, "sleep() after close()"
        if "weights" not in parts:
            return 0
        if not keep:
            self.refuse(DROPPED)
        return self._held.leave(keep and self._began)  # before the first sync there is nothing to keep

    def wake(self, parts: Sequence[SleepPart] = BOTH) -> int:
        """See GenerationEngine."""
        assert self._model is not None, "wake() after close()"
        return self._held.come() if "weights" in parts else 0

    def close(self) -> None:
        """See GenerationEngine."""
        self._model = None
        self._added, self._waiting, self._cohorts = {}, [], []
        self.refuse("the engine is closed")
        gc.collect()

    def _running(self, call: str) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError(f"{call}() needs an open engine, this one is closed; construct another")
        if not self._held.here:
            raise RuntimeError(f"{call}() needs an engine that is awake; call wake() first")
        return self._model

    def _ready(self) -> PreTrainedModel:
        model = self._running("generate")
        self._require_weights()
        return model

    def _mixed(self, other: GenerationEngine, share: float) -> list[tuple[PreTrainedModel, float]]:
        """Both models, each with its share of the logits."""
        if not isinstance(other, TransformersEngine):
            raise ValueError(
                f"logits are mixed by the transformers engine, and the other role's is a {type(other).__name__}"
            )
        models = [self._ready(), other._ready()]
        mine, theirs = (model.config.get_text_config().vocab_size for model in models)
        if mine != theirs:
            raise ValueError(f"logits are mixed token by token, and the models have {mine} and {theirs} tokens")
        return list(zip(models, (1 - share, share), strict=True))

    def _weights(self) -> dict[str, Tensor]:
        """What the model's files hold, by names in memory."""
        assert self._model is not None, "the engine is open"
        return {name: p.detach() for name, p in self._model.named_parameters()} | kept_buffers(self._model)

    def _begin_install(self) -> None:
        self._running("receive_weights")
        self._held.written()
        for weight in self._weights().values():
            weight.fill_(torch.nan)

    def _install(self, bucket: Bucket) -> None:
        self._running("receive_weights")
        weights = self._weights()
        for name, tensor in bucket:
            if name not in self._files or self._files[name].shape != tensor.shape:
                has = self._files[name].shape if name in self._files else "no such parameter"
                raise ValueError(
                    f"parameter {name} must fit the rollout model: it has {has}, got {tuple(tensor.shape)}"
                )
            self._files.write(name, tensor, weights)

    def _finish_install(self, version: int, expected: Mapping[str, int]) -> None:
        self._running("receive_weights")
        weights = self._weights()
        if names := [name for name, weight in weights.items() if bool(weight.sum().isnan())]:
            rule = "the model must be written completely and hold no NaN (or the trained weights have one)"
            raise WeightSyncError(version, rule, names)
        if names := [n for n, checksum in expected.items() if full_checksum(self._files.read(n, weights)) != checksum]:
            raise WeightSyncError(version, "parameters must read back as they arrived", names)

    @torch.no_grad()
    def _read(self, folder: Path, init: str, seed: int) -> None:
        self._begin_install()
        hf, start, _ = load(folder, init, "policy", seed, trained=False)
        weights = self._weights()
        if start is not None:
            start.fill_whole(self._files, weights)
            return
        for name, tensor in (parameters_of(hf) | kept_buffers(hf)).items():
            weights[name].copy_(tensor)

    def trace(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Box]]:
        """See GenerationEngine: one copy of everything."""
        self._running("trace")
        has = {name: tensor.shape for name, tensor in self._files.items()}
        if has != {name: tuple(shape) for name, shape in shapes.items()}:
            raise Untraceable(f"the rollout model's parameters are others: {sorted(has.keys() ^ shapes.keys())[:5]}")
        return {name: [part.file_box for part in self._files[name].parts] for name in shapes}

    def _target_shards(self) -> Shards:
        self._running("receive_shards")
        self._held.written()
        weights = self._weights()
        return {name: [view for _, view in self._files.views(name, weights)] for name in self._files}

    def _begin_shards(self) -> None:
        pass

    def _finish_shards(self, version: int) -> None:
        pass


@torch.no_grad()
def _check_cache(model: PreTrainedModel, device: torch.device) -> None:
    """Raise ValueError for a family that does not go on from its cache as from the whole text."""
    tokens = torch.tensor([[1, 2, 3, 4]], device=device) % model.config.get_text_config().vocab_size
    try:
        cache = DynamicCache(config=model.config)
        model(input_ids=tokens[:, :3], past_key_values=cache, use_cache=True)
        step = model(input_ids=tokens[:, 3:], past_key_values=cache, use_cache=True).logits[0, -1].float()
    except Exception as error:  # noqa: BLE001 - whatever the library makes of a cache that is not this family's
        raise ValueError(f"{_NO_CACHE.format(type(model).__name__)} ({type(error).__name__}: {error})") from error
    whole = model(input_ids=tokens).logits[0, -1].float()
    if not (step - whole).abs().max() <= 0.05 * (whole - whole.mean()).abs().max() + 1e-6:
        raise ValueError(_NO_CACHE.format(type(model).__name__))


_NO_CACHE = (
    "rollout.engine=transformers cannot generate with {}: its tokens do not follow from a cache of keys and values; "
    "set rollout.engine=vllm"
)


def _draw(logits: Tensor, sampling: Sampling, streams: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob over the full vocabulary; logits [B, V] float32 -> [B], [B].

    Exponential race: argmax_v p_v / e_v with e_v ~ Exp(1) draws v with probability p_v.
    """
    log_probs = (logits / sampling.temperature).log_softmax(-1)
    if sampling.greedy:
        token = log_probs.argmax(-1)
    else:
        race = torch.empty_like(log_probs)
        for row, stream in zip(race, streams, strict=True):
            row.exponential_(generator=stream)
        token = (_truncated(log_probs, sampling) - race.log()).argmax(-1)
    return token, log_probs.gather(-1, token[:, None])[:, 0]


def _truncated(log_probs: Tensor, sampling: Sampling) -> Tensor:
    """-inf outside the top_k most likely tokens, then outside the nucleus (Holtzman et al., 2020)."""
    vocabulary = log_probs.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        least = log_probs.topk(sampling.top_k, dim=-1).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = log_probs.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= sampling.top_p  # the mass before a token already fills the nucleus
        log_probs = log_probs.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return log_probs
