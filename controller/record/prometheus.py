"""What a run is at, for Prometheus to scrape: `output.prometheus_port=9400`, then http://127.0.0.1:9400/metrics.

    a step ends ── log ──> the last value of every metric          rlhf_dist_metric{name="actor/loss"} 0.31
    a scrape ────────────> those, and gauges of this machine read at that moment: processor, memory, disk, GPUs

It listens on loopback. Elsewhere (`output.prometheus_host`) only with a bearer token, from the environment variable
RLHF_DIST_PROMETHEUS_TOKEN. Gauges read at a scrape are of the controller's machine; each rank's device, on whatever
node, is among the metrics (`gpu/POOL-RANK/...`, `cluster/pool_gauges.py`).
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import psutil

from rlhf_dist.gpu_gauges import readings_of
from rlhf_dist.typed import ConfigError

if TYPE_CHECKING:
    from prometheus_client import Metric

TOKEN = "RLHF_DIST_PROMETHEUS_TOKEN"
TIMES = "time_s/"
"""In front of a metric that is the seconds of a node."""
GPU_GAUGES = {
    "busy_percent": "share of the last moments in which a kernel ran",
    "power_watts": "of the device",
    "temperature_celsius": "of the device",
}


class PrometheusEndpoint:
    """A tracker that is asked instead of told; `url` is where."""

    def __init__(self, run: str, folder: Path, host: str, port: int) -> None:
        """port 0: a free one. Raises ConfigError for what cannot be listened to, or must not."""
        try:
            from prometheus_client import CollectorRegistry, make_wsgi_app
        except ImportError as error:
            raise ConfigError(
                "output.prometheus_port needs a package that is not installed; run "
                "pip install 'rlhf-dist[prometheus]', or set output.prometheus_port=null"
            ) from error
        token = os.environ.get(TOKEN, "")
        if not _is_loopback(host) and not token:
            raise ConfigError(
                f"output.prometheus_host={host} is not this machine alone; set {TOKEN} in the environment, which "
                "Prometheus then sends as a bearer token, or leave 127.0.0.1"
            )
        self._run, self._folder, self._devices = run, folder, _devices()
        self._last: dict[str, float] = {}
        self._step, self._at_s = -1, 0.0
        registry = CollectorRegistry()
        registry.register(self)
        app: Any = make_wsgi_app(registry)
        try:
            self._server = make_server(host, port, _guarded(app, token), _Server, _Quiet)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"output.prometheus_port={port} on {host} cannot be listened to ({error}); 0 takes a free one"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="prometheus", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker; returns at once."""
        self._last = {**self._last, **metrics}
        self._step, self._at_s = step, time.time()

    def __enter__(self) -> PrometheusEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self, wait_s: float | None = None) -> None:
        """Answer no more; calling it again does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(5.0)

    def collect(self) -> Iterator[Metric]:
        """What a scrape is told."""
        last = self._last
        if self._step >= 0:
            yield self._gauge("step", "steps done", [({}, self._step + 1)])
            yield self._gauge("last_step_timestamp_seconds", "when the last step ended", [({}, self._at_s)])
        values = [({"name": name}, value) for name, value in last.items() if not name.startswith(TIMES)]
        times = [({"node": name.removeprefix(TIMES)}, v) for name, v in last.items() if name.startswith(TIMES)]
        yield self._gauge("metric", "metrics of the last step that told them", values)
        yield self._gauge("node_seconds", "seconds of each node in the last step that it ran in", times)
        yield from self._of_machine()
        yield from self._of_devices()

    def _of_machine(self) -> Iterator[Metric]:
        memory, own = psutil.virtual_memory(), psutil.Process().memory_info()
        yield self._gauge("host_cpu_percent", "since the last scrape", [({}, psutil.cpu_percent(None))])
        yield self._gauge("host_load1", "processes that run or want to, mean of a minute", [({}, os.getloadavg()[0])])
        rows = [({"kind": "total"}, memory.total), ({"kind": "available"}, memory.available)]
        yield self._gauge("host_memory_bytes", "of this machine", rows)
        yield self._gauge("process_memory_bytes", "resident, of the controller", [({}, own.rss)])
        with suppress(OSError):
            free = shutil.disk_usage(self._folder).free
            yield self._gauge("disk_free_bytes", "where the run's folder is", [({}, free)])

    def _of_devices(self) -> Iterator[Metric]:
        if not self._devices:
            return
        each = [({"gpu": str(number)}, readings_of(device)) for number, device in enumerate(self._devices)]
        memory = [
            ({**gpu, "kind": kind}, of[f"memory_{kind}_bytes"])
            for gpu, of in each
            for kind in ("total", "used")
            if f"memory_{kind}_bytes" in of
        ]
        yield self._gauge("gpu_memory_bytes", "of the device", memory)
        for name, about in GPU_GAUGES.items():
            yield self._gauge(f"gpu_{name}", about, [(gpu, of[name]) for gpu, of in each if name in of])

    def _gauge(self, name: str, about: str, rows: Iterable[tuple[Mapping[str, str], float]]) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        listed = list(rows)
        labels = list(listed[0][0]) if listed else []
        family = GaugeMetricFamily(f"rlhf_dist_{name}", about, labels=["run", *labels])
        for of, value in listed:
            family.add_metric([self._run, *of.values()], float(value))
        return family


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    timeout = 10  # seconds that a connection may say nothing

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""


def _guarded(app: Callable[..., Any], token: str) -> Callable[..., Any]:
    """`app` for those who send the token; for all where there is none."""

    def asked(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        sent = str(environ.get("HTTP_AUTHORIZATION", ""))
        if token and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
            start("401 Unauthorized", [("Content-Type", "text/plain"), ("WWW-Authenticate", "Bearer")])
            return [b"a bearer token is needed\n"]
        if environ.get("PATH_INFO") not in ("/metrics", "/"):
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"metrics are at /metrics\n"]
        return app(environ, start)

    return asked


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _devices() -> list[Any]:
    """NVIDIA devices of this machine; none where there is no driver, or no package that talks to it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # ImportError, or NVMLError where there is no driver
        return []
