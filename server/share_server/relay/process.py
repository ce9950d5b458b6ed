"""The relay process: follow upstream, serve what came, until told to stop."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Callable
from typing import Any

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from share_proto.v1 import hub_pb2_grpc
from share_server.config import LimitConfig
from share_server.hub import log
from share_server.hub.access import CALLER, Roster
from share_server.hub.interceptor import Door, backstop
from share_server.hub.metrics import Metrics
from share_server.hub.options import HUB_OPTIONS
from share_server.hub.process import EXIT_FAILED, EXIT_STOPPED, bind
from share_server.hub.streams import Streams
from share_server.hub.tls import PairFile, server_credentials
from share_server.relay.home import RelayHome, RelayState, split_address
from share_server.relay.replica import Replica
from share_server.relay.service import RelayGate, RelayService, RelaySource
from share_server.relay.upstream import Pace, Upstream

RECHECK_S = 5.0
"""How often the caller of an open stream, and the health of the relay, are looked at."""

Context = aio.ServicerContext[Any, Any]


async def serve_relay(
    home: RelayHome,
    state: RelayState,
    ready: Callable[[int], None],
    limits: LimitConfig | None = None,
    pace: Pace | None = None,
) -> int:
    """Run one relay; return the exit code. ``ready`` is told the version held when the relay first serves.

    Raises:
        UnavailableError: the port is taken. ConfigError, CertificateError: the directory cannot be used.
    """
    limits = dataclasses.replace(limits or LimitConfig(), recheck_s=RECHECK_S)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics, roster, replica = Metrics(), Roster([]), Replica(home.cache)
    upstream = Upstream(home, state, replica, roster, pace or Pace())
    gate = RelayGate(roster, upstream)
    health = HealthServicer()
    await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)

    def admit(method: str, context: Context) -> None:
        CALLER.set(gate.admit(method, context.auth_context()))

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
    pair = PairFile(home.key, home.serving, authority)
    bind(server, *split_address(state.listen), server_credentials(pair, authority))
    await server.start()
    log.info("listening", listen=state.listen, upstream=state.upstream)
    working = [
        asyncio.create_task(upstream.run(), name="upstream"),
        asyncio.create_task(_keep_health(health, upstream, replica, ready), name="health"),
    ]
    asked = asyncio.create_task(stop.wait())
    await asyncio.wait({asked, *working}, return_when=asyncio.FIRST_COMPLETED)
    broken = _failures(working)
    await health.enter_graceful_shutdown()
    replica.close()
    for task in (asked, *working):
        task.cancel()
    await server.stop(limits.drain_s if not broken else 0.0)
    await asyncio.gather(asked, *working, return_exceptions=True)
    log.info("stopped", broken=broken)
    return EXIT_FAILED if broken else EXIT_STOPPED


def _failures(working: list[asyncio.Task[None]]) -> bool:
    """Log why a task ended by itself; return whether one did."""
    ended = [task for task in working if task.done()]
    for task in ended:
        if (error := task.exception()) is not None:
            log.failure(f"{task.get_name()} failed", error)
    return bool(ended)


async def _keep_health(
    health: HealthServicer, upstream: Upstream, replica: Replica, ready: Callable[[int], None]
) -> None:
    """Report SERVING exactly while callers would be served."""
    serving = False
    told = False
    while True:
        if upstream.fresh != serving:
            serving = upstream.fresh
            status = health_pb2.HealthCheckResponse
            await health.set("", status.SERVING if serving else status.NOT_SERVING)
            log.info("serving" if serving else "not serving", version=replica.head)
            if serving and not told:
                told = True
                ready(replica.head)
        await asyncio.sleep(0.2)
