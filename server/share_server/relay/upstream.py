"""The upstream side of a relay: follow versions, fetch whole ones, and ask whom may be served."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from share_core.durable import write_atomic
from share_core.errors import (
    DigestError,
    FedshareError,
    SpaceMismatchError,
    StorageError,
    UnavailableError,
    VersionError,
)
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.hub import log
from share_server.hub.access import Roster
from share_server.hub.streams import Newest
from share_server.operator import CHANNEL_OPTIONS, named_error
from share_server.relay.home import RelayHome, RelayState
from share_server.relay.replica import Replica
from share_server.relay.verify import Checker, check_payload
from share_server.store.records import MemberRow

ROSTER_AGE_KEY = "share-roster-age-ms"
"""Initial metadata of a relay's GetRoster: how old its roster is, so that ages add up along a chain of relays."""

_CALL_S = 10.0
_STREAM_S = 600.0
_FETCH_EVERY_S = 5.0
_AHEAD_S = 10.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 15.0
_LOOK_S = 1.0

_OPTIONS: list[tuple[str, int | str]] = [
    *CHANNEL_OPTIONS,
    ("grpc.keepalive_time_ms", 30_000),  # a network that swallows everything is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(frozen=True)
class Pace:
    """How often upstream is asked, in seconds."""

    roster_every_s: float = 12.0
    """Time between two questions for the roster."""
    roster_oldest_s: float = 48.0
    """With an older roster nobody is served: somebody in it may have been shut out meanwhile. Together with the time
    between two looks at open calls it is less than the minute in which a revocation must bite everywhere."""


class Upstream:
    """The connection of one relay. :meth:`run` it as a task; it ends only by being cancelled."""

    def __init__(self, home: RelayHome, state: RelayState, replica: Replica, roster: Roster, pace: Pace) -> None:
        self._home = home
        self._state = state
        self._replica = replica
        self._roster = roster
        self._pace = pace
        self._roster_at = float("-inf")
        self._checker: Checker | None = None
        self._ready = asyncio.Event()
        self._fetching = asyncio.Lock()
        self._next_fetch = 0.0
        self._following = False
        self._refreshing: asyncio.Task[hub_pb2.SnapshotHeader] | None = None
        self._stub: Any = None
        self.description: hub_pb2.DescribeSpaceResponse | None = None
        """What upstream last said about the space, or what was on the disk."""
        self.newest: Newest | None = None
        """The hub's last statement of its newest version, verified: passed on as it is."""
        self.roster_members: list[hub_pb2.RosterMember] = []
        """The roster as it travels."""

    @property
    def roster_age_s(self) -> float:
        """Seconds since the hub gave the roster; infinite before the first one."""
        return time.monotonic() - self._roster_at

    @property
    def fresh(self) -> bool:
        """Whether the roster is young enough, and the space known, to serve anybody."""
        return self.description is not None and self.roster_age_s <= self._pace.roster_oldest_s

    async def run(self) -> None:
        """Follow and ask until cancelled; over a new connection once our certificate was replaced."""
        caller, channel = self._connect()
        try:
            await self._from_disk()
            while True:
                async with asyncio.TaskGroup() as group:
                    working = [group.create_task(work) for work in (self._keep_asking(), self._keep_following())]
                    await self._until_replaced(caller)
                    async with self._fetching:  # what is being fetched comes over the old one
                        before = channel
                        caller, channel = self._connect()
                    for task in working:
                        task.cancel()
                await before.close()
        finally:
            await channel.close()

    def _connect(self) -> tuple[bytes, aio.Channel]:
        """Open a connection for all calls from now on; return our certificate and it."""
        caller = self._home.caller.read_bytes()
        credentials = grpc.ssl_channel_credentials(
            self._home.authority.read_bytes(), self._home.key.read_bytes(), caller
        )
        channel = aio.secure_channel(self._state.upstream, credentials, _OPTIONS)
        self._stub = hub_pb2_grpc.HubStub(channel)
        return caller, channel

    async def _until_replaced(self, caller: bytes) -> None:
        """Return when the file of our certificate holds another one than ``caller``."""
        while True:
            await asyncio.sleep(_LOOK_S)
            with contextlib.suppress(OSError):
                if self._home.caller.read_bytes() != caller:
                    return

    async def ensure_whole(self) -> hub_pb2.SnapshotHeader:
        """Return the header of the whole version held, after fetching a newer one if that is worth it.

        Many who ask at the same time cause one fetch.

        Raises:
            UnavailableError: none is held and upstream gives none.
        """
        async with self._fetching:
            whole = self._replica.whole
            worth = whole is None or self._replica.whole_is_stale()
            if worth and time.monotonic() >= self._next_fetch:
                try:
                    await self._fetch_whole(whole.version if whole is not None else 0)
                except (grpc.RpcError, FedshareError) as error:
                    log.warning("no whole version from upstream", reason=str(_reason(error, self._state.upstream)))
                finally:  # not before: those who waited for a slow failure must not begin the next one
                    self._next_fetch = time.monotonic() + _FETCH_EVERY_S
        if self._replica.whole is None:
            raise UnavailableError("this relay holds no whole version yet: use the hub, or try again later")
        return self._replica.whole

    async def _from_disk(self) -> None:
        """Serve what an earlier life left, also when upstream is away."""
        if self._home.description.exists():
            try:
                description = hub_pb2.DescribeSpaceResponse.FromString(self._home.description.read_bytes())
                await self._take_description(description)
            except (DecodeError, FedshareError, OSError) as error:  # a torn file: upstream is asked in a moment
                log.warning("description on disk cannot be used", reason=str(error))

    async def _keep_asking(self) -> None:
        while True:
            asked = time.monotonic()
            try:
                await self._ask_roster(asked)
                await self._take_description(
                    await self._stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=_CALL_S)
                )
            except (grpc.RpcError, FedshareError) as error:
                log.warning(
                    "upstream does not answer",
                    upstream=self._state.upstream,
                    reason=str(_reason(error, self._state.upstream)),
                    roster_age_s=round(min(self.roster_age_s, 1e9), 1),
                )
            # Asked again soon while there is nothing to serve with, so that a start does not cost a whole period.
            await asyncio.sleep(self._pace.roster_every_s if self.fresh else min(1.0, self._pace.roster_every_s))

    async def _ask_roster(self, asked: float) -> None:
        """Take over the roster. It is as old as the question, plus what a relay in between says of its own."""
        call = self._stub.GetRoster(hub_pb2.GetRosterRequest(), timeout=_CALL_S)
        answer = await call
        told = dict(await call.initial_metadata()).get(ROSTER_AGE_KEY, "0")
        age_s = int(told) / 1000 if str(told).isdecimal() else float("inf")
        self._roster.replace(
            [MemberRow(one.member, one.role, one.key_sha256, b"", one.revoked) for one in answer.members]
        )
        self.roster_members = list(answer.members)
        self._roster_at = asked - age_s

    async def _take_description(self, description: hub_pb2.DescribeSpaceResponse) -> None:
        """Check and keep what upstream says about the space; the first time, load what is on the disk."""
        if description.space_id != self._state.space_id:
            raise SpaceMismatchError(
                f"{self._state.upstream} serves space {description.space_id[:80]!r}, this relay is enrolled for "
                f"{self._state.space_id}"
            )
        before = self.description
        signer = description.signer_certificate_pem
        if self._checker is None or before is None or before.signer_certificate_pem != signer:
            checker = Checker(self._home.authority.read_bytes(), signer, self._state.space_id)
            if self._checker is None:
                await _on_disk(self._replica.load(checker))
            self._checker = checker
        self.description = description
        if before is None or _without_version(before) != _without_version(description):
            data = description.SerializeToString()
            await _on_disk(asyncio.to_thread(write_atomic, self._home.description, data))
        self._ready.set()

    async def _keep_following(self) -> None:
        await self._ready.wait()
        wait = _FIRST_WAIT_S
        while True:
            head = self._replica.head
            try:
                await self._follow()
                reason: Exception = UnavailableError("upstream ended the stream")
            except (grpc.RpcError, FedshareError) as error:
                reason = _reason(error, self._state.upstream)
            if self._replica.head > head:
                wait = _FIRST_WAIT_S
            log.warning("not following", upstream=self._state.upstream, reason=str(reason), again_in_s=round(wait, 1))
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(_LONGEST_WAIT_S, wait * 2)

    async def _follow(self) -> None:
        """Follow until the stream ends or something does not hold."""
        while await self._follow_once():
            async with self._fetching:
                await self._fetch_whole(self._replica.head)

    async def _follow_once(self) -> bool:
        """Take steps until the stream ends; return whether it ends with the demand to fetch a whole version."""
        request = hub_pb2.FollowVersionsRequest(space_id=self._state.space_id, since_version=self._replica.head)
        stream = self._stub.FollowVersions(request)
        messages = aiter(stream)
        self._following = True
        try:
            async for message in messages:
                part = message.WhichOneof("part")
                if part == "snapshot_required":
                    return True
                if part == "heartbeat":
                    self.newest = (self._check().newest(message.heartbeat), message.heartbeat)
                    continue
                if part != "delta":
                    raise DigestError("upstream sent a chunk before its header")
                await self._take_step(message.delta, messages)
        finally:
            self._following = False
            stream.cancel()
        return False

    async def _take_step(
        self, header: hub_pb2.DeltaHeader, messages: AsyncIterator[hub_pb2.FollowVersionsResponse]
    ) -> None:
        link = self._check().step(header, self._replica.head, self._replica.link)
        payload = await _read_payload(header, messages, f"step to version {header.version}", header.data)
        await _on_disk(self._replica.append(header, payload, link))
        if self._replica.whole_is_stale() and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self.ensure_whole())
            self._refreshing.add_done_callback(_look_at)

    async def _fetch_whole(self, after: int) -> None:
        """Fetch the newest whole version and hold it if it is after ``after``; call it with ``_fetching`` held."""
        request = hub_pb2.FetchSnapshotRequest(space_id=self._state.space_id)
        stream = self._stub.FetchSnapshot(request, timeout=_STREAM_S)
        try:
            messages = aiter(stream)
            first = await anext(messages, None)
            if first is None or first.WhichOneof("part") != "header":
                raise DigestError("upstream sent a whole version without its header")
            header = first.header
            link = self._check().whole(header)
            if header.version <= after:
                raise VersionError(f"upstream has nothing whole after version {after}: its is {header.version}")
            payload = await _read_payload(header, messages, f"whole version {header.version}")
        finally:
            stream.cancel()
        if self._following and header.version > self._replica.head:
            # It is a moment ahead of the steps. Taken at once it would replace them, and all readers would need it.
            await self._replica.wait_after(header.version - 1, _AHEAD_S)
        await _on_disk(self._replica.put_whole(header, payload, link))
        log.info("whole version fetched", version=header.version, bytes=header.payload_size)

    def _check(self) -> Checker:
        assert self._checker is not None, "following begins when the signer is known"
        return self._checker


