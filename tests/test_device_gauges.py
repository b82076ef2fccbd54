"""Gauges of GPUs: what NVML says becomes metrics of each rank and gauges of the endpoint; without NVML there are none.

No GPU is here: NVML's functions are a strict double of the real package's (its signatures, its errors, its order of
calls). `tests/gpu/test_device_gauges.py` asks a real driver.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from controller.cluster.local import LocalReplies, _Process
from controller.cluster.pool import Pool
from controller.cluster.pool_gauges import PoolGauges
from controller.record.prometheus import PrometheusEndpoint
from tests.test_prometheus import scraped
from workers.device_gauges import DeviceGauges

pynvml = pytest.importorskip("pynvml")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is here")


class Nvml:
    """Two devices: a busy one, and one that tells neither watts nor how busy it is."""

    def __init__(self) -> None:
        self.started, self.handles = False, {0: object(), 1: object()}
        self.busy = 40

    def nvmlInit(self) -> None:
        self.started = True

    def nvmlDeviceGetCount(self) -> int:
        self._check(None)
        return len(self.handles)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        self._check(None)
        if index not in self.handles:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self.handles[index]

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> Any:
        self._tells(self._check(handle))
        return SimpleNamespace(gpu=self.busy, memory=3)

    def nvmlDeviceGetMemoryInfo(self, handle: object, version: Any = None) -> Any:
        used = (self._check(handle) + 1) << 30
        return SimpleNamespace(total=80 << 30, used=used, free=(80 << 30) - used)

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:
        self._tells(self._check(handle))
        return 250_500  # milliwatts

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int:
        if sensor != pynvml.NVML_TEMPERATURE_GPU:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return 60 + self._check(handle)

    def _check(self, handle: object | None) -> int:
        if not self.started:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        found = [index for index, known in self.handles.items() if handle in (None, known)]
        if not found:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return found[0]

    def _tells(self, device: int) -> None:
        if device == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    double = Nvml()
    for name in (name for name in dir(double) if name.startswith("nvml")):
        mine, real = getattr(double, name), getattr(pynvml, name)
        assert list(inspect.signature(mine).parameters) == list(inspect.signature(real).parameters), name
        monkeypatch.setattr(pynvml, name, mine)
    return double


def of_ranks(*devices: str) -> tuple[tuple[_Process, ...], Callable[[], dict[str, float]]]:
    """Metrics of a pool whose ranks have these devices, step for step."""
    processes = tuple(_Process("main") for _ in devices)
    for process, device in zip(processes, devices, strict=True):
        process.worker._gauges = DeviceGauges(torch.device(device)) if device != "cpu" else None
    pool = Pool("main", processes, devices=devices, pids=tuple(range(len(devices))))
    gauges = PoolGauges(LocalReplies())
    return processes, lambda: gauges.metrics({"main": pool})


def test_each_rank_tells_its_own_device_since_the_last_step(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")  # the process's first device is the machine's second
    monkeypatch.setattr(DeviceGauges, "_watch", DeviceGauges.read)  # a reading, and no more by themselves
    (_, second), step = of_ranks("cuda:0", "cuda:1")
    assert step() == {}, "asked, and not waited for"
    nvml.busy = 80
    assert step() == {
        "gpu/main-0/temperature_celsius": 61.0,
        "gpu/main-0/memory_used_bytes": float(2 << 30),
        "gpu/main-0/memory_total_bytes": float(80 << 30),
        "gpu/main-1/busy_percent": 40.0,
        "gpu/main-1/power_watts": 250.5,
        "gpu/main-1/temperature_celsius": 60.0,
        "gpu/main-1/memory_used_bytes": float(1 << 30),
        "gpu/main-1/memory_total_bytes": float(80 << 30),
    }
    second.worker._gauges.read()
    nvml.busy = 20
    second.worker._gauges.read()
    step()
    assert step()["gpu/main-1/busy_percent"] == 50.0, "the mean of the readings since"
    assert step() == {}, "nothing was read since"


def test_of_many_ranks_mean_least_and_most(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(DeviceGauges, "_watch", DeviceGauges.read)
    _, step = of_ranks(*["cuda:0", "cuda:1"] * 40)
    step()
    told = step()
    assert told["gpu/main/temperature_celsius"] == 60.5 and told["gpu/main/temperature_celsius_least"] == 60.0
    assert told["gpu/main/temperature_celsius_most"] == 61.0 and len(told) == 15
    assert told["gpu/main/busy_percent"] == 40.0, "of those that tell it"


def test_the_endpoint_tells_the_machine_s_devices(nvml: Nvml, tmp_path: Path) -> None:
    endpoint = PrometheusEndpoint("a-run", tmp_path, "127.0.0.1", 0)
    try:
        told = {name: value for name, value in scraped(endpoint.url).items() if name[0].startswith("rlhf_dist_gpu")}
    finally:
        endpoint.close()
    assert told == {
        ("rlhf_dist_gpu_memory_bytes", "0", "total"): 80 << 30,
        ("rlhf_dist_gpu_memory_bytes", "0", "used"): 1 << 30,
        ("rlhf_dist_gpu_memory_bytes", "1", "total"): 80 << 30,
        ("rlhf_dist_gpu_memory_bytes", "1", "used"): 2 << 30,
        ("rlhf_dist_gpu_busy_percent", "0"): 40.0,
        ("rlhf_dist_gpu_power_watts", "0"): 250.5,
        ("rlhf_dist_gpu_temperature_celsius", "0"): 60.0,
        ("rlhf_dist_gpu_temperature_celsius", "1"): 61.0,
    }


@NO_GPU
def test_without_a_driver_there_is_no_gauge_and_a_word_why(tmp_path: Path) -> None:
    with pytest.raises(pynvml.NVMLError_LibraryNotFound):
        pynvml.nvmlInit()
    gauges = DeviceGauges(torch.device("cuda:0"))
    assert "NVML Shared Library Not Found" in gauges.missing and gauges.told() == {}
    _, step = of_ranks("cpu")
    assert step() == step() == {}
    endpoint = PrometheusEndpoint("a-run", tmp_path, "127.0.0.1", 0)
    try:
        assert not [name for name, *_ in scraped(endpoint.url) if name.startswith("rlhf_dist_gpu")]
    finally:
        endpoint.close()
