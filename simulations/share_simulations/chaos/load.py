"""Load for the hub: a toy space, payloads made beforehand, and many clients in few connections.

A client has an outbox's manners: it sends the same id and the same bytes until it is acknowledged. Some of them send
twice at once, as a client does whose first call hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess

import grpc
import torch
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from share_core.durable import write_atomic
from share_core.errors import ERROR_KEY, UnavailableError
from share_core.fingerprint import describe_space
from share_core.space import empty_space
from share_core.types import Core, Factors, SiteUpdate, Space, SpaceSpec, Update
from share_core.wire import decode_snapshot, encode_update
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.config import LimitConfig, MergeConfig, RetentionConfig, config_to_toml
from share_server.local import Holder, LocalHub, sign_header, submit_header, submit_messages
from share_simulations.chaos.endcheck import Book

_CALL_S = 20.0
_START_S = 120.0
_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
_CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_receive_message_length", 4 * 2**20),
)

ROOMY = LimitConfig(concurrent_calls=4096, concurrent_uploads=2048)
"""Limits that a campaign does not run into."""


TOY_SITES = ((24, 16), (16, 16))
"""(d_out, d_in) of sites that merge in a millisecond."""


def toy_weights(sizes: tuple[tuple[int, int], ...] = TOY_SITES) -> dict[str, torch.Tensor]:
    """Return the frozen weights of a toy backbone with sites of these sizes, always the same."""
    draw = torch.Generator().manual_seed(7)
    return {f"s{number}": torch.randn(size, generator=draw) for number, size in enumerate(sizes)}


def toy_space(k_max: int = 12, sizes: tuple[tuple[int, int], ...] = TOY_SITES) -> SpaceSpec:
    """Return the space of that backbone."""
    return describe_space("toy", toy_weights(sizes), k_max=k_max, rank_limit=8)


def configure(server: LocalHub, **changes: RetentionConfig | MergeConfig) -> None:
    """Change parts of the configuration of a hub that does not run."""
    server.config = replace(server.config, **changes)  # type: ignore[arg-type]
    write_atomic(server.layout.config, config_to_toml(server.config).encode())


def toy_update(spec: SpaceSpec, space: Space, seed: int, rank: int = 2, head: int = 0) -> Update:
    """Return a random update expressed in ``space``: cores where it has bases, and free directions of ``rank``.

    ``head`` numbers of a shared head make it heavy to send and light to merge.
    """
    draw = torch.Generator().manual_seed(seed)
    sites: dict[str, SiteUpdate] = {}
    for name, site in spec.sites.items():
        basis = space.bases[name]
        residual = Factors(torch.randn(site.d_out, rank, generator=draw), torch.randn(site.d_in, rank, generator=draw))
        core = None
        if basis.k_out and basis.k_in:
            core = Core(torch.randn(basis.k_out, 2, generator=draw), torch.randn(basis.k_in, 2, generator=draw))
        sites[name] = SiteUpdate(core=core, residual=residual)
    return Update(space.version, sites, {"head": torch.randn(head, generator=draw)} if head else {})


class Payloads:
    """Payloads made beforehand; the last number of each is another one, so that no two are the same."""

    def __init__(self, spec: SpaceSpec, seed: int, pool: int = 48) -> None:
        self._spec = spec
        self._seed = seed
        self._count = 0
        self._bodies = [encode_update(toy_update(spec, empty_space(spec), seed + n)) for n in range(pool)]

    def adopt(self, space: Space, share: float = 0.25) -> None:
        """Let a share of the payloads be expressed in ``space`` from now on; the others grow stale."""
        for number in range(0, len(self._bodies), round(1 / share)):
            update = toy_update(self._spec, space, self._seed + self._count + number)
            self._bodies[(number + self._count) % len(self._bodies)] = encode_update(update)

    def renew(self, space: Space) -> None:
        """Express all of them in ``space``: the older version is no longer kept."""
        self.adopt(space, 1.0)

    def next(self) -> bytes:
        """Return a payload that was never returned before."""
        self._count += 1
        body = self._bodies[self._count % len(self._bodies)]
        return body[:-4] + struct.pack("<f", 1 + (self._count % 2**20) / 2**20)


class Victim:
    """A hub process that is killed and started again."""

    def __init__(self, server: LocalHub) -> None:
        self.server = server
        self._process: BaseProcess | None = None

    def launch(self) -> None:
        """Start the process and do not wait for anything."""
        self._process = self.server.launch()

    async def start(self) -> float:
        """Start it and return after how many seconds it served.

        Raises:
            UnavailableError: it ended, or did not serve; the end of its log is in the message.
        """
        begin = time.monotonic()
        self.launch()
        while time.monotonic() - begin < _START_S and self.alive:
            if await self._listens() and await self._serves():
                return time.monotonic() - begin
            await asyncio.sleep(0.01)
        raise UnavailableError(f"the hub does not start: {self.log_tail()}")

    @property
    def alive(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.is_alive()

    def kill(self) -> None:
        """End it with SIGKILL; nothing happens if it has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None

    async def stop(self) -> int | None:
        """Ask it to stop and return its exit code; None if it was not running."""
        process = self._process
        if process is None:
            return None
        process.terminate()
        while process.is_alive():
            await asyncio.sleep(0.02)
        process.join()
        self._process = None
        return process.exitcode

    def log_tail(self) -> str:
        """Return the reason of the last error in the hub's log, or the end of its last line."""
        lines = self.server.log_file.read_text(errors="replace").strip().splitlines()
        for line in reversed(lines[-20:]):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                return f"{entry['error']}: {entry['reason']}"[:600]
        return (lines or ["nothing in its log"])[-1][-600:]

    async def _listens(self) -> bool:
        host, _, port = self.server.config.local_hub_address.rpartition(":")
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            return False
        writer.close()
        return True

    async def _serves(self) -> bool:
        async with open_channel(self.server, self.server.own("operator")) as channel:
            try:
                request = health_pb2.HealthCheckRequest()
                answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=2.0)
            except aio.AioRpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def open_channel(server: LocalHub, holder: Holder) -> aio.Channel:
    """Return an asynchronous channel to the hub as ``holder``."""
    credentials = grpc.ssl_channel_credentials(server.layout.ca_cert.read_bytes(), holder.key, holder.certificate)
    return aio.secure_channel(server.config.local_hub_address, credentials, _CHANNEL)


