"""Functions of whole distributions over the vocabulary, a chunk of tokens at a time.

    log p = log_softmax(z)                       [chunk, V], float32, recomputed in the backward pass
    out   = reduce(log p, what is given)         [chunk] or [chunk, K]: all that is kept
    d z   = g - p sum_k g_k,  g = d out / d log p

Memory: as `log_probs.py`, and what autograd keeps of `reduce` for one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from workers.engines.model.log_probs import Head, capped, check_temperature, head_logits

Reduce = Callable[..., Tensor]
"""(log_p [t, V], *given [t, ...]) -> [t] or [t, K]."""
LogitsOf = Callable[[Tensor], Tensor]
"""[t, H] -> [t, V]."""


def over_vocabulary(
    hidden: Tensor, head: Head, reduce: Reduce, given: Sequence[Tensor], *, temperature: float, chunk_tokens: int
) -> Tensor:
    """`reduce` of the distributions that `head` makes of hidden [T, H]; differentiable in hidden and the head.

    given: [T, ...] each, cut as the tokens are; they get no gradient.
    """
    check_temperature(temperature)
    result: Tensor = _Reduced.apply(
        hidden, head.weight, head.bias, head.scale, head.softcap, 1.0 / temperature, chunk_tokens, reduce, *given
    )
    return result


def over_vocabulary_of_logits(
    hidden: Tensor,
    logits_of: LogitsOf,
    reduce: Reduce,
    given: Sequence[Tensor],
    *,
    temperature: float,
    chunk_tokens: int,
) -> Tensor:
    """The same of a head that is no matrix; it runs again in the backward pass."""
    check_temperature(temperature)

    def chunk(hidden: Tensor, *given: Tensor) -> Tensor:
        return reduce((logits_of(hidden).float() / temperature).log_softmax(-1), *given)

    parts = [
        checkpoint(chunk, hidden[part], *(one[part] for one in given), use_reentrant=False)
        for part in _chunks(len(hidden), chunk_tokens)
    ]
    return torch.cat(parts)


def logits_of_matrix(head: Head) -> LogitsOf:
    """What the head makes of states, float32."""
    return lambda hidden: capped(
        head_logits(hidden.to(head.weight.dtype), head.weight, head.bias, head.scale), head.softcap
    )


def top_k(
    hidden: Tensor, logits_of: LogitsOf, k: int, *, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ids [T, k] int64 of the likeliest tokens, the first in front, their log-probs [T, k] and the log of the
    probability of all others [T], float32, without gradient.

    Raises ValueError unless 1 <= k < V.
    """
    check_temperature(temperature)
    ids, log_probs, rest = [], [], []
    with torch.no_grad():
        for part in _chunks(len(hidden), chunk_tokens):
            log_p = (logits_of(hidden[part]).float() / temperature).log_softmax(-1)
            if not 1 <= k < log_p.shape[-1]:
                raise ValueError(f"k must be from 1 to {log_p.shape[-1] - 1}, one less than the vocabulary, got {k}")
            chosen, at = log_p.topk(k, dim=-1)
            ids.append(at)
            log_probs.append(chosen)
            rest.append(_rest(log_p, at))
    return torch.cat(ids), torch.cat(log_probs), torch.cat(rest)


def chosen_and_largest_logits(
    hidden: Tensor, logits_of: LogitsOf, targets: Tensor, *, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """The logit of each target and the largest of all before it, [T] float32 each, as the head gives them: not divided
    by a temperature, not normalised, without gradient."""
    chosen, largest = [], []
    with torch.no_grad():
        for part in _chunks(len(hidden), chunk_tokens):
            logits = logits_of(hidden[part]).float()
            chosen.append(logits.gather(-1, targets[part, None]).squeeze(-1))
            largest.append(logits.amax(-1))
    return torch.cat(chosen), torch.cat(largest)


def log_probs_at(log_p: Tensor, ids: Tensor) -> Tensor:
    """[t, V], [t, k] -> [t, k + 1]: those of `ids`, and last the log of the probability of all others."""
    return torch.cat([log_p.gather(-1, ids), _rest(log_p, ids)[:, None]], dim=-1)


def _rest(log_p: Tensor, ids: Tensor) -> Tensor:
    # 1 - sum p would lose every digit of a small rest.
    return log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """At least one, an empty one too: it has the shape of the result, and the head takes part in the backward pass."""
    return (slice(start, start + chunk_tokens) for start in range(0, max(tokens, 1), chunk_tokens))


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        cooling: float,
        chunk_tokens: int,
        reduce: Reduce,
        *given: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, *given)
        ctx.scale, ctx.softcap, ctx.cooling = scale, softcap, cooling
        ctx.chunk_tokens, ctx.reduce = chunk_tokens, reduce
        parts = []
        for chunk in _chunks(len(hidden), chunk_tokens):
            logits = capped(head_logits(hidden[chunk], weight, bias, scale), softcap)
            log_p = (logits if cooling == 1 else logits.mul_(cooling)).log_softmax(-1)
            parts.append(reduce(log_p, *(one[chunk] for one in given)))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *given = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for chunk in _chunks(len(hidden), ctx.chunk_tokens):
            logits = head_logits(hidden[chunk], weight, bias, ctx.scale)
            bend = None
            if ctx.softcap is not None:
                bend = torch.tanh(logits / ctx.softcap)
                logits = ctx.softcap * bend
            log_p = (logits if ctx.cooling == 1 else logits.mul_(ctx.cooling)).log_softmax(-1).requires_grad_()
            with torch.enable_grad():
                reduced = ctx.reduce(log_p, *(one[chunk] for one in given))
                (slope,) = torch.autograd.grad(reduced, log_p, grads[0][chunk])
            grad = slope - log_p.detach().exp_().mul_(slope.sum(-1, keepdim=True))
            grad.mul_(ctx.scale * ctx.cooling)
            if bend is not None:
                grad.mul_(1 - bend * bend)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            grad_hidden[chunk] = grad @ weight
            # Summed in float32 over chunks: in bfloat16 the sum would depend on how it is cut.
            grad_weight += grad.t() @ hidden[chunk]
        bias_gradient = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), bias_gradient, *[None] * (5 + len(given))
