"""How many durable updates a hub takes per second, against the least that a durable update costs on this machine.

A real hub (process, mutual TLS, SQLite, fsync) gets updates from many clients at once: first as many as it can work
for, then ten times as many. The limit is measured in the same run, before and after, with the hub stopped still
(SIGSTOP): durable files of the same size at the same concurrency, and the same bytes sent by the same load generator to
a bare gRPC server that only counts them. The slower of the two is the limit. In the end every receipt is looked up in
the journal.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_core.errors import ConfigError
from share_core.lifeline import children
from share_server.config import LimitConfig
from share_server.local import LocalHub
from share_simulations.bench.limits import durable_files_per_second
from share_simulations.bench.machine import describe, pick_device
from share_simulations.bench.payloads import upload_space
from share_simulations.bench.promises import Promises, check_promises, journal_and_newest
from share_simulations.bench.stats import RssSampler, cpu_seconds, percentile, slope_per_minute
from share_simulations.bench.worker import Worker, ask_all
from share_simulations.processes import installed

Progress = Callable[[str], None]

RANK = 32
"""Of every update at both sites."""
_TASKS_PER_ORGANISATION = 4
_FINISH_S = 30.0
"""Longest wait for calls in progress at the end of a phase."""
_RESTART_S = 900.0
"""Longest wait for a killed hub, which reads every payload again before it serves."""
_START_S = 2.0
"""From a command to the moment at which all load processes begin."""


@dataclass(frozen=True)
class HubOptions:
    """What to measure."""

    clients: int = 200
    """Connections, each with a certificate of its own, each with one update on its way at any time."""
    payload_mib: float = 1.0
    """Size of every update."""
    seconds: float = 60.0
    """Counted time of the main phase."""
    overload: int = 10
    """Times as many submitters in the overload phase; 0 leaves it out."""
    overload_seconds: float = 30.0
    """Counted time of the overload phase."""
    organisations: int = 10
    """The clients belong to so many."""
    processes: int = 2
    """Load processes."""
    limit_seconds: float = 10.0
    """Each measurement of a limit."""
    directory: Path | None = None
    """Where the hub's store lies; a temporary one otherwise."""
    peers: bool = False
    """Also measure Flower's own path and kill both servers."""
    peer_nodes: int = 2
    """Flower's SuperNodes."""


