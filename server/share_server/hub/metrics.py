"""What the hub counts, for Prometheus: on loopback, without TLS, off unless the operator gives a port.

The parts of the hub call the few methods of :class:`Metrics`; those only add numbers and never wait. What is a level
and not a count (versions, free disk, open calls) is asked for at the moment of a scrape, on the hub's own event loop.
No name of a member, task or file appears anywhere, so that a scrape tells nothing about who trains what.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from share_core.errors import ConfigError, UnavailableError

Levels = Mapping[str, float | Mapping[str, float]]
"""Levels by name; a mapping holds one value per label, whose name is in ``_LEVELS``."""

_LEVELS: Mapping[str, tuple[str, str]] = {
    "updates": ("Updates in the journal by state.", "state"),
    "waiting_updates": ("Durable updates that wait for their merge.", ""),
    "version": ("Newest published version.", ""),
    "subscribers": ("Open FollowVersions streams.", ""),
    "storage_failed": ("1 after the first storage error.", ""),
    "disk_free_bytes": ("Free bytes on the disk of the store.", ""),
    "open_calls": ("Calls in progress, streams included.", ""),
    "open_connections": ("Connections to the hub's port.", ""),
    "roster_age_seconds": ("On a relay: age of what it knows of whom it may serve.", ""),
    "bytes_in_flight": ("Payload bytes that are being received.", ""),
    "certificate_expiry_seconds": ("Seconds until the listeners' certificate expires.", ""),
}

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)

_SCRAPE_S = 5.0
"""Longest wait for the levels; a hub that is busier than that still shows its counts."""


class Metrics:
    """The counters of one hub process. Safe to call from every thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        on = self.registry
        self._acks = Counter("fedshare_acks", "Updates acknowledged as durable.", registry=on)
        self._refusals = Counter(
            "fedshare_refusals", "Calls that ended in an error, by its class.", ["error"], registry=on
        )
        self._up = Counter("fedshare_bytes_up", "Payload bytes of acknowledged updates.", registry=on)
        self._down = Counter("fedshare_bytes_down", "Payload bytes sent, by kind.", ["kind"], registry=on)
        self._ack_s = Histogram("fedshare_ack_seconds", "From the header to the receipt.", buckets=_FAST, registry=on)
        self._merge_s = Histogram(
            "fedshare_merge_seconds", "One merge, of one or several updates.", buckets=_FAST, registry=on
        )
        self._latency = Histogram(
            "fedshare_merge_latency_seconds", "From durable to published.", buckets=_SLOW, registry=on
        )
        self._merged = Counter("fedshare_merged", "Updates merged since this process started.", registry=on)
        self._parsers = Counter(
            "fedshare_parsers_lost", "Processes that ended over a payload and were replaced.", registry=on
        )
        self._alarm = Gauge(
            "fedshare_certificate_reload_failed",
            "1 while a new certificate file cannot be used and the old one serves.",
            registry=on,
        )
        for kind in ("delta", "snapshot", "head"):
            self._down.labels(kind)
        ProcessCollector(registry=self.registry)

    def acknowledged(self, seconds: float, size: int) -> None:
        """Count one receipt: seconds since its header came, payload bytes."""
        self._acks.inc()
        self._up.inc(size)
        self._ack_s.observe(seconds)

    def refused(self, name: str) -> None:
        """Count one call that ended in the error class ``name``."""
        self._refusals.labels(name).inc()

    def parser_lost(self) -> None:
        """Count one process that ended over a payload."""
        self._parsers.inc()

    def merged(self, count: int, seconds: float, waited_s: Iterable[float] = ()) -> None:
        """Count one new version: updates it took, seconds of its merge, seconds each update waited since its ACK."""
        self._merged.inc(count)
        self._merge_s.observe(seconds)
        for one in waited_s:
            self._latency.observe(max(0.0, one))

    def sent(self, kind: str, size: int) -> None:
        """Count payload bytes that were sent; ``kind`` is ``delta`` or ``snapshot``."""
        self._down.labels(kind).inc(size)

    def certificate_alarm(self, on: bool) -> None:
        """Say whether a certificate file on disk cannot be used."""
        self._alarm.set(on)


class _LevelCollector(Collector):
    """Asks the hub's event loop for its levels when a scrape comes in on another thread."""

    def __init__(self, levels: Callable[[], Awaitable[Levels]], loop: asyncio.AbstractEventLoop) -> None:
        self._levels = levels
        self._loop = loop

    def describe(self) -> Iterable[Metric]:
        """Name nothing: registering must not ask the event loop that registers."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return one family per level; none if the hub stops or does not answer in time."""
        for name, value in self._ask().items():
            text, label = _LEVELS[name]
            family = GaugeMetricFamily(f"fedshare_{name}", text, labels=[label] if label else [])
            values = value if isinstance(value, Mapping) else {"": value}
            for key, number in values.items():
                family.add_metric([key] if label else [], float(number))
            yield family

    def _ask(self) -> Levels:
        async def ask() -> Levels:
            return await self._levels()

        asking = ask()
        try:
            waiting = asyncio.run_coroutine_threadsafe(asking, self._loop)
        except RuntimeError:  # the loop is closed
            asking.close()
            return {}
        try:
            return waiting.result(_SCRAPE_S)
        except (FutureTimeout, CancelledError):
            waiting.cancel()
            return {}


@contextlib.asynccontextmanager
async def serve_metrics(
    metrics: Metrics, levels: Callable[[], Awaitable[Levels]], port: int, host: str = "127.0.0.1"
) -> AsyncIterator[None]:
    """Serve ``metrics`` over HTTP while the block runs; with port 0 do nothing.

    ``levels`` gives what is asked for at each scrape; it runs on the event loop of this call.

    Raises:
        ConfigError: ``host`` is not a loopback address: there is no access control.
        UnavailableError: the port is taken.
    """
    if not ipaddress.ip_address(host).is_loopback:
        raise ConfigError(f"metrics are served on loopback only, not on {host}: they have no access control")
    if not port:
        yield
        return
    collector = _LevelCollector(levels, asyncio.get_running_loop())
    metrics.registry.register(collector)
    server = _listen(metrics.registry, host, port)
    try:
        yield
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        metrics.registry.unregister(collector)


def _listen(registry: CollectorRegistry, host: str, port: int) -> WSGIServer:
    try:
        return start_http_server(port, host, registry)[0]
    except OSError as error:
        raise UnavailableError(
            f"cannot serve metrics on {host}:{port}: is another program using the port? ({error.strerror})"
        ) from error


def count_connections(port: int) -> int:
    """Return how many established TCP connections this machine has on its local ``port``; 0 where /proc is not."""
    wanted = f"{port:04X}"
    count = 0
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), Path(f"/proc/self/net/{name}").open("r", encoding="ascii") as table:
            for line in table:
                fields = line.split(None, 4)
                count += len(fields) > 4 and fields[3] == "01" and fields[1].rpartition(":")[2] == wanted
    return count
