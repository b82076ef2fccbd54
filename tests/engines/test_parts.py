"""The parts of the training engines that need no process group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from rlhf_dist.batch import Batch
from rlhf_dist.config import OptimizerConfig
from rlhf_dist.reshard import checksum
from rlhf_dist.reshard.checksum import box_checksum, full_checksum, unsigned
from rlhf_dist.reshard.layout import flat_range_boxes
from tests.engines.losses import make_batch
from workers.engines import movable
from workers.engines.model.attention import Packing, packed_attention, running
from workers.engines.model.log_probs import Head, log_probs_and_entropy, log_probs_of_logits
from workers.engines.model.packing import micro_batches, pack
from workers.engines.model.ways import Way
from workers.engines.training.learning_rate import learning_rate

CPU = torch.device("cpu")


# --- checksums -------------------------------------------------------------------------------------
def odd(position: int) -> int:
    """SplitMix64's finaliser in Python's integers."""
    mask = 2**64 - 1
    x = (position + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31) | 1


def test_a_checksum_is_the_weighted_sum_of_words() -> None:
    column = [odd((1 << 40) + c) for c in range(3)]
    narrow = torch.tensor([[1, 2, -3], [4, 5, 6]], dtype=torch.int32)
    wanted = sum(odd(r) * sum(b * w for b, w in zip(column, row, strict=True)) for r, row in enumerate(narrow.tolist()))
    assert full_checksum(narrow.view(torch.float32)) == wanted % 2**64
    # Of a 64-bit word the upper half is added to it.
    wide = torch.tensor([[3 << 40, 5], [-(7 << 33), 1]])
    wanted = sum(
        odd(r) * sum(b * (w + (w >> 32)) for b, w in zip(column[:2], row, strict=True))
        for r, row in enumerate(wide.tolist())
    )
    assert unsigned(box_checksum(wide.view(torch.float32), ((0, 2), (0, 4)), (2, 4), 8)) == wanted % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (7, 3), (5, 4), (3, 2, 5), (300, 700)])
def test_checksums_of_any_flat_ranges_add_up(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape)
    size = tensor.numel()
    for cuts in ((0, size), (0, 1, size), (0, size // 3, size // 2, size // 2, size)):
        parts = [
            box_checksum(tensor[tuple(slice(*edges) for edges in box)], box, shape, dtype.itemsize, dtype)
            for begin, end in zip(cuts, cuts[1:], strict=False)
            for box in flat_range_boxes(shape, begin, end)
        ]
        assert unsigned(torch.stack(parts).sum()) == full_checksum(tensor.to(dtype))


def test_a_checksum_sees_one_changed_bit_and_any_two_elements_exchanged() -> None:
    tensor = torch.randn(6, 50)
    original = full_checksum(tensor)
    for bit in (0, 15, 31):
        changed = tensor.clone()
        changed.view(torch.int32)[3, 7] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
        assert full_checksum(changed) != original
    for left, right in ((0, 1), (0, 32), (5, 261)):
        exchanged = tensor.clone().view(-1)
        # Differing in the sign bit alone is the hard case for weighted sums.
        exchanged[left], exchanged[right] = 1.5, -1.5
        before = full_checksum(exchanged.view(6, 50))
        exchanged[left], exchanged[right] = -1.5, 1.5
        assert full_checksum(exchanged.view(6, 50)) != before
    assert full_checksum(tensor.t().contiguous()) != original


def launches(function: Any) -> int:
    """Kernels that a device would run: views and bare memory left out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    kernels = ("copy_", "mv", "mul", "sum", "add_", "zero_", "bitwise_right_shift", "stack", "cat", "index_add_")
    return sum(event.count for event in profile.key_averages() if event.key.removeprefix("aten::") in kernels)


