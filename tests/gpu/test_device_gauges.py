"""A rank's gauges, of a real driver."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.devices import ON_GPU
from workers.device_gauges import DeviceGauges

pytestmark = ON_GPU


def test_a_gpu_tells_how_busy_hot_and_full_it_is() -> None:
    pytest.importorskip("pynvml")
    gauges = DeviceGauges(torch.device("cuda:0"))
    assert not gauges.missing
    held = torch.ones(256 << 20, dtype=torch.uint8, device="cuda:0")
    gauges.read()
    told = gauges.told()
    assert told["memory_used_bytes"] >= held.nbytes and 0 < told["temperature_celsius"] < 120
    assert told["memory_used_bytes"] <= told["memory_total_bytes"] and 0 <= told.get("busy_percent", 0) <= 100
