"""Rows that begin alike have it once in a pack, and the same outputs and gradients as without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rlhf_dist.batch import Batch
from rlhf_dist.config import EngineConfig, ModelConfig
from rlhf_dist.testing.tiny_model import save_llama
from workers.engines.files.load import fill_whole
from workers.engines.model.models import build_model
from workers.engines.model.packing import pack
from workers.engines.model.prefixes import LEAST_SHARED, shared_places
from workers.engines.model.ways import Way

CPU = torch.device("cpu")
LONG = LEAST_SHARED


def stretch(seed: int, length: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(5, 20, length).tolist()
    return drawn


def tree() -> Batch:
    """One prompt; a trunk with two branches, of which the first parts again; a row that shares the prompt alone; a row
    of another prompt; a row that ends with the trunk."""
    trunk, first = stretch(0, LONG), stretch(1, LONG + 3)
    responses = [
        trunk + first + [6, 7],
        trunk + first + [7, 7, 7],
        trunk + stretch(2, 5),
        [9, 9],
        [8, 8, 8],
        trunk,
    ]
    return Batch.of(prompt_ids=[[3, 4]] * 4 + [[5]] + [[3, 4]], response_ids=responses)


def test_every_stretch_is_there_once() -> None:
    batch = tree()
    places = shared_places(batch)
    lengths = [length for length, _ in places.sequences]
    # Alone first; the prompt, and the row that has no more of it; the trunk and what follows; a branch and its two.
    assert lengths == [4, 2, 2, LONG, 5, LONG + 3, 2, 3]
    assert [len(prefix) for _, prefix in places.sequences] == [0, 0, 1, 1, 2, 2, 3, 3]
    rows = zip(batch["prompt_ids"].rows(), batch["response_ids"].rows(), strict=True)
    spelled = np.concatenate([np.concatenate(pair) for pair in rows])
    packed = pack(batch, CPU, way=Way(rows="shared", attention="packed"))
    assert packed.input_ids[0, torch.from_numpy(places.tokens)].tolist() == spelled.tolist()
    assert packed.input_ids.shape[1] == sum(lengths) < len(spelled) - 4 * LONG


def test_a_few_tokens_in_common_behind_a_prompt_are_not_worth_it() -> None:
    batch = Batch.of(prompt_ids=[[3, 4]] * 2, response_ids=[[6, 7, 8], [6, 7, 9]])
    assert [length for length, _ in shared_places(batch).sequences] == [2, 3, 3]
    equal = Batch.of(prompt_ids=[[3, 4]] * 2, response_ids=[[6], [6]])
    assert [length for length, _ in shared_places(equal).sequences] == [2, 1, 1]


def test_outputs_and_gradients_are_those_of_rows_alone(tmp_path: Path) -> None:
    model = ModelConfig(path=str(save_llama(tmp_path / "model")))
    built = build_model(model, EngineConfig(dtype="float32"), head="policy", seed=0, trained=True)
    if built.weights is not None:
        fill_whole(built.hf, built.weights, CPU)
    batch, found = tree(), []
    weights = torch.randn(int(batch["response_ids"].lengths.sum()), generator=torch.Generator().manual_seed(0))
    for rows in ("shared", "packed"):
        built.zero_grad()
        log_probs = built(pack(batch, CPU, way=Way(rows=rows, attention="packed")), ("log_probs",), 1.0)["log_probs"]
        (log_probs * weights).sum().backward()
        found.append((log_probs.detach(), [one.grad.clone() for one in built.parameters() if one.grad is not None]))
    (shared, mine), (alone, theirs) = found
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