def run_hub(options: HubOptions, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Measure and return the report.

    Raises:
        ConfigError: the options do not fit each other or the disk.
    """
    _check(options)
    with scratch(options.directory, "bench-hub") as folder:
        size = int(options.payload_mib * 2**20)
        progress(f"hub in {folder}")
        limits = generous_limits(options.clients, options.overload, size)
        hub = LocalHub(folder / "server", upload_space(size, RANK), limits=limits)
        with Bench(options, hub, folder, progress) as bench:
            report = bench.run()
        if options.peers:
            from share_simulations.bench.flower_peer import compare_with_flower

            report |= compare_with_flower(folder, options.peer_nodes, bench.payload_bytes, progress)
            report["updates_ratio_to_flower"] = report["acks_per_s"] / report["flower_updates_per_s"]
        return report


def generous_limits(clients: int, overload: int, payload_bytes: int) -> LimitConfig:
    """Return limits under which all clients may send at once, and anything beyond is refused by the hub's own rules."""
    at_once = clients + max(2, clients // 10)
    return LimitConfig(
        concurrent_uploads=at_once,
        inflight_bytes=at_once * payload_bytes,
        concurrent_calls=max(LimitConfig().concurrent_calls, clients * max(2, overload) + 200),
        enrolments_per_minute=60_000,
    )


def require_at_least_one(options: object, *names: str) -> None:
    """Refuse options of a benchmark that count something of which there is none.

    Raises:
        ConfigError: one of ``names`` is below 1; names the option.
    """
    for name in names:
        if (value := getattr(options, name)) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least 1")


@contextmanager
def scratch(parent: Path | None, name: str) -> Iterator[Path]:
    """Make a directory for one run and remove it at the end, however that comes."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Bench:
    """One hub with its load processes; both end with the ``with`` block."""

    def __init__(self, options: HubOptions, hub: LocalHub, folder: Path, progress: Progress) -> None:
        self._options = options
        self._hub = hub
        self._folder = folder
        self._note = progress
        self._stack = ExitStack()
        self._receipts: list[tuple[str, str]] = []
        self.payload_bytes = 0

    def __enter__(self) -> Bench:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self._hub.running:
            os.kill(self._hub.pid, signal.SIGCONT)
            self._hub.kill()

    def run(self) -> dict[str, Any]:
        """Run all phases."""
        options = self._options
        limits = [self._limits("before")]
        self._note(f"{options.clients} clients for {options.seconds:g} s")
        ramp = min(10.0, max(1.0, options.seconds / 6))
        used, begun = self._cpu(), time.monotonic()
        with RssSampler(self._hub.pid) as rss:
            peak = self._phase(self._hub.config.local_hub_address, options.seconds, ramp, 1)
        elapsed = time.monotonic() - begun
        cores = [round((now - before) / elapsed, 2) for before, now in zip(used, self._cpu(), strict=True)]
        merged = self._merged()
        limits.append(self._limits("after"))
        report = _main_figures(options, peak, limits, self.payload_bytes)
        steady = rss.samples[len(rss.samples) // 3 :]  # the first third is warming up
        report |= {"rss_mib": round(rss.peak(), 1), "rss_slope_mib_per_min": round(slope_per_minute(steady), 2)}
        report |= {"merged": merged, "hub_cores": cores[0], "load_cores": round(sum(cores[1:]), 2)}
        if options.overload:
            report |= self._overload(report)
        if options.peers:
            report |= self._kill()
        report |= {"promises": self._promises().as_json(), "machine": describe(pick_device("cpu"))}
        return report

    def _start(self) -> None:
        options, hub = self._options, self._hub
        hub.start()
        self._note(f"enrolling {options.clients} clients")
        members = [_member(hub, number, options.organisations) for number in range(options.clients)]
        base = {"ca": str(hub.layout.ca_cert), "space": str(hub.layout.space), "rank": RANK}
        processes = min(options.processes, options.clients)
        self._workers = [
            self._stack.enter_context(
                Worker(
                    f"load{number}",
                    "share_simulations.bench.hub_load",
                    base | {"clients": members[number::processes], "seed": 1000 * number},
                    self._folder / "load",
                )
            )
            for number in range(processes)
        ]
        self.payload_bytes = max(worker.receive()["payload_bytes"] for worker in self._workers)

    def _phase(self, address: str, seconds: float, ramp: float, per_client: int, keep: bool = True) -> dict[str, Any]:
        ask_all(self._workers, {"connect": address})
        command = {
            "address": address,
            "begin": time.monotonic() + _START_S,
            "ramp": ramp,
            "seconds": seconds,
            "per_client": per_client,
            "keep": keep,
            "finish": _FINISH_S,
        }
        answers = ask_all(self._workers, command, seconds + ramp + _FINISH_S + 120.0)
        for answer in answers:
            self._receipts += [(update_id, sha256) for update_id, sha256 in answer["promised"]]
        return _joined(answers, seconds)

    def _limits(self, when: str) -> dict[str, float]:
        """Measure both limits while the hub stands still: its merging would slow them down, and flatter us."""
        options, hub = self._options, self._hub
        self._note(f"limits {when}: durable files, then a bare gRPC server")
        os.kill(hub.pid, signal.SIGSTOP)
        try:
            files = durable_files_per_second(self._folder, self.payload_bytes, options.clients, options.limit_seconds)
            job = {"key": hub.layout.key("server"), "certificate": hub.layout.certificate("server")}
            job |= {"ca": hub.layout.ca_cert}
            paths = {name: str(path) for name, path in job.items()}
            with Worker("bare", "share_simulations.bench.limits", paths, self._folder / "load") as bare:
                address = bare.receive()["address"]
                ramp = min(2.0, options.limit_seconds / 4)
                stream = self._phase(address, options.limit_seconds, ramp, 1, keep=False)
        finally:
            os.kill(hub.pid, signal.SIGCONT)
        self._note(f"  {files:.0f} durable files/s, {stream['acks'] / stream['seconds']:.0f} bare streams/s")
        return {"files": files, "stream": stream["acks"] / stream["seconds"]}

    def _overload(self, report: dict[str, Any]) -> dict[str, Any]:
        options = self._options
        submitters = options.clients * options.overload
        self._note(f"{submitters} submitters for {options.overload_seconds:g} s")
        ramp = min(5.0, options.overload_seconds / 4)
        with RssSampler(self._hub.pid) as rss:
            seen = self._phase(self._hub.config.local_hub_address, options.overload_seconds, ramp, options.overload)
        goodput = seen["acks"] / seen["seconds"]
        return {
            "overload_submitters": submitters,
            "overload_acks_per_s": round(goodput, 2),
            "overload_goodput_fraction": round(goodput / report["acks_per_s"], 4) if report["acks_per_s"] else None,
            "overload_ack_p99_ms": _ms(seen["latencies_ms"], 0.99),
            "overload_rss_mib": round(rss.peak(), 1),
            "overload_rss_slope_mib_per_min": round(slope_per_minute(rss.samples[len(rss.samples) // 3 :]), 2),
            "shed": seen["shed"],
            "shed_with_hint": seen["hints"],
            "shed_p50_ms": _ms(seen["shed_ms"], 0.5),
            "shed_p99_ms": _ms(seen["shed_ms"], 0.99),
            "overload_errors": seen["errors"],
        }

    def _kill(self) -> dict[str, Any]:
        """Kill the hub under load, start it again, and look every receipt up."""
        self._note("killing the hub under load")
        command = {
            "address": self._hub.config.local_hub_address,
            "begin": time.monotonic(),
            "ramp": 0.0,
            "seconds": 8.0,
            "per_client": 1,
            "keep": True,
            "finish": _FINISH_S,
        }
        for worker in self._workers:
            worker.send(command)
        time.sleep(4.0)
        self._hub.kill()
        began = time.monotonic()
        self._hub.start(_RESTART_S)
        recovered = time.monotonic() - began
        for worker in self._workers:
            self._receipts += [(a, b) for a, b in worker.receive(120.0)["promised"]]
        promises = self._promises()
        return {
            "hub_receipts_checked_after_kill": promises.receipts,
            "hub_lost_after_kill": promises.lost + promises.wrong_bytes,
            "hub_restart_s": round(recovered, 2),
        }

    def _promises(self) -> Promises:
        self._note(f"checking {len(self._receipts)} receipts")
        with self._hub.hub(self._hub.own("operator")) as stub:
            return check_promises(self._receipts, *journal_and_newest(stub))

    def _cpu(self) -> list[float]:
        """Return the processor time used by the hub with its parsers and by every load process."""
        hub = self._hub.pid
        tree = [hub, *(pid for nursery in children(hub) for pid in (nursery, *children(nursery)))]
        return [sum(map(cpu_seconds, tree)), *(cpu_seconds(worker.pid) for worker in self._workers)]

    def _merged(self) -> int:
        from share_proto.v1 import hub_pb2

        with self._hub.hub(self._hub.own("operator")) as stub:
            return int(stub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30.0).merged)


def _main_figures(
    options: HubOptions, peak: dict[str, Any], limits: list[dict[str, float]], size: int
) -> dict[str, Any]:
    files = sum(one["files"] for one in limits) / len(limits)
    stream = sum(one["stream"] for one in limits) / len(limits)
    rate, limit = peak["acks"] / peak["seconds"], min(files, stream)
    return {
        "clients": options.clients,
        "organisations": options.organisations,
        "payload_bytes": size,
        "seconds": options.seconds,
        "acks": peak["acks"],
        "acks_per_s": round(rate, 2),
        "ack_p50_ms": _ms(peak["latencies_ms"], 0.5),
        "ack_p99_ms": _ms(peak["latencies_ms"], 0.99),
        "fsync_limit_acks_per_s": round(limit, 2),
        "fraction_of_limit": round(rate / limit, 4),
        "durable_files_per_s": round(files, 2),
        "bare_streams_per_s": round(stream, 2),
        "limits_before_and_after": [{name: round(value, 2) for name, value in one.items()} for one in limits],
        "refusals": peak["shed"],
        "errors": peak["errors"],
    }


def _joined(answers: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the figures of all load processes as those of one."""
    errors: Counter[str] = Counter()
    for answer in answers:
        errors.update(answer["errors"])
    lists = {key: [x for answer in answers for x in answer[key]] for key in ("latencies_ms", "shed_ms")}
    sums = {key: sum(answer[key] for answer in answers) for key in ("acks", "shed", "hints")}
    return {**lists, **sums, "errors": dict(errors), "seconds": seconds}


def _member(hub: LocalHub, number: int, organisations: int) -> dict[str, Any]:
    organisation = f"org-{number % organisations:02d}"
    holder = hub.enrol(f"{organisation}/client-{number:04d}", "contributor")
    tasks = [f"{organisation}/task-{task}" for task in range(_TASKS_PER_ORGANISATION)]
    shift = number // organisations % len(tasks)
    return {
        "key": holder.key.decode("ascii"),
        "certificate": holder.certificate.decode("ascii"),
        "tasks": tasks[shift:] + tasks[:shift],
    }


def _ms(values: list[float], share: float) -> float | None:
    return round(percentile(values, share), 2) if values else None


def _check(options: HubOptions) -> None:
    require_at_least_one(options, "clients", "processes", "organisations")
    if not 2**-4 <= options.payload_mib <= 16:
        raise ConfigError(f"--payload-mib {options.payload_mib:g}: expected 0.0625 to 16")
    if options.overload > 100:
        raise ConfigError("--overload: at most 100, the streams of one connection")
    for command in ("flower-superlink", "flower-supernode", "flwr") if options.peers else ():
        installed(command)  # missing ones are said before the long work
    place = options.directory or Path(tempfile.gettempdir())
    existing = next(path for path in (place, *place.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    needed = int((options.seconds + options.overload_seconds) * options.payload_mib * 2**20 * 200) + 2**30
    if free < needed:
        raise ConfigError(
            f"{existing} has {free / 2**30:.1f} GiB free, this run may write {needed / 2**30:.1f} GiB: "
            "name another --directory, or ask for fewer --seconds"
        )
