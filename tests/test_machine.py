"""What is read of a machine, and what settings that are left to it become: processors and GPUs of several kinds."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.cluster.machine import machine_of_nodes
from rlhf_dist import machine as machine_module
from rlhf_dist.auto_settings import machine_lines, settle
from rlhf_dist.checks import check_launch
from rlhf_dist.compose import Launch, compose
from rlhf_dist.config import PoolConfig, RayConfig
from rlhf_dist.hardware import parse_cluster
from rlhf_dist.machine import Gpu, Machine, described_machine, local_machine, read_gpus, read_processor, visible
from rlhf_dist.machine_settings import attention_on, device_of, dtype_on, gpu_share, slots_on
from tests.shelf import of_each_shape, questions_of, rows_of, rules_of
from tests.tiny import save_llama

# Cut down to the lines that are read, and some beside them.
XEON_SAPPHIRE_RAPIDS = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu sse2 avx avx2 avx512f avx512bw avx512vl avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8
vmx flags\t: vnmi preemption_timer
processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu sse2 avx avx2 avx512f avx512bw avx512vl avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8
"""
XEON_SKYLAKE = (
    "model name : Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz\nflags : fpu sse2 avx avx2 avx512f avx512bw avx512vl\n"
)
EPYC_GENOA = "model name : AMD EPYC 9R14\nflags : fpu avx2 avx512f avx512_bf16 avx512_vnni\n"
EPYC_MILAN = "model name : AMD EPYC\nflags : fpu sse2 avx avx2 fma\n"
GRAVITON_3 = "processor : 0\nBogoMIPS : 2100.00\nFeatures : fp asimd sve i8mm bf16 svebf16\nCPU part : 0xd40\n"
GRAVITON_2 = "processor : 0\nFeatures : fp asimd aes atomics asimddp\n"
BIG_AND_LITTLE = "Features : fp asimd bf16 i8mm\nprocessor : 1\nFeatures : fp asimd\n"
H100 = Gpu(name="NVIDIA H100 80GB HBM3", memory_bytes=80 << 30, capability=(9, 0), uuid="GPU-aa")
T4 = Gpu(name="Tesla T4", memory_bytes=15 << 30, capability=(7, 5), uuid="GPU-bb")


def cpu(cpuinfo: str, architecture: str = "x86_64", cores: int = 16) -> Machine:
    return Machine(text="this machine", processor=read_processor(cpuinfo, architecture, cores), gpus=())


def gpus(*cards: Gpu, nodes: int = 1) -> Machine:
    return replace(cpu(EPYC_MILAN), gpus=cards, nodes=nodes)


# --- what is read ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cpuinfo", "architecture", "instructions", "dtype"),
    [
        (XEON_SAPPHIRE_RAPIDS, "x86_64", ("amx_bf16", "avx512_bf16"), "bfloat16"),
        (EPYC_GENOA, "x86_64", ("avx512_bf16",), "bfloat16"),
        (XEON_SKYLAKE, "x86_64", (), "float32"),
        (EPYC_MILAN, "x86_64", (), "float32"),
        (GRAVITON_3, "aarch64", ("bf16", "svebf16"), "bfloat16"),
        (GRAVITON_2, "aarch64", (), "float32"),
        (BIG_AND_LITTLE, "aarch64", (), "float32"),  # a thread may land on a core without
        (GRAVITON_3, "riscv64", (), "float32"),  # a flag of another family says nothing
        ("", "arm64", (), "float32"),  # macOS has no such file
    ],
)
def test_a_processor_is_what_all_its_cores_have(
    cpuinfo: str, architecture: str, instructions: tuple[str, ...], dtype: str
) -> None:
    machine = cpu(cpuinfo, architecture)
    assert machine.processor is not None and machine.processor.bfloat16 == instructions
    choice = dtype_on(machine, "cpu")
    assert choice.value == dtype and choice.departs == (dtype == "float32")


def test_a_float32_choice_says_what_the_processor_lacks() -> None:
    assert dtype_on(cpu(EPYC_MILAN), "cpu").why.startswith(
        "this processor has no bfloat16 instructions (amx_bf16 or avx512_bf16)"
    )
    assert "nobody says" in dtype_on(cpu("", "arm64"), "cpu").why
    assert "amx_bf16" in dtype_on(cpu(XEON_SAPPHIRE_RAPIDS), "cpu").why
    assert cpu(XEON_SAPPHIRE_RAPIDS).line == "this machine: Intel(R) Xeon(R) Platinum 8488C, 16 cores"


