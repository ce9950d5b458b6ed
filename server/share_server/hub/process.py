"""The hub process: build the parts, open two listeners, run until told to stop or until the disk fails.

Stopping (SIGTERM, SIGINT) drains: health NOT_SERVING; no new uploads; the merge in progress is committed; streams end
with "connect again"; then the listeners close and the journal is folded in. A storage failure or a fault in the merge
loop ends the process with a non-zero code at once; the truth is on the disk.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from share_core.errors import StorageError, UnavailableError
from share_core.spec_file import read_spec
from share_core.types import SpaceSpec
from share_proto.v1 import enrolment_pb2_grpc, fleet_pb2_grpc, hub_pb2_grpc
from share_server.config import ServerConfig, read_config
from share_server.hub import log
from share_server.hub.access import CALLER, Gate, Roster, require_tls13
from share_server.hub.engine import Engine
from share_server.hub.enrolment_service import Authority, EnrolmentService, RateLimit, peer_network
from share_server.hub.fleet_service import FleetService
from share_server.hub.gate.nursery import Nursery
from share_server.hub.gate.parsers import ParseGate, Parsers
from share_server.hub.interceptor import Door, Recheck, backstop, stop_in_order
from share_server.hub.membership import Membership
from share_server.hub.metrics import Levels, Metrics, count_connections, serve_metrics
from share_server.hub.options import ENROLMENT_OPTIONS, HUB_OPTIONS
from share_server.hub.serving import EXIT_FAILED, EXIT_STOPPED, LAST_GRACE_S, bind, log_failures
from share_server.hub.streams import Streams
from share_server.hub.tensor_service import HubService
from share_server.hub.tls import PairFile, keep_renewed, server_credentials
from share_server.hub.traffic import Traffic
from share_server.layout import Layout
from share_server.operations.rebuild import settle
from share_server.provision import renew_certificates
from share_server.store.members import list_members
from share_server.store.records import UpdateState
from share_server.store.store import Store
from share_server.store.updates import count_states

DAY_S = 86_400.0
"""The hub looks so often, in seconds, whether its certificates are due; SIGHUP makes it look at once."""

VERIFYING_LINE_S = 5.0
"""How often, in seconds, the log says how far the verification of a start is."""

ENROLMENT_CALLS = 32
"""Most enrolment calls in progress at once."""

Context = aio.ServicerContext[Any, Any]


@dataclass
class _Hub:
    """The running parts."""

    engine: Engine
    traffic: Traffic
    health: HealthServicer
    servers: tuple[aio.Server, ...]
    door: Door
    pair: PairFile


class _Verification:
    """Tells the log how far the verification of a start is, and ends it when the hub is asked to stop."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise UnavailableError("asked to stop before the store was verified")
        if time.monotonic() - self._said >= VERIFYING_LINE_S:
            self._said = time.monotonic()
            log.info("verifying", bytes=done, of=total)


async def serve(layout: Layout, nursery: Nursery) -> int:
    """Run the hub of one server directory; return the exit code. ``nursery`` makes what parses payloads.

    Raises:
        ConfigError: the directory cannot be used, or another hub runs on it.
        StorageError: the store is damaged.
        UnavailableError: a port is taken.
    """
    config = read_config(layout.config)
    spec = await settle(layout, read_spec(layout.space))
    torch.set_num_threads(1)  # the same bits on every start; the merge thread is one of several anyway
    stop, look = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, look.set)
    metrics = Metrics()
    verified = _Verification(stop)

    def gate_of(store: Store, spec: SpaceSpec, metrics: Metrics) -> ParseGate:
        return Parsers(nursery, store, spec, config.limits, metrics)

    try:
        engine = await Engine.open(
            layout.store, spec, config, layout.signing_key.read_bytes(), metrics, verified, gate_of
        )
    except UnavailableError:
        if not stop.is_set():
            raise
        return EXIT_STOPPED
    try:
        space = engine.feed.state.space
        log.info("recovered", version=space.version, tasks=len(space.cores), space_id=spec.space_id)
        hub = await _build(layout, config, spec, engine, metrics)
        async with serve_metrics(metrics, lambda: _levels(hub, config), config.metrics_port):
            for server in hub.servers:
                await server.start()
            log.info("serving", hub=config.hub_address, enrolment=config.enrol_address, metrics=config.metrics_port)
            renewing = keep_renewed(
                lambda: renew_certificates(layout, config, datetime.now(UTC)), hub.pair, DAY_S, look
            )
            broken = await _run(hub, config, stop, renewing, nursery.ended())
    finally:
        await engine.close()
    log.info("stopped", broken=broken)
    return EXIT_FAILED if broken else EXIT_STOPPED


