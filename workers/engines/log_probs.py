"""Log-probabilities and entropy from hidden states, without ever holding the logits of all tokens.

    z     = h W^T / temperature     [chunk, V], float32, recomputed in the backward pass
    log p = log_softmax(z)          d log p_y / d z_k = 1[k = y] - p_k
    H     = -sum_k p_k log p_k      d H / d z_k       = -p_k (log p_k + H)

Memory: about three float32 buffers of [chunk_tokens, vocabulary], and a float32 gradient of W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """log p(targets) [T] and entropy [T] in nats, float32, differentiable in hidden [T, H] and weight [V, H].

    Without `with_entropy` the second result is empty ([0]). `targets` is [T] int64.
    Raises ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; greedy decoding has no log-probabilities")
    result: tuple[Tensor, Tensor] = _ChunkedHead.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, 1.0 / temperature, chunk_tokens, with_entropy
    )
    return result


def _log_softmax(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    # Not z - logsumexp(z): for large z that loses the digits that the gradient of the entropy is made of.
    logits = (hidden @ weight.t()).float()
    return (logits if scale == 1 else logits.mul_(scale)).log_softmax(-1)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk_tokens: int, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        log_probs = hidden.new_empty(len(targets), dtype=torch.float32)
        entropy = torch.empty_like(log_probs) if with_entropy else log_probs.new_empty(0)
        for start in range(0, len(targets), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            log_p = _log_softmax(hidden[chunk], weight, scale)
            log_probs[chunk] = log_p.gather(-1, targets[chunk, None]).squeeze(-1)
            if with_entropy:
                entropy[chunk] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, entropy)
        ctx.scale, ctx.chunk_tokens, ctx.with_entropy = scale, chunk_tokens, with_entropy
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_log_probs, grad_entropy = grads
        hidden, weight, targets, entropy = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(targets), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            log_p = _log_softmax(hidden[chunk], weight, ctx.scale)
            # Passes over [chunk, V] are what this costs besides the products: factors go into the [chunk, 1] ones.
            chosen = grad_log_probs[chunk, None] * ctx.scale
            slope = -chosen
            if ctx.with_entropy:
                slope = slope - grad_entropy[chunk, None] * ctx.scale * (log_p + entropy[chunk, None])
            grad = log_p.exp_().mul_(slope).scatter_add_(-1, targets[chunk, None], chosen).to(weight.dtype)
            grad_hidden[chunk] = grad @ weight
            # Summed in float32 over chunks: in bfloat16 the sum would depend on how it is cut.
            grad_weight += grad.t() @ hidden[chunk]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None
