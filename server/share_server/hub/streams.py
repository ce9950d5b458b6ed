"""FollowVersions, FetchSnapshot and FetchHead: how versions leave a hub or a relay, and heads a hub.

Where the versions come from is behind :class:`Source`. A message is made only when the one before was taken (the
interceptor cuts a reader that takes nothing for long), so a slow reader costs one message and one number: its position.
At each turn it is given the next step, or told to fetch the newest version whole where that is less to read.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Protocol

from share_core.errors import RequestError, SpaceMismatchError, UnavailableError, VersionError
from share_proto.v1 import hub_pb2
from share_server.config import LimitConfig
from share_server.hub.access import Caller
from share_server.hub.options import CHUNK_BYTES

SMALL_CHAIN_BYTES = 2**20
"""Steps of up to this size together are always sent as such: only their reader can look at every version."""


HEARTBEAT_S = 30.0
"""Seconds between two statements of the newest version on a stream on which nothing else happens."""

Newest = tuple[int, hub_pb2.Manifest]
"""A version, and the hub's signed statement that it was the newest."""


class Source(Protocol):
    """Where versions come from."""

    subscribers: int
    """Open FollowVersions streams."""

    @property
    def space_id(self) -> str:
        """The space that the versions belong to."""

    @property
    def version(self) -> int:
        """The newest version."""

    @property
    def closing(self) -> bool:
        """Whether the process is about to stop."""

    async def newest(self) -> Newest | None:
        """Return the hub's youngest statement of its newest version; None if there is none here."""

    async def wait_after(self, version: int, timeout_s: float) -> None:
        """Return when a version after ``version`` is there, when the process stops, or after ``timeout_s``."""

    async def whole_is_better(self, position: int) -> bool:
        """Return whether the steps after ``position`` are gone, or more bytes than a whole version."""

    async def step(self, version: int) -> tuple[hub_pb2.DeltaHeader, bytes]:
        """Return header (with its manifest, without data) and payload of the step to ``version``.

        Raises:
            RebaseError: it is no longer kept.
        """

    async def whole(self, version: int) -> tuple[hub_pb2.SnapshotHeader, bytes]:
        """Return header (with its manifests) and payload of one whole version; 0 for the newest.

        Raises:
            VersionError, RebaseError: there is no such version here.
        """


