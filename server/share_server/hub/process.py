"""The hub process: build the parts, open two listeners, run until told to stop or until the disk fails.

Stopping (SIGTERM, SIGINT) drains: health NOT_SERVING; no new uploads; the merge in progress is committed; streams end
with "connect again"; then the listeners close and the journal is folded in. A storage failure or a fault in the merge
loop ends the process with a non-zero code at once; the truth is on the disk.
"""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass
from typing import Any

import grpc
import torch
from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from share_core.errors import ConfigError, UnavailableError
from share_core.spec_file import read_spec
from share_core.types import SpaceSpec
from share_proto.v1 import enrolment_pb2_grpc, fleet_pb2_grpc, hub_pb2_grpc
from share_server.config import ServerConfig, join_address, read_config
from share_server.hub import log
from share_server.hub.access import CALLER, Gate, Roster, require_tls13
from share_server.hub.engine import Engine
from share_server.hub.enrolment_service import Authority, EnrolmentService, RateLimit
from share_server.hub.fleet_service import FleetService
from share_server.hub.interceptor import Door
from share_server.hub.options import ENROLMENT_OPTIONS, HUB_OPTIONS
from share_server.hub.streams import Streams
from share_server.hub.tensor_service import HubService
from share_server.hub.traffic import Traffic
from share_server.layout import Layout
from share_server.store.members import list_members

EXIT_STOPPED = 0
"""Asked to stop, and drained."""

EXIT_FAILED = 1
"""The storage or the merge loop failed; nothing after the failure was acknowledged."""

Context = aio.ServicerContext[Any, Any]


@dataclass
class _Hub:
    """The running parts."""

    engine: Engine
    traffic: Traffic
    health: HealthServicer
    servers: tuple[aio.Server, ...]


async def serve(layout: Layout) -> int:
    """Run the hub of one server directory; return the exit code.

    Raises:
        ConfigError: the directory cannot be used, or another hub runs on it.
        StorageError: the store is damaged.
        UnavailableError: a port is taken.
    """
    config = read_config(layout.config)
    spec = read_spec(layout.space)
    torch.set_num_threads(1)  # the same bits on every start; the merge thread is one of several anyway
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    engine = await Engine.open(layout.store, spec, config, layout.signing_key.read_bytes())
    space = engine.feed.state.space
    log.info("recovered", version=space.version, tasks=len(space.cores), space_id=spec.space_id)
    hub = await _build(layout, config, spec, engine)
    for server in hub.servers:
        await server.start()
    log.info("serving", hub=config.hub_address, enrolment=config.enrol_address)
    return await _run(hub, config, stop)


async def _build(layout: Layout, config: ServerConfig, spec: SpaceSpec, engine: Engine) -> _Hub:
    store, feed = engine.store, engine.feed
    roster = Roster(await store.do(list_members))
    gate = Gate(roster)
    traffic = Traffic(store)
    streams = Streams(store, spec, config.limits, feed, engine.history, gate, traffic)
    health = HealthServicer()

    def admit(method: str, context: Context) -> None:
        CALLER.set(gate.admit(method, context.auth_context()))

    main = aio.server(
        interceptors=[Door(admit, config.limits.write_timeout_s)],
        options=HUB_OPTIONS,
        maximum_concurrent_rpcs=config.limits.concurrent_calls,
    )
    service = HubService(store, spec, feed, engine.intake, engine.loop, streams, traffic)
    hub_pb2_grpc.add_HubServicer_to_server(service, main)
    fleet_pb2_grpc.add_FleetServicer_to_server(FleetService(store, config, spec.space_id, feed), main)
    health_pb2_grpc.add_HealthServicer_to_server(health, main)
    authority = Authority(layout.ca_cert.read_bytes(), layout.ca_key.read_bytes(), layout.enrol_key.read_bytes())
    pair = (layout.key("server").read_bytes(), layout.certificate("server").read_bytes())
    members_only = grpc.ssl_server_credentials([pair], authority.certificate, require_client_auth=True)
    _bind(main, config.listen, config.hub_port, members_only)
    enrolment = _enrolment_server(config, EnrolmentService(store, config, authority, roster, spec.space_id))
    _bind(enrolment, config.listen, config.enrol_port, grpc.ssl_server_credentials([pair]))
    return _Hub(engine, traffic, health, (main, enrolment))


def _enrolment_server(config: ServerConfig, service: EnrolmentService) -> aio.Server:
    rate = RateLimit(config.limits.enrolments_per_minute)

    def admit(method: str, context: Context) -> None:
        address = context.peer().rsplit(":", 1)[0]
        rate.take(address, asyncio.get_running_loop().time())
        require_tls13(context.auth_context())

    server = aio.server(
        interceptors=[Door(admit, config.limits.write_timeout_s)], options=ENROLMENT_OPTIONS, maximum_concurrent_rpcs=32
    )
    enrolment_pb2_grpc.add_EnrolmentServicer_to_server(service, server)
    return server


def _bind(server: aio.Server, host: str, port: int, credentials: grpc.ServerCredentials) -> None:
    address = join_address(host, port)
    try:
        bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise UnavailableError(f"cannot listen on {address}: is another server using the port?") from error
    if bound != port:
        raise ConfigError(f"cannot listen on {address}: got port {bound}")


async def _run(hub: _Hub, config: ServerConfig, stop: asyncio.Event) -> int:
    """Wait for the first of: asked to stop, storage failed, a background task ended."""
    store, feed, loop = hub.engine.store, hub.engine.feed, hub.engine.loop
    merging = asyncio.create_task(loop.run(), name="merge loop")
    counting = asyncio.create_task(hub.traffic.run(), name="traffic")
    asked = asyncio.create_task(stop.wait())
    failed = asyncio.create_task(store.failed.wait())
    loop.wake()
    await asyncio.wait({merging, counting, asked, failed}, return_when=asyncio.FIRST_COMPLETED)
    await hub.health.enter_graceful_shutdown()
    feed.close()
    broken = failed.done() or merging.done() or counting.done()
    for background in (merging, counting):
        if background.done() and (error := background.exception()) is not None:
            log.failure(f"{background.get_name()} failed", error)
    log.info("stopping", broken=broken)
    loop.stop()
    counting.cancel()
    asked.cancel()
    failed.cancel()
    grace = 0.0 if broken else config.limits.drain_s
    await asyncio.gather(*(server.stop(grace) for server in hub.servers))
    await asyncio.gather(merging, counting, asked, failed, return_exceptions=True)
    if not broken:
        await hub.traffic.flush()
    await hub.engine.close()
    log.info("stopped", broken=broken)
    return EXIT_FAILED if broken else EXIT_STOPPED