def _look_at(task: asyncio.Task[Any]) -> None:
    """A refresh that failed was written down; the next step tries again."""
    if not task.cancelled():
        task.exception()


async def _read_payload(
    header: hub_pb2.DeltaHeader | hub_pb2.SnapshotHeader,
    messages: AsyncIterator[hub_pb2.FollowVersionsResponse | hub_pb2.FetchSnapshotResponse],
    what: str,
    begin: bytes = b"",
) -> bytes:
    """Return the payload that a header announces, its ``begin`` from the header and the rest from the messages.

    Raises:
        UnavailableError: the stream ends before it is whole. DigestError: it is something else than was announced.
    """
    parts, size = [begin], len(begin)
    while size < header.payload_size:
        parts.append(_chunk(await anext(messages, None)))
        size += len(parts[-1])
    payload = b"".join(parts)
    check_payload(payload, header.payload_sha256, header.payload_size, what)
    return payload


def _chunk(message: hub_pb2.FollowVersionsResponse | hub_pb2.FetchSnapshotResponse | None) -> bytes:
    """Return the bytes of a message that must be a chunk with something in it."""
    if message is None:
        raise UnavailableError("upstream ended in the middle of a payload")
    if message.WhichOneof("part") != "chunk" or not message.chunk:
        raise DigestError("upstream sent something else in the middle of a payload")
    return message.chunk


async def _on_disk(writing: Awaitable[None]) -> None:
    """Wait for ``writing``; what the disk refuses becomes a StorageError, after which the relay tries again."""
    try:
        await writing
    except OSError as error:
        raise StorageError(f"the relay's disk refused: {error.strerror}") from error


def _reason(error: Exception, address: str) -> Exception:
    """Return what to write down about a failed call."""
    return named_error(error, address) if isinstance(error, grpc.RpcError) else error


def _without_version(description: hub_pb2.DescribeSpaceResponse) -> bytes:
    same = hub_pb2.DescribeSpaceResponse()
    same.CopyFrom(description)
    same.ClearField("version")
    return same.SerializeToString(deterministic=True)