def test_a_checksum_on_a_device_is_a_few_kernels_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.randn(2048, 1024)  # in words of 64 bit, as bfloat16
    experts = torch.randn(6, 300, 64)[:, :, ::2]
    found = []
    for device in (False, True):
        if device:
            monkeypatch.delitem(checksum.BLOCK_WORDS, "cpu")  # any device but a CPU has the large blocks
        sums = []
        for tensor, width, dtype in ((large, 8, torch.bfloat16), (experts, 4, torch.float32)):
            box = tuple((0, size) for size in tensor.shape)
            args = (tensor, box, tensor.shape, width, dtype)
            sums.append((launches(lambda args=args: box_checksum(*args)), unsigned(box_checksum(*args))))
        found.append(sums)
    cpu, gpu = found
    assert [value for _, value in cpu] == [value for _, value in gpu]
    assert [count for count, _ in gpu] <= [9, 9] and cpu[0][0] > 3 * gpu[0][0]


# --- memory ----------------------------------------------------------------------------------------
def test_storages_leave_with_everything_that_lies_in_them_and_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movable, "CHUNK_BYTES", 1000)  # so that storages lie across the host buffer's chunks
    flat, other = torch.randn(700), torch.randn(3, 5, dtype=torch.bfloat16)
    view, before = flat[100:400].view(10, 30), flat.clone()
    foreign = torch.from_numpy(np.ones(4, np.float32))
    part = movable.Movable([flat, view, other, foreign], CPU)
    assert (part.nbytes, part.fixed_bytes, part.held_bytes) == (2830, 16, 2830)
    assert part.leave() == 2830 and part.held_bytes == 0 and part.leave() == 0
    assert part.come() == 2830 and torch.equal(flat, before) and torch.equal(view, before[100:400].view(10, 30))
    assert part.leave() == 0 and part.come() == 2830, "nobody wrote: the copy is good"
    view.fill_(7.0)
    part.written()
    assert part.leave() == 2830 and part.come() == 2830 and bool((flat[100:400] == 7).all())
    assert part.leave(keep=False) == 0 and part.come() == 0 and not flat.any(), "given up"
    gone = movable.Movable([other], CPU, comes_as="zeros")
    other.fill_(1.0)
    assert gone.leave() == 0 and gone.come() == 0 and not other.any()