class Streams:
    """Sends versions to those who may read them."""

    def __init__(
        self,
        source: Source,
        limits: LimitConfig,
        recheck: Callable[[Caller], None],
        sent: Callable[[str, str, int], None],
    ) -> None:
        """Serve ``source``.

        Args:
            source: the versions.
            limits: streams per organisation, how often rights are checked.
            recheck: raises when the rights of a caller with an open stream have ended.
            sent: told (member, "delta", "snapshot" or "head", payload bytes) of everything that is sent.
        """
        self._source = source
        self._limits = limits
        self._recheck = recheck
        self._sent = sent
        self._following: Counter[str] = Counter()  # by organisation: none may take the calls of all others
        self._fetching: Counter[str] = Counter()

    async def follow(
        self, caller: Caller, request: hub_pb2.FollowVersionsRequest
    ) -> AsyncGenerator[hub_pb2.FollowVersionsResponse, None]:
        """Send every version after the caller's, then wait for more, until somebody ends it.

        Raises:
            SpaceMismatchError, VersionError: the caller follows something that was never published here.
            UnavailableError: the process stops.
            CertificateError, AccessError: the caller's rights ended meanwhile.
        """
        source, position = self._source, request.since_version
        self._check_space(request.space_id)
        if position < 0:
            raise RequestError(f"since_version must not be negative, got {position}")
        if position > source.version:
            raise VersionError(
                f"version {position} is not known here: the newest is {source.version}; fetch a snapshot"
            )
        self._take(self._following, caller, "follows")
        source.subscribers += 1
        said, said_at = b"", -math.inf
        try:
            while True:
                self._recheck(caller)
                if source.closing:
                    raise UnavailableError("the hub is stopping: connect again in a moment")
                if time.monotonic() - said_at >= HEARTBEAT_S:
                    # Not one that is older than what this reader has: it would look like a hub that went back.
                    newest = await source.newest()
                    if newest is not None and newest[0] >= position and newest[1].body != said:
                        said, said_at = newest[1].body, time.monotonic()
                        yield hub_pb2.FollowVersionsResponse(heartbeat=newest[1])
                if position >= source.version:
                    await source.wait_after(position, min(self._limits.recheck_s, HEARTBEAT_S))
                    continue
                if await source.whole_is_better(position):
                    required = hub_pb2.SnapshotRequired(newest_version=source.version)
                    yield hub_pb2.FollowVersionsResponse(snapshot_required=required)
                    return
                async for message in self._send_step(caller, position + 1):
                    yield message
                position += 1
        finally:
            source.subscribers -= 1
            self._following[caller.organisation] -= 1

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
        self._take(self._fetching, caller, "fetches")
        try:
            header, payload = await self._source.whole(request.version)
            yield hub_pb2.FetchSnapshotResponse(header=header)
            for chunk in _chunks(payload):
                yield hub_pb2.FetchSnapshotResponse(chunk=chunk)
                self._sent(caller.member, "snapshot", len(chunk))
        finally:
            self._fetching[caller.organisation] -= 1

    async def fetch_head(
        self,
        caller: Caller,
        request: hub_pb2.FetchHeadRequest,
        head_of: Callable[[Caller, str, int], Awaitable[tuple[hub_pb2.HeadHeader, bytes]]],
    ) -> AsyncGenerator[hub_pb2.FetchHeadResponse, None]:
        """Send the head that ``head_of`` gives a caller of a task in a version.

        Raises:
            SpaceMismatchError, FedshareError: another space, or what ``head_of`` raises.
        """
        self._check_space(request.space_id)
        self._take(self._fetching, caller, "fetches")
        try:
            header, payload = await head_of(caller, request.task_id, request.version)
            yield hub_pb2.FetchHeadResponse(header=header)
            for chunk in _chunks(payload):
                # Counted before: a reader that has all bytes ends the call, and nothing after the last one would run.
                self._sent(caller.member, "head", len(chunk))
                yield hub_pb2.FetchHeadResponse(chunk=chunk)
        finally:
            self._fetching[caller.organisation] -= 1

    def _take(self, open_streams: Counter[str], caller: Caller, what: str) -> None:
        """Count a stream; an eighth of all calls is the most that one organisation may hold."""
        most = max(1, self._limits.concurrent_calls // 8)
        if open_streams[caller.organisation] >= most:
            raise UnavailableError(f"{caller.organisation} {what} with {most} streams, which is the most: close some")
        open_streams[caller.organisation] += 1

    def _check_space(self, space_id: str) -> None:
        if space_id != self._source.space_id:
            raise SpaceMismatchError(f"versions of space {self._source.space_id} are here, not of {space_id[:80]!r}")

    async def _send_step(self, caller: Caller, version: int) -> AsyncGenerator[hub_pb2.FollowVersionsResponse, None]:
        kept, payload = await self._source.step(version)
        header = hub_pb2.DeltaHeader()
        header.CopyFrom(kept)
        header.newest_version = self._source.version
        header.data = payload[:CHUNK_BYTES]
        yield hub_pb2.FollowVersionsResponse(delta=header)
        self._sent(caller.member, "delta", len(header.data))
        for chunk in _chunks(payload, CHUNK_BYTES):
            yield hub_pb2.FollowVersionsResponse(chunk=chunk)
            self._sent(caller.member, "delta", len(chunk))


def _chunks(payload: bytes, begin: int = 0) -> Iterator[bytes]:
    """Yield what follows byte ``begin`` in chunks; a reader in the middle holds one of them and no copy of the rest."""
    for start in range(begin, len(payload), CHUNK_BYTES):
        yield payload[start : start + CHUNK_BYTES]
