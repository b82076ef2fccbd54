"""Log-probabilities and entropy from hidden states, without ever holding the logits of all tokens.

    z     = (scale (h W^T + b), soft-capped) / temperature     [chunk, V], float32, recomputed in the backward pass
    log p = log_softmax(z)          d log p_y / d z_k = 1[k = y] - p_k
    H     = -sum_k p_k log p_k      d H / d z_k       = -p_k (log p_k + H)

Memory: about three float32 buffers of [chunk_tokens, vocabulary], and a float32 gradient of W. Heads that are more than
this run as the library wrote them (`log_probs_of_logits`), a chunk at a time as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = softcap tanh(scale (h W^T + b) / softcap)."""

    weight: Tensor
    """[V, H]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    softcap: float | None = None


def log_probs_and_entropy(
    hidden: Tensor, head: Head, targets: Tensor, *, temperature: float, chunk_tokens: int, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """log p(targets) [T] and entropy [T] in nats, float32, differentiable in hidden [T, H] and the head.

    Without `with_entropy` the second result is empty ([0]). `targets` is [T] int64.
    Raises ValueError for a temperature that is not positive.
    """
    check_temperature(temperature)
    result: tuple[Tensor, Tensor] = _ChunkedHead.apply(
        hidden, head.weight, head.bias, targets, head.scale, head.softcap, 1.0 / temperature, chunk_tokens, with_entropy
    )
    return result


def log_probs_of_logits(
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """The same with `logits_of` [t, H] -> [t, V] for a head; it runs again in the backward pass."""
    check_temperature(temperature)

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (logits_of(hidden).float() / temperature).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) if with_entropy else log_p.new_empty(0)
        return log_p.gather(-1, targets[:, None]).squeeze(-1), entropy

    # An empty part too: every rank's head takes part in the backward pass.
    starts = range(0, max(len(targets), 1), chunk_tokens)
    slices = [slice(start, start + chunk_tokens) for start in starts]
    parts = [checkpoint(chunk, hidden[part], targets[part], use_reentrant=False) for part in slices]
    return torch.cat([log_probs for log_probs, _ in parts]), torch.cat([entropy for _, entropy in parts])


def check_temperature(temperature: float) -> None:
    """Raises ValueError for one that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; greedy decoding has no log-probabilities")


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits bent to at most `softcap`; None: as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """[t, V] float32, a tensor of its own; before the cap."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = logits.float()
    return logits if scale == 1 else logits.mul_(scale)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        cooling: float,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        log_probs = hidden.new_empty(len(targets), dtype=torch.float32)
        entropy = torch.empty_like(log_probs) if with_entropy else log_probs.new_empty(0)
        for start in range(0, len(targets), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = capped(head_logits(hidden[chunk], weight, bias, scale), softcap)
            # Not z - logsumexp(z): for large z that loses the digits that the gradient of the entropy is made of.
            log_p = (logits if cooling == 1 else logits.mul_(cooling)).log_softmax(-1)
            log_probs[chunk] = log_p.gather(-1, targets[chunk, None]).squeeze(-1)
            if with_entropy:
                entropy[chunk] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.scale, ctx.softcap, ctx.cooling = scale, softcap, cooling
        ctx.chunk_tokens, ctx.with_entropy = chunk_tokens, with_entropy
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_log_probs, grad_entropy = grads
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        factor = ctx.scale * ctx.cooling
        for start in range(0, len(targets), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            logits = head_logits(hidden[chunk], weight, bias, ctx.scale)
            bend = None
            if ctx.softcap is not None:
                bend = torch.tanh(logits / ctx.softcap)
                logits = ctx.softcap * bend
            log_p = (logits if ctx.cooling == 1 else logits.mul_(ctx.cooling)).log_softmax(-1)
            # Passes over [chunk, V] are what this costs besides the products: factors go into the [chunk, 1] ones.
            chosen = grad_log_probs[chunk, None] * factor
            slope = -chosen
            if ctx.with_entropy:
                slope = slope - grad_entropy[chunk, None] * factor * (log_p + entropy[chunk, None])
            grad = log_p.exp_().mul_(slope).scatter_add_(-1, targets[chunk, None], chosen)
            if bend is not None:
                grad.mul_(1 - bend * bend)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            grad_hidden[chunk] = grad @ weight
            # Summed in float32 over chunks: in bfloat16 the sum would depend on how it is cut.
            grad_weight += grad.t() @ hidden[chunk]
        bias_gradient = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), bias_gradient, *[None] * 6
