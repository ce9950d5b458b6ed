"""The broadcast benchmark at toy sizes: every promised key, true lags, bytes that are compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from share_core.errors import ConfigError, DigestError
from share_simulations.bench.broadcast import BroadcastOptions, published_moments, run_broadcast
from share_simulations.bench.broadcast_load import Payloads, Seen

SMALL = BroadcastOptions(
    subscribers=20, stalled=0.1, versions=4, every_s=0.2, streams_per_connection=5, organisations=3, write_timeout_s=2.0
)
KEYS = {
    "subscribers",
    "lag_p50_ms",
    "lag_p99_ms",
    "healthy_on_newest",
    "stalled_mib",
    "stalled_cut",
    "delta_bytes",
    "snapshot_bytes",
    "hub_sent_per_version",
}


def test_a_small_run_has_every_key_and_brings_everybody_to_the_newest(tmp_path: Path) -> None:
    notes: list[str] = []
    report = run_broadcast(replace(SMALL, directory=tmp_path), notes.append)
    assert report.keys() >= KEYS
    assert (report["subscribers"], report["stalled"]) == (20, 2)
    assert report["healthy_on_newest"] == 1.0
    assert report["lags_counted"] == 18 * 4
    assert report["lag_from"] == "log line of the hub"
    assert 0 < report["lag_p50_ms"] <= report["lag_p99_ms"] <= report["lag_from_receipt_p99_ms"]
    assert report["stalled_mib"] >= 0
    assert 90_000 < report["delta_bytes"] < 120_000 < report["snapshot_bytes"]
    assert 18 <= report["hub_sent_per_version"] <= 20
    assert list(tmp_path.iterdir()) == []
    assert notes
    json.dumps(report)


def test_stalled_readers_are_cut_and_counted(tmp_path: Path) -> None:
    report = run_broadcast(replace(SMALL, subscribers=6, stalled=0.5, versions=8, directory=tmp_path))
    assert report["stalled_cut"] == 3
    assert report["healthy_on_newest"] == 1.0


def test_moments_come_from_the_lines_of_merges_only() -> None:
    lines = [
        '{"time": "2026-01-01T00:00:01.250Z", "event": "merged", "version": 3}',
        '{"time": "2026-01-01T00:00:02.000Z", "event": "refused", "version": 4}',
        "Traceback: not JSON",
        '{"time": "2026-01-01T00:00:03.500Z", "event": "merged", "version": 5}',
    ]
    assert published_moments(lines) == {3: 1767225601.25, 5: 1767225603.5}


def test_other_bytes_for_one_reader_are_noticed() -> None:
    payloads, digest = Payloads(), hashlib.sha256(b"delta").hexdigest()
    payloads.check(1, b"delta", digest)
    payloads.check(1, b"delta", digest)
    with pytest.raises(DigestError, match="two readers"):
        payloads.check(1, b"delto", digest)
    with pytest.raises(DigestError, match="digest"):
        payloads.check(2, b"delto", digest)


def test_a_reader_that_skips_versions_holds_them_all_from_then_on() -> None:
    seen = Seen()
    seen.arrived(3, 4)
    seen.arrived(4, 7)
    assert {version: len(moments) for version, moments in seen.moments.items()} == {4: 1, 5: 1, 6: 1, 7: 1}
    assert seen.moments[5] == seen.moments[7]


@pytest.mark.parametrize(
    "options",
    [
        replace(SMALL, stalled=1.0),
        replace(SMALL, stalled=-0.1),
        replace(SMALL, streams_per_connection=101),
        replace(SMALL, versions=0),
        replace(SMALL, delta_kb=1.0),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_starts(options: BroadcastOptions, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run_broadcast(replace(options, directory=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_tree_of_relays_serves_the_same_and_the_hub_sends_once_per_relay(tmp_path: Path) -> None:
    options = replace(SMALL, subscribers=6, stalled=0.0, relays=1, relay_levels=2, processes=1, directory=tmp_path)
    report = run_broadcast(options)
    assert report["healthy_on_newest"] == 1.0
    assert report["lags_counted"] == 6 * 4
    assert report["hub_sent_per_version"] == 1.0
    assert report["relay_lag_p99_ms"] == report["lag_p99_ms"] > 0
    assert (report["stalled"], report["stalled_cut"], report["stalled_mib"]) == (0, 0, None)
    assert list(tmp_path.iterdir()) == []
