"""Which device a process has, and what vLLM's own helpers make of what it is then told."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from workers.device import assigned_index, backend_for, device_for, sees_its_peers

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("assigned", "visible", "index"),
    [
        (["5"], "5", 0),  # Ray's default: every process sees its own
        (["GPU-b1"], "GPU-b1", 0),
        (["MIG-7c"], "MIG-7c", 0),
        (["5"], "4,5,6,7", 1),  # RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1 under a mask of the node's own
        (["GPU-b1"], "GPU-a0, GPU-b1", 1),
        (["6"], None, 6),  # the same without one
        ([], "0,1", None),
        ([], None, None),
    ],
)
def test_a_process_takes_the_device_that_ray_assigned(
    assigned: list[str], visible: str | None, index: int | None
) -> None:
    assert assigned_index(assigned, visible) == index


def test_a_device_that_the_process_cannot_see_is_refused() -> None:
    with pytest.raises(ValueError, match="assigned, 2, must be one of CUDA_VISIBLE_DEVICES=0,1"):
        assigned_index(["2"], "0,1")
    with pytest.raises(ValueError, match="must be a number, got 'GPU-b1'"):
        assigned_index(["GPU-b1"], None)


def test_devices_are_chosen_in_one_place() -> None:
    assert device_for(3, "cpu") == CPU
    assert device_for(None, "auto") == CPU
    assert backend_for(CPU) == "gloo"
    with pytest.raises(ValueError, match="auto, cpu or cuda"):
        device_for(0, "tpu")
    with pytest.raises(ValueError, match="was given GPU"):
        device_for(torch.cuda.device_count(), "cuda")
    with pytest.raises(ValueError, match="assigned none"):
        device_for(None, "cuda")


def test_ranks_see_their_peers_where_a_copy_s_devices_have_different_names() -> None:
    assert sees_its_peers([[0, 1], [2, 3]], [0, 1, 2, 3])
    assert sees_its_peers([[0, 2], [1, 3]], [4, 5, 6, 7])
    assert sees_its_peers([[0], [1]], [0, 0])
    assert not sees_its_peers([[0, 1], [2, 3]], [0, 0, 0, 0])
    assert not sees_its_peers([[0, 1, 2, 3]], [0, 1, 0, 1])  # two nodes


VLLM = """
import os, sys
import torch
from vllm.platforms.interface import Platform
from rlhf_dist.config import RolloutConfig
from tests.tiny import save_llama
from workers.device import assigned_index, sees_its_peers
from workers.engines.generation.vllm import _engine_args

class Cuda(Platform):
    device_name, device_control_env_var = "cuda", "CUDA_VISIBLE_DEVICES"

def found(masks, ids):
    'For each rank: [the id of the device that it runs on], the ids of those that vLLM reaches for as its peers.'
    indices = [assigned_index([own], mask) for mask, own in zip(masks, ids)]
    sees = sees_its_peers([range(len(ids))], indices)
    args = _engine_args(sys.argv[1], RolloutConfig(tensor_parallel=len(ids)), torch.device("cuda", 0), sees)
    for mask, own, index in zip(masks, ids, indices):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if mask is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = mask
        assert Cuda.device_id_to_physical_device_id(index) == int(own), (mask, own)
        assert Cuda.logical_device_id_to_visible_device_id(index) == index, (mask, own)
        asked = range(len(ids)) if not args.disable_custom_all_reduce else ()  # as CustomAllreduce's _can_p2p asks
        for peer in asked:
            Cuda.logical_device_id_to_visible_device_id(peer)
    return args.disable_custom_all_reduce

assert found(["4", "5"], ["4", "5"]) is True
assert found(["4,5", "4,5"], ["4", "5"]) is False
assert found([None, None], ["0", "1"]) is False
assert found([None, None], ["6", "7"]) is False  # the second pool of a node
os.environ["CUDA_VISIBLE_DEVICES"] = "4"
try:
    Cuda.logical_device_id_to_visible_device_id(1)
except IndexError:
    print("what masked ranks would have met")
"""


def test_vllm_finds_every_device_it_asks_for_however_they_are_masked(tmp_path: object) -> None:
    # Ranks of one node, in a process of its own for what vLLM's import does to the environment.
    done = subprocess.run(
        [sys.executable, "-c", VLLM, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "what masked ranks would have met"
