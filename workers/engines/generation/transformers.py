"""Generation with transformers alone: the embedded fallback, one copy of the model per rank.

A batch is padded on the left, so that its last column is every row's newest token; rows that ended are kept
until the batch ends. Slower than vLLM (no paging, no continuous batching), and short enough to read.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
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
from workers.engines.generation.interface import (
    BOTH,
    DROPPED,
    Bucket,
    Ends,
    GenerationEngine,
    Response,
    SleepPart,
    SyncedEngine,
    Untraceable,
    WeightSyncError,
    check_request,
    continued,
    resumed_seed,
    stream_seed,
)
from workers.engines.model.unseen import caps_scores
from workers.engines.movable import Movable

_NOTHING_DRAWN = Response(np.empty(0, np.int32), np.empty(0, np.float32), finished=False, interrupted=True)
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
        self._end_tokens = torch.tensor(end_token_ids(model_path), dtype=torch.int64, device=device)
        # Random weights, never generated with; the process's random streams are the trainer's.
        with torch.random.fork_rng():
            config = AutoConfig.from_pretrained(model_path)
            # The library's sdpa leaves caps on scores out.
            attention = {"attn_implementation": "eager"} if caps_scores(config) else {}
            model = AutoModelForCausalLM.from_config(config, dtype=self._dtype, **attention)
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
        rows = [prompt for prompt in prompts for _ in range(sampling.n)]
        responses: list[Response] = list(begun or [_NOTHING_DRAWN] * len(rows))
        left = [row for row, response in enumerate(responses) if response.interrupted]
        for start in range(0, len(left), _ROWS_AT_ONCE):
            here = left[start : start + _ROWS_AT_ONCE]
            before = [responses[row] for row in here]
            more = self._generate_rows(
                models,
                [np.concatenate([rows[row], one.token_ids]) for row, one in zip(here, before, strict=True)],
                sampling,
                [resumed_seed(seeds[row], len(one.token_ids)) for row, one in zip(here, before, strict=True)],
                [sampling.max_tokens - len(one.token_ids) for one in before],
                stop,
                None if ends is None else (ends, [one.token_ids for one in before]),
            )
            for row, one, rest in zip(here, before, more, strict=True):
                responses[row] = continued(one, rest)
        return responses

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

    def _generate_rows(
        self,
        models: Sequence[tuple[PreTrainedModel, float]],
        prompts: Sequence[NDArray[np.integer]],
        sampling: Sampling,
        seeds: Sequence[int],
        limits: Sequence[int],
        stop: Callable[[], bool] | None,
        ends: tuple[Ends, Sequence[NDArray[np.int32]]] | None,
    ) -> list[Response]:
        """models: each with its share of the logits. limits: [B] most tokens of each row. ends: see `generate`, and [B]
        the tokens that each response has already."""
        tokens, mask = self._left_padded(prompts)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        streams = [torch.Generator(self._device).manual_seed(stream_seed(seed)) for seed in seeds]
        caches = [DynamicCache(config=model.config) for model, _ in models]
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self._device)
        drawn: list[Tensor] = []  # one [B] per step
        log_probs: list[Tensor] = []
        lengths = torch.zeros(len(prompts), dtype=torch.int64, device=self._device)
        most = torch.tensor(limits, device=self._device)
        finished = torch.zeros_like(ended)
        while not bool(ended.all()) and not (stop is not None and stop()):
            said = [
                model(
                    input_ids=tokens,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
                for (model, _), cache in zip(models, caches, strict=True)
            ]
            shares = [share for _, share in models]
            logits = said[0].float() if shares == [1.0] else _mixture(said, shares)
            token, log_prob = _draw(logits, sampling, streams)
            drawn.append(token)
            log_probs.append(log_prob)
            lengths += ~ended
            finished |= ~ended & torch.isin(token, self._end_tokens)
            if ends is not None:
                finished |= self._ended_by(*ends, drawn, ended)
            ended |= finished | (lengths >= most)
            tokens, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        if not drawn:
            return [_NOTHING_DRAWN] * len(prompts)
        all_tokens = torch.stack(drawn, dim=1).to(torch.int32).cpu().numpy()
        all_log_probs = torch.stack(log_probs, dim=1).cpu().numpy()
        return [
            Response(
                all_tokens[row, :length].copy(),
                all_log_probs[row, :length].copy(),
                finished=bool(finished[row]),
                interrupted=not bool(ended[row]),
            )
            for row, length in enumerate(lengths.tolist())
        ]

    def _ended_by(
        self, ends: Ends, before: Sequence[NDArray[np.int32]], drawn: Sequence[Tensor], ended: Tensor
    ) -> Tensor:
        """[B] which rows `ends` says are at their end; not asked of those that have `ended`."""
        last = torch.stack(list(drawn[-ends.last :]), dim=1).tolist()
        asked = [
            not over and ends.after(earlier, more)
            for over, earlier, more in zip(ended.tolist(), before, last, strict=True)
        ]
        return torch.tensor(asked, dtype=torch.bool, device=self._device)

    def _left_padded(self, prompts: Sequence[NDArray[np.integer]]) -> tuple[Tensor, Tensor]:
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
            mask[row, width - len(prompt) :] = 1
        return tokens.to(self._device), mask.to(self._device)


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


def _mixture(logits: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """[B, V] sum of share * logits in float32: the geometric mixture of the distributions, before it is normalised."""
    return sum((share * one.float() for one, share in zip(logits, shares, strict=True)), torch.zeros(()))


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
