"""The sequence in which training and generation share a device."""

from __future__ import annotations

from rlhf_dist.reshard.memory import Kind, moves, predicted_bytes

GIB = 1 << 30


def test_the_cycle_frees_before_it_fills() -> None:
    assert moves("train", "sync").leave == ("optimizer",) and moves("train", "sync").come == ("weights",)
    assert moves("sync", "generate").leave == ("parameters",) and moves("sync", "generate").come == ("cache",)
    back = moves("generate", "train")
    assert back.leave == ("weights", "cache") and back.come == ("parameters", "optimizer")
    start = moves(None, "train")  # after construction everything is there
    assert start.leave == ("weights", "cache") and start.come == ()


def test_peaks_of_a_7b_model_over_8_ranks() -> None:
    """float32 masters and Adam over 8 ranks; bf16 generation weights over 2."""
    parameters = 7 * 10**9
    sizes: dict[Kind, int] = {
        "parameters": parameters * 4 // 8,
        "gradients": parameters * 4 // 8,
        "optimizer": parameters * 8 // 8,
        "activations": 8 * GIB,
        "weights": parameters * 2 // 2,
        "buckets": 1 * GIB,
        "cache": 40 * GIB,
    }
    assert predicted_bytes(sizes) == {
        "train": parameters * 2 + 8 * GIB,
        "sync": parameters // 2 + parameters + 1 * GIB,
        "generate": parameters + 40 * GIB,
    }