def test_gpus_are_those_that_cuda_shows() -> None:
    listed = (
        "GPU-aa1, 81559, 9.0, NVIDIA H100 80GB HBM3\nGPU-bb2, 15360, 7.5, Tesla T4\n"
        "GPU-cc3, [N/A], 12.1, NVIDIA GB10\nUnable to determine the device handle for GPU2: Unknown Error\n"
    )
    found = read_gpus(listed)
    assert [(gpu.name, gpu.capability, gpu.memory_bytes >> 20) for gpu in found] == [
        ("NVIDIA H100 80GB HBM3", (9, 0), 81559), ("Tesla T4", (7, 5), 15360), ("NVIDIA GB10", (12, 1), 0)
    ]  # fmt: skip
    shown = {
        devices: [gpu.uuid for gpu in visible(found, devices)]
        for devices in (None, "", "1", "1,0", "0,9,1", "GPU-bb,0", "-1,0", "MIG-77")
    }
    assert shown == {
        None: ["GPU-aa1", "GPU-bb2", "GPU-cc3"], "": [], "1": ["GPU-bb2"], "1,0": ["GPU-bb2", "GPU-aa1"],
        "0,9,1": ["GPU-aa1"], "GPU-bb,0": ["GPU-bb2", "GPU-aa1"], "-1,0": [], "MIG-77": ["GPU-aa1"],
    }  # fmt: skip


def test_nvidia_smi_is_asked_once_and_never_waited_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, calls = tmp_path / "nvidia-smi", tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine_module, "SMI_WAIT_S", 0.5)
    try:
        for script, expected in (("echo 'GPU-a, 1000, 9.0, Some GPU'", 1), ("exec sleep 60", 0), ("exit 9", 0)):
            machine_module._gpus.cache_clear()
            calls.unlink(missing_ok=True)
            tool.write_text(f"#!/bin/sh\necho x >> {calls}\n{script}\n")
            tool.chmod(0o755)
            started = time.monotonic()
            assert [len(local_machine().gpus) for _ in range(3)] == [expected] * 3
            assert calls.read_text() == "x\n" and time.monotonic() - started < 5
    finally:
        machine_module._gpus.cache_clear()


# --- what settings become ----------------------------------------------------------------------------------
def test_gpus_compute_in_bfloat16_unless_one_is_too_old() -> None:
    assert dtype_on(gpus(H100), "cuda").value == "bfloat16"
    old = dtype_on(gpus(H100, T4), "cuda")
    assert old.value == "float32" and "Tesla T4 has no bfloat16: compute capability 7.5" in old.why
    assert dtype_on(gpus(H100), "cpu").value == "float32", "a pool with device=cpu, on this processor"
    assert attention_on("cuda", "bfloat16").value == "flash" and attention_on("cuda", "float32").value == "fused"


@pytest.mark.parametrize(
    ("machine", "pools", "taken", "on_each_node", "slots"),
    [
        (cpu(EPYC_MILAN, cores=1), 1, 0, False, 1),
        (cpu(EPYC_MILAN, cores=2), 1, 0, False, 2),
        (cpu(EPYC_MILAN, cores=64), 1, 0, False, 2),
        (cpu(EPYC_MILAN, cores=64), 4, 0, False, 1),
        (gpus(H100), 1, 0, False, 1),
        (gpus(H100), 2, 0, False, 1),  # one too many, which check_slots says
        (gpus(*[H100] * 8), 1, 0, False, 8),
        (gpus(*[H100] * 8), 2, 0, False, 4),
        (gpus(*[H100] * 8), 1, 6, False, 2),
        (gpus(*[H100] * 32, nodes=4), 1, 0, False, 32),
        (gpus(*[H100] * 32, nodes=4), 1, 0, True, 8),
    ],
)
def test_slots_are_all_gpus_or_two_processes(
    machine: Machine, pools: int, taken: int, on_each_node: bool, slots: int
) -> None:
    device = device_of(PoolConfig(), machine)
    assert slots_on(machine, device, pools, taken, on_each_node).value == slots


