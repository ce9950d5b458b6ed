"""FollowVersions and FetchSnapshot: how versions leave the hub.

A message is made only when the one before was taken (the interceptor cuts a reader that takes nothing for long), so a
slow reader costs one message. Deltas come from the payload files, a few newest ones from memory.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Iterator

from share_core.errors import RebaseError, RequestError, SpaceMismatchError, UnavailableError, VersionError
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.config import LimitConfig
from share_server.hub.access import Caller, Gate
from share_server.hub.feed import Feed, snapshot_bytes
from share_server.hub.history import History
from share_server.hub.options import CHUNK_BYTES
from share_server.hub.traffic import Traffic
from share_server.store.records import VersionRow
from share_server.store.store import Store
from share_server.store.versions import chain_bytes, read_version

_KEPT_DELTA_BYTES = 64 * 2**20

_SMALL_CHAIN_BYTES = 2**20
"""A chain of deltas up to this size is always sent as such: only its reader can look at every version."""


class Streams:
    """Sends versions to those who may read them."""

    def __init__(
        self,
        store: Store,
        spec: SpaceSpec,
        limits: LimitConfig,
        feed: Feed,
        history: History,
        gate: Gate,
        traffic: Traffic,
    ) -> None:
        self._store = store
        self._spec = spec
        self._limits = limits
        self._feed = feed
        self._history = history
        self._gate = gate
        self._traffic = traffic
        self._deltas: OrderedDict[int, bytes] = OrderedDict()
        self._open: Counter[str] = Counter()  # streams by organisation: none may take the calls of all others

    async def follow(
        self, caller: Caller, request: hub_pb2.FollowVersionsRequest
    ) -> AsyncGenerator[hub_pb2.FollowVersionsResponse, None]:
        """Send every version after the caller's, then wait for more, until somebody ends it.

        Raises:
            SpaceMismatchError, VersionError: the caller follows something this hub never had.
            UnavailableError: the hub stops.
            CertificateError, AccessError: the caller's rights ended meanwhile.
        """
        self._check_space(request.space_id)
        position = request.since_version
        if position < 0:
            raise RequestError(f"since_version must not be negative, got {position}")
        if position > self._feed.version:
            raise VersionError(
                f"version {position} is not known here: the newest is {self._feed.version}; fetch a snapshot"
            )
        most = max(1, self._limits.concurrent_calls // 8)
        if self._open[caller.organisation] >= most:
            raise UnavailableError(f"{caller.organisation} follows with {most} streams, which is the most: close some")
        self._open[caller.organisation] += 1
        self._feed.subscribers += 1
        try:
            while True:
                self._gate.recheck(caller)
                if self._feed.closing:
                    raise UnavailableError("the hub is stopping: connect again in a moment")
                if position == self._feed.version:
                    await self._feed.wait_after(position, self._limits.recheck_s)
                    continue
                newest = self._feed.version
                if await self._snapshot_is_better(position, newest):
                    required = hub_pb2.SnapshotRequired(newest_version=newest)
                    yield hub_pb2.FollowVersionsResponse(snapshot_required=required)
                    return
                async for message in self._send_delta(caller, position + 1):
                    yield message
                position += 1
        finally:
            self._feed.subscribers -= 1
            self._open[caller.organisation] -= 1

    async def fetch(
        self, caller: Caller, request: hub_pb2.FetchSnapshotRequest
    ) -> AsyncGenerator[hub_pb2.FetchSnapshotResponse, None]:
        """Send one whole version.

        Raises:
            SpaceMismatchError, VersionError, RebaseError: there is no such version.
        """
        self._check_space(request.space_id)
        if request.version < 0:
            raise RequestError(f"version must not be negative, got {request.version}")
        version = request.version or self._feed.version
        payload = await self._history.snapshot(version)
        header = hub_pb2.SnapshotHeader(
            version=version, payload_size=len(payload), payload_sha256=await self._digest(payload)
        )
        yield hub_pb2.FetchSnapshotResponse(header=header)
        for chunk in _chunks(payload):
            yield hub_pb2.FetchSnapshotResponse(chunk=chunk)
            self._traffic.count_snapshot(caller.member, len(chunk))

    def _check_space(self, space_id: str) -> None:
        if space_id != self._spec.space_id:
            raise SpaceMismatchError(
                f"this hub owns space {self._spec.space_id} ({self._spec.backbone}), not {space_id[:80]!r}"
            )

    async def _snapshot_is_better(self, position: int, newest: int) -> bool:
        """Return whether the deltas to the newest version are gone, or larger together than the version itself."""
        try:
            size = await self._store.do(lambda journal: chain_bytes(journal, position, newest))
        except RebaseError:
            return True
        return size > max(_SMALL_CHAIN_BYTES, snapshot_bytes(self._feed.state.space))

    async def _send_delta(self, caller: Caller, version: int) -> AsyncGenerator[hub_pb2.FollowVersionsResponse, None]:
        row, payload = await self._delta(version)
        header = hub_pb2.DeltaHeader(
            from_version=version - 1,
            version=version,
            newest_version=self._feed.version,
            payload_size=row.delta_size,
            payload_sha256=row.delta_sha256,
        )
        yield hub_pb2.FollowVersionsResponse(delta=header)
        for chunk in _chunks(payload):
            yield hub_pb2.FollowVersionsResponse(chunk=chunk)
            self._traffic.count_delta(caller.member, len(chunk))

    async def _delta(self, version: int) -> tuple[VersionRow, bytes]:
        row = await self._store.do(lambda journal: read_version(journal, version))
        if version not in self._deltas:
            self._deltas[version] = await self._store.io(lambda: self._store.blobs.read(row.delta_sha256))
        payload = self._deltas[version]
        self._deltas.move_to_end(version)
        while len(self._deltas) > 1 and sum(map(len, self._deltas.values())) > _KEPT_DELTA_BYTES:
            self._deltas.popitem(last=False)
        return row, payload

    async def _digest(self, payload: bytes) -> str:
        return await asyncio.to_thread(lambda: hashlib.sha256(payload).hexdigest())


def _chunks(payload: bytes) -> Iterator[bytes]:
    for start in range(0, len(payload), CHUNK_BYTES):
        yield payload[start : start + CHUNK_BYTES]
