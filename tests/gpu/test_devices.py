"""On each device the same: the exchange, a start by slices, log-probs, training, attention, checksums, offload.

The CPU's run shows that the tests are right; the GPU's, what has not run anywhere else: `make gpu-evidence`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_dist.reshard.checksum import full_checksum
from tests.engines.losses import TokenLoss, make_batch
from tests.engines.test_exact import BATCHES, plain_log_probs, plain_training
from tests.engines.world import World
from tests.gpu import rank
from tests.gpu.devices import EACH_DEVICE, EACH_DTYPE
from workers.engines.model.attention import Packing, packed_attention

LINKS = {"cpu": "strict", "cuda:0": "cuda nccl"}
"""On the CPU the double that keeps NCCL's rules."""


@EACH_DEVICE
def test_weights_go_there_and_back_by_the_rules_of_nccl(world: World, device: str) -> None:
    link = LINKS[device]
    assert world.run(rank.round_trips, 0, 8, link) == [[], []]
    wanted = "StrictGroup" if device == "cpu" else "ProcessGroupNCCL"
    assert world.run(rank.backend_of, link) == [wanted, wanted]


@EACH_DEVICE
def test_a_start_by_slices_has_the_files_bits(world: World, device: str, tmp_path: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for sliced, boxes, wrong in world.run(rank.slices, tmp_path, device):
        assert sliced and boxes >= 20 and wrong == []


@EACH_DEVICE
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_log_probs_are_those_of_transformers_on_the_cpu(world: World, device: str, folder: Path, packing: bool) -> None:
    batch = make_batch()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted, _ = plain_log_probs(model, batch)
    for found in world.run(rank.log_probs, folder, device, batch, {"packing": packing}):
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5 if device == "cpu" else 1e-4)


@EACH_DEVICE
def test_bfloat16_log_probs_are_near_those_of_float32(world: World, device: str, folder: Path) -> None:
    batch = make_batch()
    exact, rough = (world.run(rank.log_probs, folder, device, batch, {"dtype": d})[0] for d in ("float32", "bfloat16"))
    error = np.abs(np.concatenate(exact) - np.concatenate(rough))
    assert 0 < error.mean() < 0.05, "bfloat16 was used, and has 8 bits"


@EACH_DEVICE
def test_three_steps_are_those_of_plain_training_on_the_cpu(world: World, device: str, folder: Path) -> None:
    wanted, _ = plain_training(folder, TokenLoss(), BATCHES)
    for found in world.run(rank.train, folder, device, BATCHES, {"micro_batch_tokens": 40}):
        assert_close(found, wanted, 1e-5 if device == "cpu" else 1e-4)


@EACH_DEVICE
def test_what_leaves_the_device_comes_back_with_the_same_bits(world: World, device: str, folder: Path) -> None:
    for found in world.run(rank.away_and_back, folder, device, make_batch()):
        assert found["same"] and found["trains on"]
        # Parameters and Adam's two moments.
        assert found["left"] >= 0.9 * found["held"] and found["came back"] == found["left"], found


@EACH_DEVICE
@EACH_DTYPE
@pytest.mark.parametrize("window", [None, 3], ids=["all", "window"])
def test_packed_attention_keeps_rows_apart_and_sees_prefixes(
    device: str, dtype: torch.dtype, window: int | None
) -> None:
    """A row by itself, then a prompt of 5 tokens with responses of 2, 2 and 40 behind it; forward and backward."""
    generator = torch.Generator().manual_seed(0)
    packing = Packing.of([(3, ()), (5, ()), (2, ((3, 8),)), (2, ((3, 8),)), (40, ((3, 8),))], torch.device(device))
    rows = [list(range(3)), *([*range(3, 8), *own] for own in (range(8, 10), range(10, 12), range(12, 52)))]
    drawn = [torch.randn(1, heads, 52, 64, generator=generator).to(dtype) for heads in (4, 2, 2)]
    inputs = [tensor.to(device).requires_grad_() for tensor in drawn]
    attended, _ = packed_attention(nn.Identity(), *inputs, None, packing=packing, scaling=0.1, sliding_window=window)  # type: ignore[arg-type]
    mix = torch.randn(attended.shape, generator=generator)
    plain = [tensor.double().requires_grad_() for tensor in drawn]
    wanted = torch.zeros(attended.shape, dtype=torch.float64)
    for number, row in enumerate(rows):
        q, k, v = (tensor[:, :, row] for tensor in plain)
        seen = torch.ones(len(row), len(row), dtype=torch.bool).tril().triu(1 - (window or len(row)))
        k, v = (tensor.repeat_interleave(2, dim=1) for tensor in (k, v))
        alone = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.1).transpose(1, 2)
        new = [at for at, position in enumerate(row) if position >= 8 or number < 2]
        wanted = wanted.index_copy(1, torch.tensor([row[at] for at in new]), alone[:, new])
    close: dict[str, Any] = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(attended.cpu().double(), wanted, **close)
    ours = torch.autograd.grad((attended * mix.to(device)).sum(), inputs)
    theirs = torch.autograd.grad((wanted * mix).sum(), plain)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, **close)


@EACH_DEVICE
@EACH_DTYPE
def test_checksums_are_the_same_on_every_device(device: str, dtype: torch.dtype) -> None:
    tensor = torch.randn(300, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    changed = tensor.clone()
    changed[7, 9] += 1
    assert full_checksum(tensor.to(device)) == full_checksum(tensor) != full_checksum(changed.to(device))


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each parameter within `tolerance` of its largest value."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        error = float((torch.from_numpy(found[name]) - value).abs().max() / value.abs().max())
        assert error <= tolerance, f"{name} differs by {error:.1e}"
