"""`output.prometheus_port`: what a real scrape is told, and who may ask."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from controller.record.metrics import MetricsWriter
from controller.record.prometheus import TOKEN, PrometheusEndpoint
from rlhf_dist.typed import ConfigError


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[PrometheusEndpoint]:
    made = PrometheusEndpoint("a-run", tmp_path, "127.0.0.1", 0)
    yield made
    made.close()


def scraped(url: str, token: str = "") -> dict[tuple[str, ...], float]:
    """(name, values of its labels but the run's) -> value, as Prometheus' own parser reads the answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [one for family in families for one in family.samples]
    assert {one.labels.pop("run") for one in samples} == {"a-run"}
    return {(one.name, *one.labels.values()): one.value for one in samples}


def test_a_scrape_is_told_the_last_of_every_metric_nodes_and_the_machine(
    endpoint: PrometheusEndpoint, tmp_path: Path
) -> None:
    assert ("rlhf_dist_step",) not in scraped(endpoint.url), "nothing has ended yet"
    with MetricsWriter(tmp_path, 0, None, print, endpoint) as writer:
        writer.write(0, {"actor/loss": 2.0, 'odd "name"\n': 1.0}, {"gae": 0.25})
        writer.write(1, {"actor/loss": 0.5, "critic/loss": float("nan")}, {})
        told = scraped(endpoint.url)
    assert told["rlhf_dist_step",] == 2
    assert told["rlhf_dist_metric", "actor/loss"] == 0.5
    assert told["rlhf_dist_metric", 'odd "name"\n'] == 1.0
    assert ("rlhf_dist_metric", "critic/loss") not in told, "what is no number has no gauge"
    assert told["rlhf_dist_node_seconds", "gae"] == 0.25
    assert 0 < told["rlhf_dist_host_memory_bytes", "available"]
    assert told["rlhf_dist_host_memory_bytes", "available"] < told["rlhf_dist_host_memory_bytes", "total"]
    assert told["rlhf_dist_process_memory_bytes",] > 1e6 and told["rlhf_dist_disk_free_bytes",] > 0
    with pytest.raises(urllib.error.URLError):
        scraped(endpoint.url)  # the run has ended


def test_nothing_listens_beyond_this_machine_without_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ConfigError, match=f"is not this machine alone; set {TOKEN}"):
        PrometheusEndpoint("a-run", tmp_path, "0.0.0.0", 0)
    monkeypatch.setenv(TOKEN, "s3cret")
    made = PrometheusEndpoint("a-run", tmp_path, "0.0.0.0", 0)
    try:
        for token in ("", "s3cret?"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                scraped(made.url, token)
        assert scraped(made.url, "s3cret")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scraped(made.url.replace("/metrics", "/etc/passwd"), "s3cret")
    finally:
        made.close()


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"prometheus_port={port} .* cannot be listened to"):
            PrometheusEndpoint("a-run", tmp_path, "127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot be listened to"):
        PrometheusEndpoint("a-run", tmp_path, "127.0.0.1", 70000)
