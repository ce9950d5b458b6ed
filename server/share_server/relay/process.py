"""The relay process: follow upstream, serve what came, until told to stop."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from share_proto.v1 import hub_pb2_grpc
from share_server.config import LimitConfig
from share_server.hub import log
from share_server.hub.access import CALLER, Roster
from share_server.hub.interceptor import Door, Recheck, backstop, stop_in_order
from share_server.hub.metrics import Levels, Metrics, count_connections, serve_metrics
from share_server.hub.options import HUB_OPTIONS
from share_server.hub.serving import EXIT_FAILED, EXIT_STOPPED, LAST_GRACE_S, bind, log_failures
from share_server.hub.streams import Streams
from share_server.hub.tls import PairFile, keep_renewed, server_credentials
from share_server.relay.home import RelayHome, RelayState, split_address
from share_server.relay.renewal import renew_relay
from share_server.relay.replica import Replica
from share_server.relay.service import RelayGate, RelayService, RelaySource
from share_server.relay.upstream import Pace, Upstream

RECHECK_S = 5.0
"""Seconds between two looks at the callers of open calls."""

RENEWAL_LOOK_S = 60.0
"""Seconds between two looks at whether the certificates are due."""

_HEALTH_S = 0.2
"""Seconds between two looks at whether callers would be served."""

Context = aio.ServicerContext[Any, Any]


@dataclass
class _Relay:
    """The running parts."""

    upstream: Upstream
    replica: Replica
    source: RelaySource
    health: HealthServicer
    server: aio.Server
    door: Door
    pair: PairFile
    metrics: Metrics
    port: int


async def serve_relay(
    home: RelayHome,
    state: RelayState,
    ready: Callable[[int], None],
    limits: LimitConfig | None = None,
    pace: Pace | None = None,
    metrics_port: int = 0,
) -> int:
    """Run one relay; return the exit code. ``ready`` is told the version held when the relay first serves.

    Raises:
        UnavailableError: the port is taken. ConfigError, CertificateError: the directory cannot be used.
    """
    limits = dataclasses.replace(limits or LimitConfig(), recheck_s=RECHECK_S)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    relay = await _build(home, state, limits, pace or Pace())
    async with serve_metrics(relay.metrics, lambda: _levels(relay), metrics_port):
        await relay.server.start()
        log.info("listening", listen=state.listen, upstream=state.upstream)
        working = [
            asyncio.create_task(relay.upstream.run(), name="upstream"),
            asyncio.create_task(_keep_health(relay, ready), name="health"),
            asyncio.create_task(relay.door.keep_looking(RECHECK_S), name="callers"),
            asyncio.create_task(_keep_renewed(relay, home, state), name="certificates"),
        ]
        asked = asyncio.create_task(stop.wait())
        await asyncio.wait({asked, *working}, return_when=asyncio.FIRST_COMPLETED)
        broken = any(task.done() for task in working)
        log_failures(working)
        await relay.health.enter_graceful_shutdown()
        relay.replica.close()
        for task in (asked, *working):
            task.cancel()
        await stop_in_order(relay.server, relay.door, LAST_GRACE_S if broken else limits.drain_s)
        await asyncio.gather(asked, *working, return_exceptions=True)
    log.info("stopped", broken=broken)
    return EXIT_FAILED if broken else EXIT_STOPPED


async def _keep_renewed(relay: _Relay, home: RelayHome, state: RelayState) -> None:
    await keep_renewed(lambda: renew_relay(home, state, datetime.now(UTC)), relay.pair, RENEWAL_LOOK_S)


async def _build(home: RelayHome, state: RelayState, limits: LimitConfig, pace: Pace) -> _Relay:
    metrics, roster, replica = Metrics(), Roster([]), Replica(home.cache)
    upstream = Upstream(home, state, replica, roster, pace)
    gate = RelayGate(roster, upstream)
    health = HealthServicer()
    await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)

    def admit(method: str, context: Context) -> Recheck:
        caller = gate.admit(method, context.auth_context())
        CALLER.set(caller)
        return partial(gate.recheck, caller)

    door = Door(admit, limits.write_timeout_s, limits.concurrent_calls, metrics)
    server = aio.server(
        interceptors=[door], options=HUB_OPTIONS, maximum_concurrent_rpcs=backstop(limits.concurrent_calls)
    )
    source = RelaySource(state, replica, upstream)
    streams = Streams(source, limits, gate.recheck, lambda member, kind, size: metrics.sent(kind, size))
    service = RelayService(state, replica, upstream, streams)  # type: ignore[abstract]  # the rest is set by name
    hub_pb2_grpc.add_HubServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    authority = home.authority.read_bytes()
    pair = PairFile(home.key, home.serving, authority, metrics.certificate_alarm)
    host, port = split_address(state.listen)
    bind(server, host, port, server_credentials(pair, authority))
    return _Relay(upstream, replica, source, health, server, door, pair, metrics, port)


async def _levels(relay: _Relay) -> Levels:
    """Return what a scrape asks for."""
    return {
        "version": relay.replica.head,
        "subscribers": relay.source.subscribers,
        "open_calls": relay.door.open_calls,
        "open_connections": await asyncio.to_thread(count_connections, relay.port),
        "certificate_expiry_seconds": (relay.pair.expires - datetime.now(UTC)).total_seconds(),
        "roster_age_seconds": relay.upstream.roster_age_s,
    }


async def _keep_health(relay: _Relay, ready: Callable[[int], None]) -> None:
    """Report SERVING exactly while callers would be served."""
    serving = told = False
    while True:
        if relay.upstream.fresh != serving:
            serving = not serving
            status = health_pb2.HealthCheckResponse
            await relay.health.set("", status.SERVING if serving else status.NOT_SERVING)
            log.info("serving" if serving else "not serving", version=relay.replica.head)
            if serving and not told:
                told = True
                ready(relay.replica.head)
        await asyncio.sleep(_HEALTH_S)
