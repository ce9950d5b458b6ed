"""A load process of ``share-sim bench broadcast``: many subscribers, or some that stopped reading.

Job: ``ca`` (path), ``space_id``, ``since`` (version that every subscriber holds), ``read`` (false: each takes one
message and never reads again) and ``connections``: ``address``, PEM ``key`` and ``certificate``, ``streams``.

Commands: ``{"open": true}`` opens every stream and answers when each has had its first message;
``{"wait_for": version, "timeout_s": s}`` answers when every reader holds that version, or after the time, with the
moments (seconds since 1970, this machine's clock) at which the readers first held each version.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from share_core.errors import DigestError
from share_proto.v1 import hub_pb2
from share_simulations.bench.hub_load import CHANNEL_OPTIONS
from share_simulations.bench.worker import read_job, serve_commands

FOLLOW = "/share_proto.v1.Hub/FollowVersions"
SNAPSHOT = "/share_proto.v1.Hub/FetchSnapshot"
_OPEN_S = 90.0
_OPENING = 32
"""Streams that are being opened at once."""
_OPTIONS: list[tuple[str, int]] = [*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", 8 * 2**20)]
_NARROW: list[tuple[str, int]] = [*_OPTIONS, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
"""Of connections that stop reading: the usual window of HTTP/2. A window that grows would hide the stall from the hub
by taking some mebibytes more into the memory of the subscriber."""


class Payloads:
    """The first copy of every payload, checked against its digest; all others are compared with it byte by byte."""

    def __init__(self) -> None:
        self._first: dict[int, bytes] = {}

    def check(self, version: int, payload: bytes, sha256: str) -> None:
        """Raise DigestError unless this is the payload of that version."""
        first = self._first.get(version)
        if first is None:
            if hashlib.sha256(payload).hexdigest() != sha256:
                raise DigestError(f"version {version}: the bytes do not match their digest")
            self._first[version] = payload
        elif first != payload:
            raise DigestError(f"version {version}: two readers got different bytes")


class Reader:
    """One subscriber."""

    def __init__(self, channel: aio.Channel, space_id: str, since: int, seen: Seen) -> None:
        self._follow: Any = channel.unary_stream(FOLLOW)
        self._fetch: Any = channel.unary_stream(SNAPSHOT)
        self._space_id = space_id
        self._seen = seen
        self.version = since
        self.started = asyncio.Event()
        self._call: Any = None

    async def run(self) -> None:
        """Follow for ever; a stream that ends is opened again from the version that is held."""
        wait = 0.1
        while True:
            before = self.version
            try:
                if await self._follow_once():
                    await self._fetch_snapshot()
            except aio.AioRpcError as error:
                self._seen.interrupted(error)
                wait = 0.1 if self.version > before else min(5.0, 2 * wait)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    async def take_one(self) -> None:
        """Open the stream, take one message, and never read again."""
        self._call = self._follow(self._request())
        if await self._call.read() is aio.EOF:
            raise aio.UsageError("the stream ended at once")
        self.started.set()

    async def _follow_once(self) -> bool:
        """Read one stream to its end; return whether the hub asks for a snapshot."""
        header, parts, missing = hub_pb2.DeltaHeader(), [b""], 0
        async for data in self._follow(self._request()):
            message = hub_pb2.FollowVersionsResponse.FromString(data)
            part = message.WhichOneof("part")
            if part == "snapshot_required":
                return True
            if part == "heartbeat":
                continue
            if part == "delta":
                header, parts, missing = message.delta, [message.delta.data], message.delta.payload_size
                missing -= len(message.delta.data)
            else:
                parts.append(message.chunk)
                missing -= len(message.chunk)
            if missing == 0:
                self._seen.payloads.check(header.version, b"".join(parts), header.payload_sha256)
                self._arrived(header.version)
        return False

    async def _fetch_snapshot(self) -> None:
        header, size = hub_pb2.SnapshotHeader(), 0
        request = hub_pb2.FetchSnapshotRequest(space_id=self._space_id).SerializeToString()
        async for data in self._fetch(request):
            message = hub_pb2.FetchSnapshotResponse.FromString(data)
            if message.WhichOneof("part") == "header":
                header = message.header
            size += len(message.chunk)
        self._seen.counts["snapshots"] += 1
        if size == header.payload_size:
            self._arrived(header.version)

    def _arrived(self, version: int) -> None:
        self._seen.arrived(self.version, version)
        self.version = version
        self.started.set()

    def _request(self) -> bytes:
        request = hub_pb2.FollowVersionsRequest(space_id=self._space_id, since_version=self.version)
        return request.SerializeToString()


class Seen:
    """What all readers of this process saw."""

    def __init__(self) -> None:
        self.payloads = Payloads()
        self.moments: dict[int, list[float]] = defaultdict(list)
        self.counts: Counter[str] = Counter()

    def arrived(self, held: int, version: int) -> None:
        """A reader went from one version to another; it holds every version in between from now on."""
        now = time.time()
        for number in range(held + 1, version + 1):
            self.moments[number].append(round(now, 6))

    def interrupted(self, error: aio.AioRpcError) -> None:
        """A stream ended with an error."""
        self.counts["interrupted"] += 1
        if self.counts["interrupted"] <= 5:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)  # goes to the log


class Crowd:
    """All subscribers of this process."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._reads = bool(job["read"])
        self._seen = Seen()
        self._channels: list[aio.Channel] = []
        self._readers: list[Reader] = []
        self._tasks: list[asyncio.Task[None]] = []
        ca = Path(job["ca"]).read_bytes()
        for connection in job["connections"]:
            key, certificate = connection["key"].encode(), connection["certificate"].encode()
            credentials = grpc.ssl_channel_credentials(ca, key, certificate)
            channel = aio.secure_channel(connection["address"], credentials, _OPTIONS if self._reads else _NARROW)
            self._channels.append(channel)
            self._readers += [
                Reader(channel, job["space_id"], job["since"], self._seen) for _ in range(connection["streams"])
            ]

    async def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command."""
        if "open" in command:
            await asyncio.wait_for(self._open(), _OPEN_S)
            return {"open": len(self._readers)}
        version = int(command["wait_for"])
        end = time.monotonic() + command["timeout_s"]
        while self._behind(version) and time.monotonic() < end:
            await asyncio.sleep(0.02)
            self._check()
        return {
            "readers": len(self._readers),
            "on_newest": len(self._readers) - self._behind(version),
            "moments": {str(number): times for number, times in self._seen.moments.items()},
            **{key: self._seen.counts[key] for key in ("interrupted", "snapshots")},
        }

    async def close(self) -> None:
        """End every stream and connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _open(self) -> None:
        gate = asyncio.Semaphore(_OPENING)

        async def one(reader: Reader) -> None:
            async with gate:
                if self._reads:
                    self._tasks.append(asyncio.create_task(reader.run()))
                    await reader.started.wait()
                else:
                    await reader.take_one()

        await asyncio.gather(*(one(reader) for reader in self._readers))
        self._check()

    def _behind(self, version: int) -> int:
        return sum(reader.version < version for reader in self._readers)

    def _check(self) -> None:
        """Let a fault of the load process, or wrong bytes, end it with its reason."""
        for task in self._tasks:
            if task.done():
                task.result()


async def _main() -> None:
    crowd = Crowd(read_job())
    try:
        await serve_commands(crowd.handle, {"ready": True})
    finally:
        await crowd.close()


if __name__ == "__main__":
    asyncio.run(_main())
