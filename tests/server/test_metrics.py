"""Metrics: what is counted, where it is served, and that it names nobody."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from share_core.errors import ConfigError, UnavailableError
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.cli import app
from share_server.config import config_to_toml, read_config
from share_server.hub.metrics import Levels, Metrics, count_connections, serve_metrics
from share_server.layout import Layout
from share_server.local import LocalHub, read_deltas, submit_header, submit_messages
from share_server.provision import free_ports

NEVER_COUNTS = """
import sys
from share_server.hub import __main__, metrics
metrics.Metrics.acknowledged = lambda self, seconds, size: None
sys.exit(__main__.main(sys.argv[1:]))
"""


def _scrape(port: int) -> dict[str, float]:
    """Return every sample by its name with labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return {
        sample.name + "".join(f"|{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _with_metrics(hub: LocalHub) -> int:
    (port,) = free_ports(1)
    hub.layout.config.write_text(config_to_toml(replace(hub.config, metrics_port=port)))
    return port


def _scrape_until(port: int, name: str, least: float) -> dict[str, float]:
    """Return the first scrape in which a sample is at least ``least``; counts may follow what they count."""
    while (found := _scrape(port))[name] < least:
        time.sleep(0.02)
    return found


def test_a_running_hub_counts_what_it_does(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    hub = new_hub()
    port = _with_metrics(hub)
    hub.start()
    start = _scrape(port)
    assert (start["fedshare_version"], start["fedshare_acks_total"], start["fedshare_storage_failed"]) == (0, 0, 0)
    payloads = [make_payload(number) for number in range(3)]
    with hub.hub(hub.enrol("canaryorg/canaryname")) as stub:
        for number, payload in enumerate(payloads):
            header = submit_header(toy_spec, f"canaryorg/task{number}", payload)
            stub.Submit(submit_messages(header, payload), timeout=30)
            with pytest.raises(grpc.RpcError):
                other = submit_header(toy_spec, "elsewhere/task", payload)
                stub.Submit(submit_messages(other, payload), timeout=30)
        newest = int(_scrape_until(port, "fedshare_merged_total", 3)["fedshare_version"])
        stream = stub.FollowVersions(hub_pb2.FollowVersionsRequest(space_id=toy_spec.space_id), timeout=60)
        sizes = 0
        for version, payload in read_deltas(stream):
            sizes += len(payload)
            if version == newest:
                break
        now = _scrape_until(port, "fedshare_bytes_down_total|delta", sizes)
        stream.cancel()
    assert now["fedshare_acks_total"] == now["fedshare_ack_seconds_count"] == 3
    assert now["fedshare_bytes_up_total"] == sum(map(len, payloads))
    assert now["fedshare_bytes_down_total|delta"] == sizes
    assert now["fedshare_refusals_total|AccessError"] == 3
    assert now["fedshare_merged_total"] == now["fedshare_merge_latency_seconds_count"] == 3
    assert now["fedshare_merge_seconds_count"] == newest
    assert (now["fedshare_subscribers"], now["fedshare_waiting_updates"]) == (1, 0)
    assert now["fedshare_open_calls"] >= 1
    assert now["fedshare_open_connections"] >= 1
    assert now["fedshare_disk_free_bytes"] > 2**20
    assert 300 * 86400 < now["fedshare_certificate_expiry_seconds"] < 366 * 86400
    assert now["process_resident_memory_bytes"] > 2**20
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    for private in ("canary", str(hub.layout.root), toy_spec.space_id):
        assert private not in text


def test_a_hub_that_does_not_count_is_noticed(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes], tmp_path: Path
) -> None:
    script = tmp_path / "never.py"
    script.write_text(NEVER_COUNTS)
    hub = new_hub(script=script)
    port = _with_metrics(hub)
    hub.start()
    payload = make_payload(1)
    with hub.hub(hub.enrol("acme/alice")) as stub:
        stub.Submit(submit_messages(submit_header(toy_spec, "acme/t", payload), payload), timeout=30)
    assert _scrape(port)["fedshare_acks_total"] == 0


def test_off_by_default_and_a_taken_port_is_one_sentence(new_hub: Callable[..., LocalHub]) -> None:
    hub = new_hub()
    assert read_config(hub.layout.config).metrics_port == 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        hub.layout.config.write_text(config_to_toml(replace(hub.config, metrics_port=port)))
        with pytest.raises(UnavailableError, match=f"cannot serve metrics on 127.0.0.1:{port}"):
            hub.start()


async def _none() -> Levels:
    return {"version": 7, "updates": {"merged": 3.0}}


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::"])
def test_only_loopback_is_served(host: str) -> None:
    async def run() -> None:
        async with serve_metrics(Metrics(), _none, 1, host):
            raise AssertionError("served")

    with pytest.raises(ConfigError, match="loopback only"):
        asyncio.run(run())


def test_a_busy_event_loop_still_shows_its_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The levels are asked for on the loop; a loop that does not answer must not take the counters with it."""
    monkeypatch.setattr("share_server.hub.metrics._SCRAPE_S", 0.2)

    async def run() -> tuple[dict[str, float], dict[str, float]]:
        (port,) = free_ports(1)
        metrics = Metrics()
        metrics.acknowledged(0.1, 5)
        metrics.merged(2, 0.5, [1.0, 2.0])
        metrics.sent("snapshot", 9)
        metrics.refused("OverloadError")
        hangs = asyncio.Event()

        async def levels() -> Levels:
            if hangs.is_set():
                await asyncio.sleep(60)
            return await _none()

        async with serve_metrics(metrics, levels, port):
            first = await asyncio.to_thread(_scrape, port)
            hangs.set()
            second = await asyncio.to_thread(_scrape, port)
        with pytest.raises(urllib.error.URLError):
            await asyncio.to_thread(_scrape, port)
        return first, second

    first, second = asyncio.run(run())
    assert (first["fedshare_version"], first["fedshare_updates|merged"]) == (7, 3)
    assert "fedshare_version" not in second
    for found in (first, second):
        assert found["fedshare_acks_total"] == 1
        assert found["fedshare_refusals_total|OverloadError"] == 1
        assert found["fedshare_bytes_down_total|snapshot"] == 9


def test_connections_are_counted_by_the_port_they_came_to() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert count_connections(port) == 0
        with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
            assert count_connections(port) == 2


def test_init_writes_the_port(tmp_path: Path) -> None:
    root = tmp_path / "server"
    answer = CliRunner().invoke(app, ["init", str(root), "--port", "0", "--metrics-port", "9107"])
    assert answer.exit_code == 0, answer.stderr
    assert read_config(Layout(root).config).metrics_port == 9107
    assert "http://127.0.0.1:9107/metrics" in answer.stdout