def test_generation_alone_has_more_of_its_gpu() -> None:
    assert [gpu_share(True, 1).value, gpu_share(False, 1).value, gpu_share(True, 2).value] == [0.5, 0.85, 0.25]


# --- in a launch -------------------------------------------------------------------------------------------
SETTINGS = ("task=addition", "model.path=llama3-8b")


def launch_on(machine: Machine, *overrides: str, recipe: str = "ppo") -> Launch:
    return settle(compose(recipe, [*SETTINGS, *overrides]), machine)


def test_a_launch_has_values_for_what_was_left_to_the_machine() -> None:
    launch = compose("ppo", [*SETTINGS])
    old, new = cpu(EPYC_MILAN, cores=1), cpu(XEON_SAPPHIRE_RAPIDS)
    for machine, dtype, slots, cache in ((old, "float32", 1, 64 << 20), (new, "bfloat16", 2, 64 << 20),
                                         (gpus(*[H100] * 8), "bfloat16", 8, 0)):  # fmt: skip
        launch = settle(launch, machine)  # again and again: the last machine counts
        actor = launch.roles["actor"]
        assert actor.engine.dtype == actor.rollout.dtype == launch.roles["critic"].engine.dtype == dtype
        assert launch.run.placement.pools["main"].slots == slots and actor.rollout.kv_cache_bytes == cache
        assert actor.rollout.bucket_bytes == (1 << 30 if machine.gpus else 64 << 20)
    assert "dtype: auto" in launch.yaml, "what a run keeps is what was asked"


def test_what_is_set_by_hand_stays_and_is_named_where_it_is_slow() -> None:
    launch = launch_on(
        cpu(EPYC_MILAN), "model.dtype=bfloat16", "critic.engine.dtype=auto", "placement.pools.main.slots=3",
        "actor.rollout.kv_cache_bytes=1000000", "actor.rollout.bucket_bytes=2000000",
    )  # fmt: skip
    actor = launch.roles["actor"]
    assert (actor.engine.dtype, launch.roles["critic"].engine.dtype) == ("bfloat16", "float32")
    assert (actor.rollout.kv_cache_bytes, actor.rollout.bucket_bytes) == (1000000, 2000000)
    assert launch.run.placement.pools["main"].slots == 3
    lines = machine_lines(launch)
    (slow,) = [line for line in lines if line.startswith("slow")]
    assert "actor.engine.dtype, actor.rollout.dtype, reference.engine.dtype=bfloat16" in slow
    assert slow.endswith("leave model.dtype=auto") and not any("slots" in line for line in lines)
    assert not [line for line in machine_lines(launch_on(gpus(H100), "model.dtype=bfloat16")) if "slow" in line]


def test_pools_divide_the_gpus_and_pools_on_cpus_do_not_count() -> None:
    eight = gpus(*[H100] * 8)

    def slots(*overrides: str, recipe: str = "ppo") -> dict[str, int]:
        launch = launch_on(eight, *overrides, recipe=recipe)
        used = {key.split(".")[2] for one in launch.choices for key in one.keys if key.endswith(".slots")}
        return {name: launch.run.placement.pools[name].slots for name in sorted(used)}

    assert slots("placement=split") == {"policy": 4, "values": 4}
    assert slots("placement=split", recipe="grpo") == {"policy": 8}, "no role of this recipe is in the other"
    assert slots("placement=standalone") == {"actor": 2, "critic": 2, "reference": 2, "rollout": 2}
    assert slots("placement=standalone", "placement.pools.actor.slots=5") == {"critic": 1, "reference": 1, "rollout": 1}
    assert slots("placement=split", "placement.pools.values.device=cpu") == {"policy": 8, "values": 2}
    mixed = launch_on(eight, "placement=split", "placement.pools.values.device=cpu")
    assert mixed.roles["critic"].engine.dtype == "float32" and mixed.roles["actor"].engine.dtype == "bfloat16"