# --- log-probs -------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("scale, softcap, biased", [(1.0, None, False), (0.3, None, True), (2.0, 1.5, True)])
def test_chunked_log_probs_have_the_values_and_gradients_of_log_softmax(
    chunk: int, temperature: float, scale: float, softcap: float | None, biased: bool
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    leaves = (hidden, weight, bias) if biased else (hidden, weight)
    targets = torch.randint(11, (9,))
    mix, mix_entropy = torch.randn(9), torch.randn(9)

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raw = scale * (hidden @ weight.t() + (0 if bias is None else bias))
        return raw if softcap is None else softcap * torch.tanh(raw / softcap)

    log_p = (logits(*leaves) / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((chosen * mix + entropy * mix_entropy).sum(), leaves)
    single = [t.detach().float().requires_grad_() for t in leaves]
    options: dict[str, Any] = {"temperature": temperature, "chunk_tokens": chunk, "with_entropy": True}
    head = Head(single[1], single[2] if biased else None, scale, softcap)
    for got in (
        log_probs_and_entropy(single[0], head, targets, **options),
        log_probs_of_logits(single[0], lambda part: logits(part, *single[1:]), targets, **options),
    ):
        torch.testing.assert_close(got, (chosen.float(), entropy.float()), rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad((got[0] * mix + got[1] * mix_entropy).sum(), single)
        torch.testing.assert_close(grads, tuple(g.float() for g in expected), rtol=1e-4, atol=1e-5)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0"):
        log_probs_and_entropy(
            torch.ones(1, 2), Head(torch.ones(3, 2)), torch.zeros(1, dtype=torch.int64), temperature=0, chunk_tokens=1,
            with_entropy=False,
        )  # fmt: skip


# --- attention -------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [None, 3])
def test_packed_attention_keeps_sequences_apart(window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [2, 4, 4, 7]
    packing = Packing.of([(length, ()) for length in lengths], CPU)
    query, key, value = (torch.randn(1, heads, sum(lengths), 8) for heads in (4, 2, 2))
    attended, _ = packed_attention(
        nn.Identity(), query, key, value, None, packing=packing, scaling=0.3, sliding_window=window
    )
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        q, k, v = query[:, :, part], key[:, :, part], value[:, :, part]
        seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - (window or length))
        repeated = [t.repeat_interleave(2, dim=1) for t in (k, v)]
        plain = F.scaled_dot_product_attention(q, *repeated, attn_mask=seen, scale=0.3)
        torch.testing.assert_close(attended[:, part], plain.transpose(1, 2))
        start += length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
def test_sequences_behind_a_shared_prefix_see_it_as_their_own(window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # A prompt of 5 tokens with responses of 2, 2 and 4, behind a sequence by itself.
    packing = Packing.of([(3, ()), (5, ()), (2, ((3, 8),)), (2, ((3, 8),)), (4, ((3, 8),))], CPU)
    assert [span.count for span in packing.spans] == [1, 1, 2, 1]
    inputs = [torch.randn(1, heads, 16, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    attended, _ = packed_attention(nn.Identity(), *inputs, None, packing=packing, scaling=0.3, sliding_window=window)
    rows = [list(range(3)), *([*range(3, 8), *own] for own in (range(8, 10), range(10, 12), range(12, 16)))]
    alone, mix = torch.zeros_like(attended), torch.randn_like(attended)
    for row in rows:
        part = [tensor[:, :, row] for tensor in inputs]
        own, _ = packed_attention(
            nn.Identity(), *part, None, packing=Packing.of([(len(row), ())], CPU), scaling=0.3,
            sliding_window=window,
        )  # fmt: skip
        new = [k for k, position in enumerate(row) if position >= 8 or row is rows[0] or row is rows[1]]
        alone = alone.index_copy(1, torch.tensor([row[k] for k in new]), own[:, new])
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(attended, alone, **close)
    torch.testing.assert_close(
        torch.autograd.grad((attended * mix).sum(), inputs), torch.autograd.grad((alone * mix).sum(), inputs), **close
    )
    assert (
        packing.keys is not None
        and packing.keys.tolist() == sum([rows[0], list(range(3, 8)), *rows[1:]], [])
        and packing.key_ends.tolist() == [0, 3, 8, 15, 22, 31]
    )


def eager(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention written out: [1, H, L, D] -> [1, L, H, Dv], scale 0.3."""
    scores = 0.3 * query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp().view(1, -1, 1, 1))
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return ((weights / total) @ value).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("local", ["none", "window", "chunks"])
def test_masks_soft_caps_and_sinks_are_those_of_each_row_alone(softcap: float | None, sinks: bool, local: str) -> None:
    torch.manual_seed(0)
    lengths = [2, 5, 5, 9]
    packing = Packing.of([(length, ()) for length in lengths], CPU)
    inputs = [torch.randn(1, heads, sum(lengths), size, requires_grad=True) for heads, size in ((4, 8), (2, 8), (2, 6))]
    sink = torch.randn(4, requires_grad=True) if sinks else None
    config = LlamaConfig(num_hidden_layers=1)
    config._attn_implementation, config.sliding_window, config.attention_chunk_size = "packed", 3, 4
    make = {
        "none": create_causal_mask,
        "window": create_sliding_window_causal_mask,
        "chunks": create_chunked_causal_mask,
    }
    ones = torch.ones(1, sum(lengths))
    with running(packing) as one:
        mask: Any = make[local](config, ones[..., None], ones, None)
    assert one.windows == {"none": set(), "window": {3}, "chunks": {4}}[local]
    attended, _ = packed_attention(nn.Identity(), *inputs, mask, scaling=0.3, softcap=softcap, s_aux=sink)
    alone, start = [], 0
    for length in lengths:
        here = torch.arange(length)
        seen = here <= here[:, None]
        if local == "window":
            seen = seen & (here > here[:, None] - 3)
        if local == "chunks":
            seen = seen & (here // 4 == here[:, None] // 4)
        part = [tensor[:, :, start : start + length] for tensor in inputs]
        alone.append(eager(*part, seen, softcap, sink))  # type: ignore[arg-type]
        start += length
    torch.testing.assert_close(attended, torch.cat(alone, dim=1))
    leaves = inputs + ([sink] if sink is not None else [])
    mix = torch.randn_like(attended)
    torch.testing.assert_close(
        torch.autograd.grad((attended * mix).sum(), leaves),
        torch.autograd.grad((torch.cat(alone, dim=1) * mix).sum(), leaves),
    )


def test_packed_attention_refuses_a_mask_that_the_model_made_by_itself() -> None:
    tensor = torch.ones(1, 1, 2, 4)
    with pytest.raises(ValueError, match="Identity makes attention masks of its own"):
        packed_attention(nn.Identity(), tensor, tensor, tensor, torch.zeros(1, 1, 2, 2))  # type: ignore[arg-type]


# --- packing ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("whole_groups", [False, True])
@pytest.mark.parametrize("budget", [1, 17, 60, 10_000])
def test_micro_batches_hold_every_row_once_within_the_budget(budget: int, whole_groups: bool) -> None:
    batch = make_batch(groups=12)
    lengths = batch["prompt_ids"].lengths + batch["response_ids"].lengths
    cut = micro_batches(batch, budget, whole_groups=whole_groups)
    np.testing.assert_array_equal(np.sort(np.concatenate(cut)), np.arange(batch.num_rows))
    groups = batch["group_id"].values
    for rows in cut:
        alone = len(set(groups[rows])) == 1 if whole_groups else len(rows) == 1
        assert lengths[rows].sum() <= budget or alone
        assert np.all(np.diff(lengths[rows]) >= 0)
    if whole_groups:
        assert sum(len(set(groups[rows])) for rows in cut) == len(set(groups))


def test_packing_puts_each_token_after_the_position_it_is_predicted_from() -> None:
    batch = Batch.of(prompt_ids=[[5], [6, 7, 8]], response_ids=[[9, 10], [11]])
    packed = pack(batch, CPU)
    assert packed.input_ids.tolist() == [[5, 9, 10, 6, 7, 8, 11]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert packed.before_token.tolist() == [0, 1, 5]
    assert packed.targets.tolist() == [9, 10, 11]
    assert packed.last_token.tolist() == [2, 6]


def test_rows_of_one_prompt_share_it() -> None:
    batch = Batch.of(prompt_ids=[[6, 7], [5], [6, 7], [6, 7]], response_ids=[[], [9, 10], [11], [12, 13]])
    packed = pack(batch, CPU, way=Way(rows="shared", attention="packed"))
    assert packed.input_ids.tolist() == [[5, 9, 10, 6, 7, 11, 12, 13]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 2, 3]]
    assert packed.targets.tolist() == [9, 10, 11, 12, 13]
    assert packed.before_token.tolist() == [0, 1, 4, 4, 6]
    assert packed.last_token.tolist() == [4, 2, 5, 7]
    assert packed.padding == 0 and packed.packing.ends.tolist() == [0, 3, 5, 6, 8]


def test_a_row_without_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has none"):
        pack(Batch.of(prompt_ids=[[5], []], response_ids=[[9], [11]]), CPU)


# --- schedule and device ---------------------------------------------------------------------------
def test_schedules_by_hand() -> None:
    def rates(**config: object) -> list[float]:
        settings = OptimizerConfig(lr=1.0, **config)  # type: ignore[arg-type]
        return [learning_rate(step, settings) for step in range(6)]

    assert rates() == [1.0] * 6
    assert rates(warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    linear = {"schedule": "linear", "warmup_steps": 1, "total_steps": 5, "min_lr_ratio": 0.2}
    assert rates(**linear) == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(schedule="cosine", total_steps=4) == pytest.approx([1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("config", [{"schedule": "step"}, {"schedule": "linear"}])
def test_a_schedule_that_makes_no_sense_is_refused(config: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="schedule"):
        learning_rate(0, OptimizerConfig(**config))  # type: ignore[arg-type]
