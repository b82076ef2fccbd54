"""Sampling inside vLLM so that log-probs are the trainer's: softmax(logits / temperature), full vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler


class FullVocabularySampler(Sampler):
    """vLLM's sampler, except for which log-probs it reports.

    vLLM offers them before the temperature or after top-k and top-p, and neither is what the trainer
    recomputes. Greedy is asked for as top_k = 1 at the rollout temperature, so that its log-probs are on the
    same scale. Also left out: ranks, whose kernel vLLM compiles with inductor (3-19 s in the first call).
    """

    def __init__(self) -> None:
        super().__init__(logprobs_mode="processed_logprobs")
        # The inner sampler need not compute log-probs a second time.
        self.topk_topp_sampler.logprobs_mode = "raw_logprobs"

    def sample(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """logits: [B, V] float32. Returns tokens [B] and log-probs [B, V]."""
        assert sampling_metadata.temperature is not None, "greedy is asked for as top_k=1, not temperature=0"
        logits = self.apply_temperature(logits, sampling_metadata.temperature, all_random=True)
        log_probs = logits.log_softmax(dim=-1, dtype=torch.float32)
        top_k = sampling_metadata.top_k
        if top_k is not None and bool((top_k == 1).all()):
            return log_probs.argmax(dim=-1), log_probs  # a plain argmax settles ties the same way each time
        tokens, _ = self.topk_topp_sampler(logits, sampling_metadata.generators, top_k, sampling_metadata.top_p)
        return tokens, log_probs

    @staticmethod
    def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        """Log-probs of the tokens drawn, [B, 1]; ranks are not computed and read 1."""
        assert num_logprobs == 0, f"only sampled tokens' log-probs are offered, got logprobs={num_logprobs}"
        columns = token_ids.unsqueeze(-1)
        return LogprobsTensors(columns.to(torch.int32), logprobs.gather(-1, columns), torch.ones_like(token_ids))
