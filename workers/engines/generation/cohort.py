"""Rows that transformers decodes together: one cache, padded on the left, so that the last column is every row's newest
token.

    add      rows that come at one time are read as one padded batch, then join the others
    step     one forward pass, one token for each row; rows that are done leave

    cache    . . a a a a     a row joins: the narrower cache is padded on the left
             b b b b b b     rows leave: they are cut out, and columns that only padding is left in with them

Joining and leaving copy the cache once, which `DynamicLayer` does for each token anyway: what other rows are there
costs a row padding, never a second reading of its tokens. Caches of another kind (sliding windows, recurrent states)
are neither cut nor joined: such rows stay in the cohort they came with, until all of it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlhf_dist.sampling import Sampling
from workers.engines.generation.interface import NOTHING_DRAWN, Ends, Response

Draw = Callable[[Tensor, Sampling, Sequence[torch.Generator]], tuple[Tensor, Tensor]]
"""(logits [B, V] float32, sampling, streams) -> tokens [B], log-probs [B]."""


@dataclass(eq=False)
class Row:
    """A response that is being drawn."""

    name: str
    prompt: NDArray[np.integer]
    """[P] all tokens before it."""
    sampling: Sampling
    stream: torch.Generator
    limit: int
    """Most tokens."""
    ends: Ends | None = None
    """What ends it beside end tokens."""
    before: NDArray[np.int32] = field(default_factory=lambda: NOTHING_DRAWN.token_ids)
    """[T] tokens that the response has already, those at the end of `prompt`."""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def done(self) -> bool:
        """Ended itself, or at its limit."""
        return self.finished or len(self.tokens) >= self.limit

    def response(self, version: int) -> Response:
        """What has been drawn so far, by weights of `version`."""
        return Response(
            np.array(self.tokens, dtype=np.int32),
            np.array(self.log_probs, dtype=np.float32),
            np.full(len(self.tokens), version, dtype=np.int32),
            finished=self.finished,
            interrupted=not self.done,
        )


class Cohort:
    """See the module's docstring."""

    def __init__(
        self,
        models: Sequence[tuple[PreTrainedModel, float]],
        rows: Sequence[Row],
        end_tokens: frozenset[int],
        draw: Draw,
        device: torch.device,
    ) -> None:
        """models: each with its share of the logits, which add up to 1."""
        self._models, self._end_tokens, self._draw = models, end_tokens, draw
        self.rows = list(rows)
        self._caches = [DynamicCache(config=model.config) for model, _ in models]
        self._tokens, self._mask = _left_padded([row.prompt for row in rows], device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def plain(self) -> bool:
        """Whether its cache can be cut and joined by rows."""
        return all(type(layer) is DynamicLayer and layer.is_initialized for layer in self._layers)

    @property
    def _layers(self) -> list[Any]:
        return [layer for cache in self._caches for layer in cache.layers]

    @torch.no_grad()
    def step(self) -> list[Row]:
        """One token for each row; returns those that are done since, which have left."""
        said = [
            model(
                input_ids=self._tokens,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            for (model, _), cache in zip(self._models, self._caches, strict=True)
        ]
        token, log_prob = self._drawn(_mixture(said, [share for _, share in self._models]))
        done: list[Row] = []
        for row, new, its in zip(self.rows, token.tolist(), log_prob.tolist(), strict=True):
            if row.done:  # it could not leave
                continue
            row.tokens.append(new)
            row.log_probs.append(its)
            row.finished = new in self._end_tokens or (row.ends is not None and row.ends.after(row.before, row.tokens))
            done += [row] if row.done else []
        self._tokens, self._positions = token[:, None], self._positions[:, -1:] + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
        self.let_go(done)
        return done

    def let_go(self, rows: Sequence[Row]) -> None:
        """These are wanted no longer."""
        gone = {id(row) for row in rows}
        left = [at for at, row in enumerate(self.rows) if id(row) not in gone]
        if not gone or len(left) == len(self.rows):
            return
        if not left:
            self.rows = []
        elif self.plain and self._layers:
            self._keep(left)
        else:
            for row in rows:  # its place is computed until the others are done
                row.limit = min(row.limit, len(row.tokens))
            self.rows = [] if all(row.done for row in self.rows) else self.rows

    def join(self, other: Cohort) -> None:
        """Take over the rows of `other`. Both have made a step, and are plain."""
        width = max(self._mask.shape[1], other._mask.shape[1])
        for one in (self, other):
            one._widen(width - one._mask.shape[1])
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.keys = torch.cat([mine.keys, theirs.keys])
            mine.values = torch.cat([mine.values, theirs.values])
        self._tokens = torch.cat([self._tokens, other._tokens])
        self._positions = torch.cat([self._positions, other._positions])
        self._mask = torch.cat([self._mask, other._mask])
        self.rows += other.rows

    def _keep(self, left: list[int]) -> None:
        at = torch.tensor(left, device=self._tokens.device)
        self.rows = [self.rows[k] for k in left]
        self._tokens, self._positions, self._mask = self._tokens[at], self._positions[at], self._mask[at]
        empty = int(self._mask.any(dim=0).nonzero()[0])  # columns in front that only padding is left in
        self._mask = self._mask[:, empty:]
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[at, :, empty:], layer.values[at, :, empty:]

    def _widen(self, columns: int) -> None:
        self._mask = pad(self._mask, (columns, 0))
        for layer in self._layers:
            layer.keys = pad(layer.keys, (0, 0, columns, 0))
            layer.values = pad(layer.values, (0, 0, columns, 0))

    def _drawn(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[B] tokens and log-probs; rows that are drawn in one way are drawn together."""
        ways: dict[Sampling, list[int]] = {}
        for at, row in enumerate(self.rows):
            ways.setdefault(replace(row.sampling, n=1, max_tokens=1, stop=()), []).append(at)
        if len(ways) == 1:
            return self._draw(logits, self.rows[0].sampling, [row.stream for row in self.rows])
        token = logits.new_zeros(len(self.rows), dtype=torch.int64)
        log_prob = logits.new_zeros(len(self.rows))
        for sampling, rows in ways.items():
            token[rows], log_prob[rows] = self._draw(logits[rows], sampling, [self.rows[at].stream for at in rows])
        return token, log_prob


def _mixture(logits: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """[B, V] sum of share * logits in float32: the geometric mixture of the distributions, before it is normalised."""
    if len(logits) == 1:
        return logits[0].float()
    return sum((share * one.float() for one, share in zip(logits, shares, strict=True)), torch.zeros(()))


def _left_padded(prompts: Sequence[NDArray[np.integer]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        mask[row, width - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)


def joined(cohorts: Sequence[Cohort]) -> list[Cohort]:
    """Those that have rows, all whose caches allow it as one."""
    left = [cohort for cohort in cohorts if cohort.rows]
    plain = [cohort for cohort in left if cohort.plain]
    for other in plain[1:]:
        plain[0].join(other)
    return [*plain[:1], *(cohort for cohort in left if not cohort.plain)]
