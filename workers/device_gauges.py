"""What a rank's GPU was at since somebody last asked: how busy, how hot, watts, memory; of NVML, read once a second.

    thread ── a reading a second ──> DeviceGauges <── told, in a concurrency group of its own ── controller, each step

Where there is no NVIDIA driver, or no package that talks to it (`nvidia-ml-py`), nothing is told: a missing gauge is no
gauge of 0.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import torch

from rlhf_dist.gpu_gauges import readings_of

_log = logging.getLogger(__name__)
EVERY_S = 1.0
"""NVML's own averages are over a sixth of a second to one."""
MEANS = ("busy_percent", "power_watts")
"""Told as means over the seconds since they were last told; the others as the largest."""


class DeviceGauges:
    """Of one CUDA device, for the life of this process."""

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        self._read: dict[str, list[float]] = {}
        """Gauge -> readings since it was last told."""
        self._handle: Any = None
        self.missing = ""
        """Why nothing is told; empty where there is something."""
        try:
            self._handle = _handle_of(device)
        except Exception as error:  # torch's way to a handle is its own business, and a gauge is no reason not to run
            self.missing = str(error)
            _log.info("no gauges of %s: %s", device, self.missing)
            return
        threading.Thread(target=self._watch, name="device-gauges", daemon=True).start()

    def told(self) -> dict[str, float]:
        """Gauge -> value since this was last called; without those that the device does not have."""
        with self._lock:
            read, self._read = self._read, {}
        return {name: sum(of) / len(of) if name in MEANS else max(of) for name, of in read.items()}

    def read(self) -> None:
        """Read every gauge once."""
        found = readings_of(self._handle)
        with self._lock:
            for name, value in found.items():
                self._read.setdefault(name, []).append(value)

    def _watch(self) -> None:
        while True:
            self.read()
            time.sleep(EVERY_S)


def _handle_of(device: torch.device) -> Any:
    """NVML's handle of this process's device; torch knows which of the machine's it is. Raises ImportError, or
    RuntimeError, where there is none."""
    try:
        import pynvml
    except ImportError as error:
        raise ImportError("nvidia-ml-py is not installed; pip install nvidia-ml-py") from error
    try:
        return torch.cuda._get_pynvml_handler(device.index or 0)
    except pynvml.NVMLError as error:
        raise RuntimeError(str(error)) from error
