"""The hub benchmark at toy sizes: every promised key, promises that are really checked, payloads that are honest."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from share_core.errors import ConfigError
from share_core.lifeline import children
from share_core.wire import decode_update
from share_proto.v1 import hub_pb2
from share_server.local import member_of_no_hub
from share_simulations.bench.hub import HubOptions, run_hub
from share_simulations.bench.limits import durable_files_per_second
from share_simulations.bench.payloads import Prepared, Source, upload_space
from share_simulations.bench.promises import check_promises
from share_simulations.bench.stats import percentile, slope_per_minute
from share_simulations.bench.worker import Worker
from share_simulations.processes import ProcessFailedError

SENDER = member_of_no_hub("org/one")
KEYS = {
    "acks_per_s",
    "ack_p50_ms",
    "ack_p99_ms",
    "fsync_limit_acks_per_s",
    "durable_files_per_s",
    "bare_streams_per_s",
    "fraction_of_limit",
    "rss_mib",
    "rss_slope_mib_per_min",
    "merged",
    "hub_cores",
    "load_cores",
    "overload_goodput_fraction",
    "overload_rss_mib",
    "shed",
    "shed_p50_ms",
}


def test_a_small_run_has_every_key_and_keeps_every_promise(tmp_path: Path) -> None:
    options = HubOptions(
        clients=4, payload_mib=0.0625, seconds=2, overload=10, overload_seconds=2, organisations=4, limit_seconds=0.5
    )
    notes: list[str] = []
    report = run_hub(replace(options, directory=tmp_path), notes.append)
    assert report.keys() >= KEYS
    for key in KEYS - {"rss_slope_mib_per_min"}:
        assert report[key] > 0, key
    assert report["fraction_of_limit"] == pytest.approx(
        report["acks_per_s"] / report["fsync_limit_acks_per_s"], rel=0.01
    )
    assert report["fsync_limit_acks_per_s"] == min(report["durable_files_per_s"], report["bare_streams_per_s"])
    assert report["overload_submitters"] == 40
    promises = report["promises"]
    assert promises["kept"], promises
    assert promises["receipts"] >= report["acks"] > 0
    assert promises["merged"] + promises["waiting"] + promises["refused"] >= promises["receipts"]
    assert notes
    assert list(tmp_path.iterdir()) == []
    json.dumps(report)


def test_updates_are_honest_all_different_and_just_below_the_size() -> None:
    spec = upload_space(2**20)
    source = Source(spec, rank=32, seed=1)
    one, other = source.prepare("org/a", SENDER), source.prepare("org/a", SENDER)
    assert _payload(one) != _payload(other)
    source.rebase(7)
    later = source.prepare("org/a", SENDER)
    for prepared, version in ((one, 0), (other, 0), (later, 7)):
        payload = _payload(prepared)
        header = hub_pb2.SubmitRequest.FromString(prepared.header).header
        assert 2**20 - 2048 < len(payload) == header.payload_size <= 2**20
        assert hashlib.sha256(payload).hexdigest() == header.payload_sha256 == prepared.sha256
        update = decode_update(payload, spec)
        assert update.base_version == version
        assert all(part.residual is not None and part.residual.out.std() > 0.5 for part in update.sites.values())


def test_a_payload_of_several_chunks_is_whole_too() -> None:
    source = Source(upload_space(5 * 2**19), rank=32, seed=1)
    prepared = source.prepare("org/a", SENDER)
    assert len(prepared.chunks()) == 3
    assert hashlib.sha256(_payload(prepared)).hexdigest() == prepared.sha256


def _payload(prepared: Prepared) -> bytes:
    parts = [hub_pb2.SubmitRequest.FromString(message).chunk for message in prepared.chunks()]
    assert all(0 < len(part) <= 2**20 for part in parts)
    return b"".join(parts)


def _journal() -> list[hub_pb2.UpdateRecord]:
    merged, waiting = hub_pb2.UPDATE_STATE_MERGED, hub_pb2.UPDATE_STATE_ACCEPTED
    return [
        hub_pb2.UpdateRecord(update_id="a", ingest_seq=1, payload_sha256="aa", state=merged, version=1),
        hub_pb2.UpdateRecord(update_id="b", ingest_seq=2, payload_sha256="bb", state=merged, version=2),
        hub_pb2.UpdateRecord(update_id="c", ingest_seq=3, payload_sha256="cc", state=waiting),
    ]


RECEIPTS = [("a", "aa"), ("b", "bb"), ("c", "cc")]


def test_a_true_journal_keeps_its_promises() -> None:
    found = check_promises(RECEIPTS, _journal(), newest=2)
    assert found.kept
    assert (found.receipts, found.merged, found.waiting, found.refused) == (3, 2, 1, 0)


def _lose_the_last(journal: list[hub_pb2.UpdateRecord]) -> None:
    journal.pop()


def _other_bytes(journal: list[hub_pb2.UpdateRecord]) -> None:
    journal[1].payload_sha256 = "cc"


def _twice(journal: list[hub_pb2.UpdateRecord]) -> None:
    again = hub_pb2.UpdateRecord()
    again.CopyFrom(journal[0])
    again.ingest_seq = 4
    journal.append(again)


def _gap(journal: list[hub_pb2.UpdateRecord]) -> None:
    journal[2].ingest_seq = 5


def _merged_nowhere(journal: list[hub_pb2.UpdateRecord]) -> None:
    journal[1].version = 0


def _refused_silently(journal: list[hub_pb2.UpdateRecord]) -> None:
    journal[2].state = hub_pb2.UPDATE_STATE_REFUSED


def _empty_version(journal: list[hub_pb2.UpdateRecord]) -> None:
    journal[1].version = 1


@pytest.mark.parametrize(
    ("plant", "count"),
    [
        (_lose_the_last, "lost"),
        (_other_bytes, "wrong_bytes"),
        (_twice, "doubled"),
        (_gap, "gaps"),
        (_merged_nowhere, "unexplained"),
        (_refused_silently, "unexplained"),
        (_empty_version, "empty_versions"),
    ],
)
def test_every_broken_promise_is_found(plant: Callable[[list[hub_pb2.UpdateRecord]], None], count: str) -> None:
    journal = _journal()
    plant(journal)
    found = check_promises(RECEIPTS, journal, newest=2)
    assert not found.kept
    assert getattr(found, count) > 0


def test_percentiles_and_slopes() -> None:
    values = [float(v) for v in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([3.0], 0.01) == 3.0
    assert slope_per_minute([(0.0, 10.0), (1.0, 11.0), (2.0, 12.0)]) == pytest.approx(60.0)
    assert slope_per_minute([(0.0, 10.0)]) == 0.0


def test_the_limit_of_files_leaves_nothing_behind(tmp_path: Path) -> None:
    assert durable_files_per_second(tmp_path, 4096, threads=3, seconds=0.5) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("started", [0, 2])
def test_an_interrupt_between_the_threads_of_the_limit_is_still_an_interrupt(
    started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, count = threading.Thread.start, iter(range(3))

    def interrupted(thread: threading.Thread) -> None:
        if next(count) == started:
            raise KeyboardInterrupt
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        durable_files_per_second(tmp_path, 4096, threads=3, seconds=60)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_load_process_is_an_error_with_its_log(tmp_path: Path) -> None:
    worker = Worker("broken", "share_simulations.bench.hub_load", {"space": "nowhere"}, tmp_path)
    try:
        with pytest.raises(ProcessFailedError, match="nowhere"):
            worker.receive()
    finally:
        worker.kill()


@pytest.mark.parametrize(
    "options",
    [HubOptions(clients=0), HubOptions(payload_mib=100.0), HubOptions(overload=1000), HubOptions(seconds=1e9)],
)
def test_options_that_cannot_work_are_refused_before_anything_starts(options: HubOptions, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run_hub(replace(options, directory=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    program = str(Path(sys.executable).parent / "share-sim")
    options = ["--clients", "4", "--payload-mib", "0.0625", "--directory", str(tmp_path)]
    with subprocess.Popen(
        [program, "bench", "hub", *options], stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stderr is not None
        while "limits before" not in (line := process.stderr.readline()):
            assert line, "the benchmark ended by itself"
        started = children(process.pid)
        assert started
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(60) == 130, said
    assert "interrupted" in said
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in started if _runs(pid)]


def _runs(pid: int) -> bool:
    """Whether a process lives; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
