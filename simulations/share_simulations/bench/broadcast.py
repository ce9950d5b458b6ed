"""How soon every subscriber has a new version, and what those cost the hub that stopped reading.

A real hub publishes versions whose deltas are about 100 KB; one writer submits an update every few seconds. Subscribers
follow over mutual TLS from load processes. Some of them take one message and never read again: their streams fill up
by gRPC's own flow control, and the hub has to live with that and cut them.

A lag runs from the hub's log line ``merged`` of a version (written in the same moment in which it is published; same
machine, same clock) until a subscriber holds that version whole. ``lag_from_receipt`` runs from the writer's receipt
and so contains the merge. A subscriber that was brought to a newer version by a snapshot counts for those it skipped.

With relays the subscribers, stalled ones included, are at the lowest level of a tree of ``share-server relay``
processes, and the memory is that of this level.

The memory of stalled readers is the hub's peak after they have stalled less its peak before, with every healthy reader
connected and versions flowing in both cases: an upper bound, for the space grows meanwhile.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from share_core.errors import ConfigError
from share_core.types import SpaceSpec, Update
from share_core.wire import encode_update
from share_proto.v1 import hub_pb2
from share_server.config import LimitConfig
from share_server.local import LocalHub, submit_header, submit_messages
from share_simulations.bench.hub import require_at_least_one, scratch
from share_simulations.bench.machine import describe, pick_device
from share_simulations.bench.payloads import delta_space, random_sites
from share_simulations.bench.relay_tree import RelayTree
from share_simulations.bench.stats import RssSampler, percentile
from share_simulations.bench.worker import Worker, ask_all
from share_simulations.processes import Processes

Progress = Callable[[str], None]

RANK = 4
"""Directions that every update adds at both sites."""
_OLDER = 10
"""Versions before the first subscriber comes."""
_WARM = 3
"""Versions with healthy readers only, before any reader stalls."""
_SETTLE_S = 60.0
"""Longest wait until all healthy readers hold the last version."""
_MERGE_S = 60.0


@dataclass(frozen=True)
class BroadcastOptions:
    """What to measure."""

    subscribers: int = 1000
    """FollowVersions streams in all."""
    stalled: float = 0.1
    """Share of them that never read after their first message."""
    versions: int = 10
    """Versions that are measured."""
    every_s: float = 3.0
    """Pause between two updates."""
    delta_kb: float = 100.0
    """Size of a delta in thousand bytes, about."""
    streams_per_connection: int = 10
    """Healthy subscribers that share a TLS connection; stalled ones have their own."""
    organisations: int = 20
    """The subscribers belong to so many."""
    processes: int = 2
    """Load processes of the healthy ones."""
    relays: int = 0
    """Relays on every level between the hub and the subscribers; 0: the hub serves them itself."""
    relay_levels: int = 2
    """Levels of relays, if there are any."""
    write_timeout_s: float = LimitConfig.write_timeout_s
    """After how long the hub cuts a reader that takes nothing."""
    directory: Path | None = None
    """Where the hub's store lies; a temporary one otherwise."""

    @property
    def stalled_count(self) -> int:
        """Subscribers that stall."""
        return round(self.subscribers * self.stalled)


@dataclass(frozen=True)
class Published:
    """One version as the writer saw it."""

    version: int
    """Its number."""
    receipt: float
    """When the receipt of its update came, seconds since 1970."""