@dataclass(frozen=True)
class Crowd:
    """How many send, and how."""

    clients: int = 200
    """Logical clients; each has one update under way."""
    organisations: int = 4
    """Members, one connection each; the clients are dealt to them."""
    tasks: int = 12
    """Tasks of each organisation."""
    twice: float = 0.05
    """Share of the updates that are sent twice at once."""


class Swarm:
    """Clients that bring a given number of updates to their acknowledgement. Use it as an asynchronous context."""

    def __init__(self, server: LocalHub, holders: list[Holder], crowd: Crowd, book: Book, seed: int) -> None:
        self._server = server
        self._holders = holders
        self._crowd = crowd
        self._book = book
        self._random = random.Random(seed)
        self._payloads = Payloads(server.spec, seed * 1_000_003)
        self._channels: list[aio.Channel] = []
        self._tickets: Iterator[int] = iter(())
        self._renewing = asyncio.Lock()
        self.retries = 0
        """Calls that were answered by nothing but a broken connection or "later"."""

    async def __aenter__(self) -> Swarm:
        self._channels = [open_channel(self._server, holder) for holder in self._holders]
        return self

    async def __aexit__(self, *error: object) -> None:
        for channel in self._channels:
            await channel.close()

    async def run(self, updates: int) -> None:
        """Return when ``updates`` more are acknowledged."""
        self._tickets = iter(range(updates))
        async with asyncio.TaskGroup() as group:
            for number in range(min(self._crowd.clients, updates)):
                group.create_task(self._client(number))

    async def adopt(self) -> None:
        """Express some of the next payloads in the newest version."""
        try:
            self._payloads.adopt(await self._newest())
        except aio.AioRpcError as error:
            if error.code() not in _AGAIN:
                raise

    async def _client(self, number: int) -> None:
        slot = number % len(self._channels)
        hub = hub_pb2_grpc.HubStub(self._channels[slot])
        task = f"org{slot}/t{(number // len(self._channels)) % self._crowd.tasks}"
        for _ in self._tickets:
            await self._deliver(hub, task, self._holders[slot])

    async def _deliver(self, hub: hub_pb2_grpc.HubAsyncStub, task: str, holder: Holder) -> None:
        """Bring one update to its acknowledgement, under a new id whenever its version is no longer kept."""
        while True:
            payload = self._payloads.next()
            header = sign_header(submit_header(self._server.spec, task, payload), holder)
            self._book.send(header.update_id, header.payload_sha256)
            messages = list(submit_messages(header, payload))
            calls = [self._until_answered(hub, header.update_id, messages)]
            if self._random.random() < self._crowd.twice:
                calls.append(self._until_answered(hub, header.update_id, messages))
            if all(await asyncio.gather(*calls)):
                return
            async with self._renewing:
                self._payloads.renew(await self._newest())

    async def _until_answered(
        self, hub: hub_pb2_grpc.HubAsyncStub, update_id: str, messages: list[hub_pb2.SubmitRequest]
    ) -> bool:
        """Send the same until there is a receipt; False if the hub wants the update in a newer version."""
        pause_s = 0.05
        while True:
            try:
                answer = await hub.Submit(iter(messages), timeout=_CALL_S)
            except asyncio.CancelledError:
                # gRPC cancels a call whose connection breaks while a request is written; a task group would take
                # that for a client that was told to end.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                self.retries += 1
                continue
            except aio.AioRpcError as error:
                name = error_name(error)
                if name == "RebaseError":
                    return False
                if error.code() not in _AGAIN or name == "PayloadTooLargeError":
                    self._book.broken.append(f"update {update_id} is honest and was refused: {name} {error.details()}")
                    return True
                self.retries += 1
                await asyncio.sleep(self._random.uniform(0.5, 1.0) * pause_s)
                pause_s = min(1.0, 2 * pause_s)
                continue
            self._book.acknowledge(update_id, answer)
            return True

    async def _newest(self) -> Space:
        hub = hub_pb2_grpc.HubStub(self._channels[0])
        payload = bytearray()
        request = hub_pb2.FetchSnapshotRequest(space_id=self._server.spec.space_id)
        async for message in hub.FetchSnapshot(request, timeout=_CALL_S):
            payload += message.chunk
        return decode_snapshot(bytes(payload), self._server.spec)


