"""Logits as a model's head gives them."""

from __future__ import annotations

import torch

from workers.engines.model.distribution import chosen_and_largest_logits, logits_of_matrix
from workers.engines.model.log_probs import Head


def test_logits_are_neither_normalised_nor_cut_otherwise_in_chunks() -> None:
    # States (1, 0), (0, 2), (1, 1) and tokens' rows (1, 0), (0, 3), (-1, 1): logits (1, 0, -1), (0, 6, 2), (1, 3, 0).
    hidden, weight = torch.tensor([[1.0, 0], [0, 2], [1, 1]]), torch.tensor([[1.0, 0], [0, 3], [-1, 1]])
    targets = torch.tensor([2, 0, 1])
    for chunk in (1, 2, 10):
        chosen, largest = chosen_and_largest_logits(hidden, logits_of_matrix(Head(weight)), targets, chunk_tokens=chunk)
        assert chosen.tolist() == [-1, 0, 3] and largest.tolist() == [1, 6, 3]
    none, _ = chosen_and_largest_logits(hidden[:0], logits_of_matrix(Head(weight)), targets[:0], chunk_tokens=2)
    assert none.tolist() == []