def run_broadcast(options: BroadcastOptions, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Measure and return the report.

    Raises:
        ConfigError: the options do not fit each other.
    """
    _check(options)
    with scratch(options.directory, "bench-broadcast") as folder:
        versions = _OLDER + _WARM + options.versions
        spec = delta_space(int(options.delta_kb * 1000), RANK, k_max=RANK * (versions + 1))
        hub = LocalHub(folder / "server", spec, limits=_limits(options))
        progress(f"hub in {folder}")
        with Broadcast(options, hub, spec, folder, progress) as bench:
            return bench.run()


class Broadcast:
    """One hub with its readers; all end with the ``with`` block."""

    def __init__(
        self, options: BroadcastOptions, hub: LocalHub, spec: SpaceSpec, folder: Path, progress: Progress
    ) -> None:
        self._options = options
        self._hub = hub
        self._spec = spec
        self._folder = folder
        self._note = progress
        self._stack = ExitStack()
        self._published: list[Published] = []
        self._enrolled = 0
        self._tree: RelayTree | None = None

    def __enter__(self) -> Broadcast:
        try:
            self._hub.start()
            self._writer = self._hub.enrol("writer/trainer", "contributor")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self._hub.running:
            self._hub.kill()

    def run(self) -> dict[str, Any]:
        """Run all phases."""
        options = self._options
        self._note(f"{_OLDER} older versions")
        for _ in range(_OLDER):
            self._publish()
        self._start_relays()
        healthy = options.subscribers - options.stalled_count
        self._note(f"{healthy} subscribers, {options.streams_per_connection} per connection")
        readers = self._open(healthy, options.streams_per_connection, options.processes, read=True)
        serving = self._tree.leaf_pids if self._tree else [self._hub.pid]
        with RssSampler(*serving, every_s=0.25) as before:
            self._publish_many(_WARM)
        self._note(f"{options.stalled_count} subscribers that stop reading")
        if options.stalled_count:
            self._open(options.stalled_count, 1, 1, read=False)
        sent = self._sent()
        with RssSampler(*serving, every_s=0.25) as during:
            measured = self._publish_many(options.versions)
            self._note("waiting until all hold the newest version")
            answers = self._wait(readers, measured[-1].version)
        sent = self._sent() - sent
        cut = self._cut(healthy)  # before this process follows by itself
        delta_bytes = self._delta_sizes(measured)
        report: dict[str, Any] = {
            "subscribers": options.subscribers,
            "stalled": options.stalled_count,
            "versions": options.versions,
            "organisations": options.organisations,
            "healthy_on_newest": sum(a["on_newest"] for a in answers) / sum(a["readers"] for a in answers),
        }
        report |= self._lags(answers, measured)
        if self._tree:
            report |= {"relays": options.relays, "relay_levels": options.relay_levels}
            report |= {"relay_lag_p50_ms": report["lag_p50_ms"], "relay_lag_p99_ms": report["lag_p99_ms"]}
        report |= {
            "stalled_mib": self._per_stalled(before, during),
            "rss_before_mib": round(before.peak(), 1),
            "rss_mib": round(during.peak(), 1),
            "stalled_cut": cut,
            "delta_bytes": round(sum(delta_bytes) / len(delta_bytes)),
            "snapshot_bytes": self._snapshot_size(),
            "hub_sent_per_version": round(sent / sum(delta_bytes), 2),
            "interrupted": sum(answer["interrupted"] for answer in answers),
            "snapshots_fetched": sum(answer["snapshots"] for answer in answers),
            "machine": describe(pick_device("cpu")),
        }
        return report | {"delta_to_snapshot": round(report["delta_bytes"] / report["snapshot_bytes"], 4)}

    def _start_relays(self) -> None:
        options = self._options
        if not options.relays:
            return
        self._note(f"{options.relay_levels} levels of {options.relays} relays")
        # First on the stack: when it ends it kills what is left of this process's children.
        processes = self._stack.enter_context(Processes(self._folder / "logs", {"OMP_NUM_THREADS": "1"}))
        self._tree = RelayTree(self._hub, self._folder, options.relays, options.relay_levels, processes)
        self._tree.start(self._writer, self._published[-1].version)

    def _open(self, count: int, streams: int, processes: int, read: bool) -> list[Worker]:
        """Start readers one version behind, so that each gets a first message at once."""
        sizes = [min(streams, count - start) for start in range(0, count, streams)]
        connections = [self._connection(size) for size in sizes]
        if self._tree:
            self._tree.wait_for_roster()
        job = {
            "ca": str(self._hub.layout.ca_cert),
            "space_id": self._spec.space_id,
            "since": self._published[-1].version - 1,
            "read": read,
        }
        workers = [
            self._stack.enter_context(
                Worker(
                    f"{'readers' if read else 'stalled'}{number}",
                    "share_simulations.bench.broadcast_load",
                    job | {"connections": connections[number::processes]},
                    self._folder / "load",
                )
            )
            for number in range(min(processes, len(connections)))
        ]
        for worker in workers:
            worker.receive()
        ask_all(workers, {"open": True})
        return workers

    def _connection(self, streams: int) -> dict[str, Any]:
        number, self._enrolled = self._enrolled, self._enrolled + 1
        member = f"org-{number % self._options.organisations:03d}/reader-{number:05d}"
        holder = self._hub.enrol(member, "reader")
        addresses = self._tree.addresses if self._tree else [self._hub.config.local_hub_address]
        return {
            "address": addresses[number % len(addresses)],
            "key": holder.key.decode("ascii"),
            "certificate": holder.certificate.decode("ascii"),
            "streams": streams,
        }

    def _publish_many(self, count: int) -> list[Published]:
        made = []
        for number in range(count):
            begun = time.monotonic()
            made.append(self._publish())
            self._note(f"  version {made[-1].version}, {number + 1} of {count}")
            time.sleep(max(0.0, self._options.every_s - (time.monotonic() - begun)))
        return made

    def _publish(self) -> Published:
        """Submit one update of a new task and wait until it is merged."""
        number = len(self._published) + 1
        newest = self._published[-1].version if self._published else 0
        update = Update(base_version=newest, sites=random_sites(self._spec, RANK, seed=number))
        payload = encode_update(update, torch.float32)
        header = submit_header(self._spec, f"writer/task-{number:04d}", payload)
        with self._hub.hub(self._writer) as stub:
            stub.Submit(submit_messages(header, payload), timeout=60.0)
            receipt = time.time()
            version = self._merged_version(stub, header.update_id)
        self._published.append(Published(version, receipt))
        return self._published[-1]

    def _merged_version(self, stub: Any, update_id: str) -> int:
        end = time.monotonic() + _MERGE_S
        while time.monotonic() < end:
            record = stub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=update_id), timeout=10.0).update
            if record.version:
                return int(record.version)
            if record.reason:
                raise ConfigError(f"the hub set the benchmark's own update aside: {record.reason}")
            time.sleep(0.02)
        raise ConfigError(f"an update was not merged within {_MERGE_S:g} s: is the machine overloaded?")

    def _wait(self, readers: list[Worker], version: int) -> list[dict[str, Any]]:
        return ask_all(readers, {"wait_for": version, "timeout_s": _SETTLE_S}, _SETTLE_S + 60.0)

    def _lags(self, answers: list[dict[str, Any]], measured: list[Published]) -> dict[str, Any]:
        logged = published_moments(self._hub.log_file.read_text(errors="replace").splitlines())
        from_log = all(one.version in logged for one in measured)
        lags, from_receipt = [], []
        for one in measured:
            moments = [moment for answer in answers for moment in answer["moments"].get(str(one.version), [])]
            start = logged[one.version] if from_log else one.receipt
            lags += [1000 * max(0.0, moment - start) for moment in moments]
            from_receipt += [1000 * max(0.0, moment - one.receipt) for moment in moments]
        return {
            "lag_p50_ms": round(percentile(lags, 0.5), 1),
            "lag_p99_ms": round(percentile(lags, 0.99), 1),
            "lag_max_ms": round(max(lags, default=float("nan")), 1),
            "lag_from": "log line of the hub" if from_log else "receipt",
            "lag_from_receipt_p99_ms": round(percentile(from_receipt, 0.99), 1),
            "lags_counted": len(lags),
        }

    def _per_stalled(self, before: RssSampler, during: RssSampler) -> float | None:
        if not self._options.stalled_count:
            return None
        return round(max(0.0, during.peak() - before.peak()) / self._options.stalled_count, 3)

    def _cut(self, healthy: int) -> int:
        """Return how many stalled readers the hub has cut, giving it the time that its configuration names."""
        if not self._options.stalled_count:
            return 0
        self._note("waiting until the hub has cut those that do not read")
        end = time.monotonic() + self._hub.config.limits.write_timeout_s + 20.0
        if self._tree:  # a relay gives no count of its streams, but writes down whom it cuts
            while self._tree.cut() < self._options.stalled_count and time.monotonic() < end:
                time.sleep(0.5)
            return self._tree.cut()
        while (open_streams := self._status().subscribers) > healthy and time.monotonic() < end:
            time.sleep(0.5)
        return self._options.subscribers - max(healthy, open_streams)

    def _status(self) -> hub_pb2.GetStatusResponse:
        with self._hub.hub(self._hub.own("operator")) as stub:
            answer: hub_pb2.GetStatusResponse = stub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30.0)
        return answer

    def _sent(self) -> int:
        """Return the delta bytes that the hub has sent so far."""
        return sum(member.down_deltas for member in self._status().traffic)

    def _delta_sizes(self, measured: list[Published]) -> list[int]:
        """Return the payload size of every measured delta, from the stream itself."""
        request = hub_pb2.FollowVersionsRequest(space_id=self._spec.space_id, since_version=measured[0].version - 1)
        sizes: list[int] = []
        with self._hub.hub(self._writer) as stub:
            stream = stub.FollowVersions(request, timeout=60.0)
            for message in stream:
                if message.WhichOneof("part") == "delta":
                    sizes.append(message.delta.payload_size)
                if len(sizes) == len(measured):
                    break
            stream.cancel()
        return sizes

    def _snapshot_size(self) -> int:
        request = hub_pb2.FetchSnapshotRequest(space_id=self._spec.space_id)
        with self._hub.hub(self._writer) as stub:
            stream = stub.FetchSnapshot(request, timeout=60.0)
            size = int(next(iter(stream)).header.payload_size)
            stream.cancel()
        return size


def published_moments(lines: Iterable[str]) -> dict[int, float]:
    """Return when each version was published, in seconds since 1970, from the lines of a hub's log."""
    moments: dict[int, float] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("event") == "merged" and isinstance(entry.get("version"), int):
            moments[entry["version"]] = datetime.fromisoformat(entry["time"]).timestamp()
    return moments


def _limits(options: BroadcastOptions) -> LimitConfig:
    per_organisation = -(-options.subscribers // options.organisations) + options.streams_per_connection + 4
    calls = max(options.subscribers + 200, 8 * per_organisation)  # one organisation may hold an eighth of the calls
    return LimitConfig(
        concurrent_calls=max(LimitConfig().concurrent_calls, calls),
        enrolments_per_minute=60_000,
        write_timeout_s=options.write_timeout_s,
    )


def _check(options: BroadcastOptions) -> None:
    require_at_least_one(options, "subscribers", "versions", "organisations", "processes", "relay_levels")
    if not 0 <= options.stalled < 1 or options.stalled_count >= options.subscribers:
        raise ConfigError(f"--stalled {options.stalled:g}: expected a share from 0 to below 1")
    if not 1 <= options.streams_per_connection <= 100:
        raise ConfigError("--streams-per-connection: expected 1 to 100, which is what the hub allows")
    if not 10 <= options.delta_kb <= 4000:
        raise ConfigError(f"--delta-kb {options.delta_kb:g}: expected 10 to 4000")