async def follow(server: LocalHub, holder: Holder, book: Book, seed: int) -> None:
    """Follow versions through every death of the hub and note what was published; ends when it is cancelled.

    After a broken connection it asks for some versions again: they must be the same bytes.
    """
    draw = random.Random(seed)
    newest = 0
    async with open_channel(server, holder) as channel:
        hub = hub_pb2_grpc.HubStub(channel)
        while True:
            since = max(0, newest - draw.randint(0, 3))
            request = hub_pb2.FollowVersionsRequest(space_id=server.spec.space_id, since_version=since)
            payload, header = bytearray(), hub_pb2.DeltaHeader()
            try:
                async for message in hub.FollowVersions(request):
                    part = message.WhichOneof("part")
                    if part == "snapshot_required":
                        newest = message.snapshot_required.newest_version
                        break
                    if part == "heartbeat":
                        continue
                    if part == "delta":
                        header, payload = message.delta, bytearray(message.delta.data)
                    else:
                        payload += message.chunk
                    if len(payload) == header.payload_size:
                        book.publish(header.version, hashlib.sha256(payload).hexdigest())
                        newest = max(newest, header.version)
            except aio.AioRpcError as error:
                if error_name(error) == "VersionError":
                    book.broken.append(f"version {since} was published and is unknown now: {error.details()}")
                    newest = 0
                await asyncio.sleep(0.05)


def error_name(error: aio.AioRpcError) -> str:
    """Return the class of share_core.errors that a failed call names; empty if it names none."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return ""