async def _build(layout: Layout, config: ServerConfig, spec: SpaceSpec, engine: Engine, metrics: Metrics) -> _Hub:
    store, feed, limits = engine.store, engine.feed, config.limits
    roster = Roster(await store.do(list_members))
    gate = Gate(roster)
    traffic = Traffic(store)

    def sent(member: str, kind: str, size: int) -> None:
        traffic.count(member, kind, size)
        metrics.sent(kind, size)

    streams = Streams(engine.published, limits, gate.recheck, sent)
    health = HealthServicer()

    def admit(method: str, context: Context) -> Recheck:
        caller = gate.admit(method, context.auth_context())
        CALLER.set(caller)
        return partial(gate.recheck, caller)

    door = Door(admit, limits.write_timeout_s, limits.concurrent_calls, metrics)
    main = aio.server(
        interceptors=[door], options=HUB_OPTIONS, maximum_concurrent_rpcs=backstop(limits.concurrent_calls)
    )
    signer = layout.signing_certificate.read_bytes()
    authority = Authority(layout.ca_cert.read_bytes(), layout.ca_key.read_bytes(), layout.enrol_key.read_bytes())
    membership = Membership(store, config, authority, roster, door.look)
    service = HubService(spec, engine, streams, traffic, membership, signer)
    hub_pb2_grpc.add_HubServicer_to_server(service, main)
    fleet_pb2_grpc.add_FleetServicer_to_server(FleetService(store, config, spec.space_id, feed), main)
    health_pb2_grpc.add_HealthServicer_to_server(health, main)
    pair = PairFile(
        layout.key("server"), layout.certificate("server"), authority.certificate, metrics.certificate_alarm
    )
    bind(main, config.listen, config.hub_port, server_credentials(pair, authority.certificate))
    enrolment = _enrolment_server(config, EnrolmentService(store, config, authority, roster, spec.space_id), metrics)
    bind(enrolment, config.listen, config.enrol_port, server_credentials(pair, None))
    return _Hub(engine, traffic, health, (main, enrolment), door, pair)


def _enrolment_server(config: ServerConfig, service: EnrolmentService, metrics: Metrics) -> aio.Server:
    rate = RateLimit(config.limits.enrolments_per_minute)

    def admit(method: str, context: Context) -> None:
        rate.take(peer_network(context.peer()), asyncio.get_running_loop().time())
        require_tls13(context.auth_context())

    door = Door(admit, config.limits.write_timeout_s, ENROLMENT_CALLS, metrics)
    server = aio.server(
        interceptors=[door], options=ENROLMENT_OPTIONS, maximum_concurrent_rpcs=backstop(ENROLMENT_CALLS)
    )
    enrolment_pb2_grpc.add_EnrolmentServicer_to_server(service, server)
    return server


async def _levels(hub: _Hub, config: ServerConfig) -> Levels:
    """Return what a scrape asks for; without the store's part once the storage has failed."""
    store, feed = hub.engine.store, hub.engine.feed
    levels: dict[str, float | dict[str, float]] = {
        "version": feed.version,
        "subscribers": hub.engine.published.subscribers,
        "storage_failed": store.failed.is_set(),
        "open_calls": hub.door.open_calls,
        "bytes_in_flight": hub.engine.intake.quota.bytes_in_flight,
        "open_connections": await asyncio.to_thread(count_connections, config.hub_port),
        "certificate_expiry_seconds": (hub.pair.expires - datetime.now(UTC)).total_seconds(),
    }
    try:
        states = await store.do(count_states)
        levels["disk_free_bytes"] = await store.io(store.blobs.free_bytes)
    except StorageError:
        return levels
    levels["updates"] = {state.name.lower(): count for state, count in states.items()}
    levels["waiting_updates"] = states[UpdateState.ACCEPTED]
    return levels


async def _run(
    hub: _Hub,
    config: ServerConfig,
    stop: asyncio.Event,
    renewing: Coroutine[Any, Any, None],
    orphaned: Coroutine[Any, Any, Any],
) -> bool:
    """Wait for the first of: asked to stop, storage failed, no parsers any more, a background task ended.

    Then stop the listeners.

    Returns whether something was broken, be it only in the last merge.
    """
    store, feed, loop = hub.engine.store, hub.engine.feed, hub.engine.loop
    merging = asyncio.create_task(loop.run(), name="merge loop")
    counting = asyncio.create_task(hub.traffic.run(), name="traffic")
    looking = hub.door.keep_looking(config.limits.recheck_s)
    others = [asyncio.create_task(work) for work in (renewing, looking, stop.wait(), orphaned, store.failed.wait())]
    parsers_gone, failed = others[-2:]
    loop.wake()
    await asyncio.wait({merging, counting, *others}, return_when=asyncio.FIRST_COMPLETED)
    await hub.health.enter_graceful_shutdown()
    feed.close()
    ended = [task for task in (merging, counting) if task.done()]
    log_failures(ended)
    broken = failed.done() or parsers_gone.done() or bool(ended)
    log.info("stopping", broken=broken, parsers_gone=parsers_gone.done())
    loop.stop()
    for task in (counting, *others):
        task.cancel()
    grace = LAST_GRACE_S if broken else config.limits.drain_s
    main, enrolment = hub.servers
    await asyncio.gather(stop_in_order(main, hub.door, grace), enrolment.stop(grace))
    await asyncio.gather(merging, counting, *others, return_exceptions=True)
    late = log_failures(task for task in (merging, counting) if task not in ended)
    broken = broken or late or store.failed.is_set()
    if not broken:
        await hub.traffic.flush()
    return broken
