from __future__ import annotations

import pytest

from rlhf_dist.checks import CPU_HEAD_SIZES
from rlhf_dist.reshard.checks import check_tensor_parallel

LLAMA = {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 24}


@pytest.mark.parametrize(("tp", "world"), [(1, 1), (1, 3), (2, 4), (4, 4), (12, 12)])
def test_fitting_sizes_pass(tp: int, world: int) -> None:
    check_tensor_parallel(LLAMA, tp, world)
    check_tensor_parallel({"text_config": LLAMA}, tp, world)


@pytest.mark.parametrize(
    ("change", "tp", "world", "says"),
    [
        ({}, 0, 1, "must be >= 1, got 0"),
        ({}, 2, 3, r"divide the actor's 3 slots, got 2; set it to one of \[1, 3\]"),
        ({"num_attention_heads": 9}, 2, 2, r"9 attention heads, got 2; set it to one of \[1, 3, 9\]"),
        ({}, 6, 6, r"4 key-value heads or be a multiple of them, got 6; set it to one of \[1, 2, 4, 12\]"),
        ({"intermediate_size": 26}, 4, 4, "intermediate_size 26, got 4"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change: dict[str, int], tp: int, world: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_tensor_parallel(LLAMA | change, tp, world)


def test_the_head_sizes_checked_before_a_start_are_those_of_the_vllm_that_is_installed() -> None:
    attention = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    assert tuple(attention.CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_SIZES
