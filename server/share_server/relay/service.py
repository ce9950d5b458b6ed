"""What a relay answers: the space, the versions, its health, and the roster for further relays. Nothing else.

Every caller passes the hub's own rules, with the hub's roster as it was seconds ago. With a roster older than a minute
nobody is served: somebody may have been shut out meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc import aio

from share_core.errors import RebaseError, UnavailableError, VersionError
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.hub.access import CALLER, Caller, Gate, Roster
from share_server.hub.streams import SMALL_CHAIN_BYTES, Newest, Streams
from share_server.relay.home import RelayState
from share_server.relay.replica import Replica
from share_server.relay.upstream import ROSTER_AGE_KEY, Upstream

Context = aio.ServicerContext[Any, Any]

_SERVED = frozenset({"DescribeSpace", "FollowVersions", "FetchSnapshot", "GetRoster"})

NOT_SERVED = tuple(
    method.name for method in hub_pb2.DESCRIPTOR.services_by_name["Hub"].methods if method.name not in _SERVED
)
"""Methods of the hub that a relay answers with UNIMPLEMENTED and one sentence."""


class RelayGate(Gate):
    """The hub's rules, and nobody at all while the roster is old."""

    def __init__(self, roster: Roster, upstream: Upstream) -> None:
        super().__init__(roster)
        self._upstream = upstream

    def recheck(self, caller: Caller) -> None:
        """Check a caller now.

        Raises:
            UnavailableError: the roster is too old. Otherwise as the hub's gate.
        """
        if not self._upstream.fresh:
            raise UnavailableError(
                "this relay has not heard from the hub for too long to know whom it may serve: use the hub, or try "
                "again later"
            )
        super().recheck(caller)


class RelaySource:
    """A :class:`share_server.hub.streams.Source` over what a relay holds."""

    def __init__(self, state: RelayState, replica: Replica, upstream: Upstream) -> None:
        self._state = state
        self._replica = replica
        self._upstream = upstream
        self.subscribers = 0
        """Open FollowVersions streams."""

    @property
    def space_id(self) -> str:
        """The space that the versions belong to."""
        return self._state.space_id

    @property
    def version(self) -> int:
        """The newest version held."""
        return self._replica.head

    @property
    def closing(self) -> bool:
        """Whether the relay is about to stop."""
        return self._replica.closing

    async def newest(self) -> Newest | None:
        """Return the hub's own statement, unchanged."""
        return self._upstream.newest

    async def wait_after(self, version: int, timeout_s: float) -> None:
        """Return when a version after ``version`` is held, when the relay stops, or after ``timeout_s``."""
        await self._replica.wait_after(version, timeout_s)

    async def whole_is_better(self, position: int) -> bool:
        """Return whether a reader at ``position`` is better served by the whole version held here.

        That one need not be the newest, but it is after ``position``: the steps from it lead on to the newest.

        Raises:
            UnavailableError: only a whole version could help, and there is none.
        """
        if position < self._replica.base:
            return (await self._upstream.ensure_whole()).version > position
        size = self._replica.chain_bytes(position)
        if size <= SMALL_CHAIN_BYTES:
            return False
        try:
            whole = await self._upstream.ensure_whole()
        except UnavailableError:
            return False  # the steps are all here
        return whole.version > position and (position < self._replica.base or size > whole.payload_size)

    async def step(self, version: int) -> tuple[hub_pb2.DeltaHeader, bytes]:
        """Return header and payload of the step to ``version``; raises RebaseError if it is no longer held."""
        return await self._replica.step(version)

    async def whole(self, version: int) -> tuple[hub_pb2.SnapshotHeader, bytes]:
        """Return header and payload of the whole version held.

        Raises:
            VersionError, RebaseError: another one was asked for. UnavailableError: there is none yet.
        """
        if version > self._replica.head or self._replica.head == 0:
            raise VersionError(f"version {version} is not known here: the newest is {self._replica.head}")
        held = await self._upstream.ensure_whole()
        if version not in (0, held.version):
            raise RebaseError(
                f"this relay holds version {held.version} whole and no other: fetch that one, or ask the hub at "
                f"{self._state.hub_address}"
            )
        return await self._replica.whole_payload()


class RelayService(hub_pb2_grpc.HubServicer):
    """See ``hub.proto`` for what each method promises."""

    def __init__(self, state: RelayState, replica: Replica, upstream: Upstream, streams: Streams) -> None:
        self._state = state
        self._replica = replica
        self._upstream = upstream
        self._streams = streams
        for name in NOT_SERVED:
            setattr(self, name, self._not_served(name))

    async def DescribeSpace(
        self, request: hub_pb2.DescribeSpaceRequest, context: Context
    ) -> hub_pb2.DescribeSpaceResponse:
        """What the hub said, with the version this relay holds."""
        answer = hub_pb2.DescribeSpaceResponse()
        assert self._upstream.description is not None, "the gate lets nobody in before"
        answer.CopyFrom(self._upstream.description)
        answer.version = self._replica.head
        return answer

    async def GetRoster(self, request: hub_pb2.GetRosterRequest, context: Context) -> hub_pb2.GetRosterResponse:
        """The hub's roster, and how old it is."""
        age = (ROSTER_AGE_KEY, str(int(self._upstream.roster_age_s * 1000)))
        await context.send_initial_metadata((age,))
        return hub_pb2.GetRosterResponse(members=self._upstream.roster_members)

    def FollowVersions(
        self, request: hub_pb2.FollowVersionsRequest, context: Context
    ) -> AsyncIterator[hub_pb2.FollowVersionsResponse]:
        """Every version after the caller's that is held here, then new ones as they come."""
        return self._streams.follow(CALLER.get(), request)

    def FetchSnapshot(
        self, request: hub_pb2.FetchSnapshotRequest, context: Context
    ) -> AsyncIterator[hub_pb2.FetchSnapshotResponse]:
        """The whole version that is held, or one just fetched."""
        return self._streams.fetch(CALLER.get(), request)

    def _not_served(self, name: str) -> Callable[[Any, Context], Any]:
        async def answer(request: Any, context: Context) -> None:
            await context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                f"this is a relay and serves versions only: call {name} at the hub, {self._state.hub_address}",
            )

        return answer