def test_check_says_what_settings_became_here_and_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    here = "\n".join(machine_lines(launch_on(cpu(EPYC_MILAN, cores=1))))
    assert "dtype float32 (actor.engine, actor.rollout, critic.engine, reference.engine): this processor has no" in here
    assert "slots 1 (main): one core for it on this machine" in here and "gpu_memory_share" not in here
    cluster = parse_cluster("4x8xH100")
    lines = "\n".join(check_launch(compose("ppo", [*SETTINGS]), cluster))
    assert "machine   4x8xH100: 32 x H100, 80.0 GiB each" in lines
    assert "slots 32 (main): the 32 GPUs of 4x8xH100" in lines and "dtype bfloat16 (actor.engine," in lines
    assert "computes in bfloat16, generates in bfloat16" in lines and "bucket_bytes 1 GiB" in lines
    assert "gpu_memory_share 0.5" in lines and "attention flash" in lines


def test_a_head_size_that_vllm_lacks_on_a_cpu_is_no_fault_of_a_gpu_cluster(tmp_path: Path) -> None:
    odd = save_llama(tmp_path / "odd", hidden=160)  # heads of 40
    settings = ["task=addition", f"model.path={odd}", "placement.pools.main.slots=2"]
    lines = check_launch(compose("ppo", settings), parse_cluster("1x8xH100"))
    assert any(line.startswith("machine   1x8xH100") for line in lines)
    if not local_machine().gpus:
        with pytest.raises(ValueError, match="its attention heads are 40 wide"):
            check_launch(compose("ppo", settings))


def test_a_described_cluster_says_nothing_of_processors() -> None:
    machine = described_machine(parse_cluster("2x4xA100-40G"))
    assert machine.processor is None and len(machine.gpus) == 8 and machine.nodes == 2
    assert dtype_on(machine, "cuda").value == "bfloat16"
    assert "nobody says" in dtype_on(machine, "cpu").why


# --- one slot ----------------------------------------------------------------------------------------------
FIELDS = ("reward", "score", "sign")
"""Numbers that some recipes want of their rows."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of each form beside it."""
    folder = save_llama(tmp_path_factory.mktemp("tiny"), hidden=128)
    rows = {
        "examples": {
            "prompt": "1+1=",
            "response": "2",
            "desirable": 1,
            **dict.fromkeys(FIELDS, 1.0),
            "ratings": [1] * 5,
        },
        "preferences": {"prompt": "1", "chosen": "2", "rejected": "3"},
    }
    for name, row in {"prompts": {"prompt": "1+1=", "answer": "2"}, **rows}.items():
        (folder / f"{name}.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    return folder


@pytest.mark.parametrize("recipe", of_each_shape())
@pytest.mark.parametrize("machine", [cpu(EPYC_MILAN, cores=1), gpus(H100)], ids=["core", "GPU"])
def test_every_recipe_starts_with_the_one_slot_there_is(recipe: str, machine: Machine, tiny: Path) -> None:
    settings = [f"model.path={tiny}", "task=none", "data.prompts_per_step=4", *rows_of(recipe, tiny), *rules_of(recipe)]
    settings += questions_of(recipe)
    launch = settle(compose(recipe, settings), machine)
    assert launch.run.placement.pools["main"].slots == 1
    if machine.gpus and not local_machine().gpus:
        launch = replace(launch, run=replace(launch.run, ray=RayConfig(address="auto")))  # where there is one
    assert any(line.startswith("pool      main: 1 slots (auto)") for line in check_launch(launch))


def test_a_cluster_that_is_joined_is_what_its_nodes_say() -> None:
    def node(alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Resources": {name.replace("__", ":"): amount for name, amount in resources.items()}}

    head, worker = node(CPU=8), node(CPU=64, GPU=8, accelerator_type__H100=1)
    machine = machine_of_nodes([head, worker, worker, node(alive=False, CPU=64, GPU=8)], host_processes=1)
    assert (len(machine.gpus), machine.nodes, machine.gpus[0].name) == (16, 2, "H100")
    assert dtype_on(machine, "cuda").value == "bfloat16" and slots_on(machine, "cuda", 1, 0, True).value == 8
    old = machine_of_nodes([node(CPU=8, GPU=4, accelerator_type__T4=1)], host_processes=1)
    assert dtype_on(old, "cuda").value == "float32"
    assert slots_on(machine_of_nodes([node(CPU=2)], host_processes=1), "cpu", 1, 0, False).value == 1
