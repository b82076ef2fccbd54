"""What NVML says of one device: a gauge that the device does not have is left out, never 0."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any


def readings_of(device: Any) -> dict[str, float]:
    """Gauge -> value now. device: NVML's handle of it."""
    import pynvml

    found: dict[str, float] = {}
    asked: dict[str, Callable[[], float]] = {
        "busy_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(device).gpu,
        "power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(device) / 1000,
        "temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU),
        "memory_used_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(device).used,
        "memory_total_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(device).total,
    }
    for name, ask in asked.items():
        with suppress(pynvml.NVMLError):
            found[name] = float(ask())
    return found
