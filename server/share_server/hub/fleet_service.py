"""The Fleet service: leases out, nodes known."""

from __future__ import annotations

import secrets
from typing import Any

from grpc import aio

from share_core.errors import RequestError
from share_core.names import split_task_id
from share_proto.v1 import fleet_pb2, fleet_pb2_grpc
from share_server.config import ServerConfig
from share_server.hub import convert, log
from share_server.hub.access import CALLER
from share_server.hub.clock import now_ms
from share_server.hub.feed import Feed
from share_server.hub.leases import LeaseBook
from share_server.store.members import bind_node, find_node, list_nodes
from share_server.store.store import Store

Context = aio.ServicerContext[Any, Any]


class FleetService(fleet_pb2_grpc.FleetServicer):
    """See ``fleet.proto`` for what each method promises."""

    def __init__(self, store: Store, config: ServerConfig, space_id: str, feed: Feed) -> None:
        self._store = store
        self._config = config
        self._space_id = space_id
        self._feed = feed
        self._book = LeaseBook(config.lease)

    async def Dispatch(self, request: fleet_pb2.DispatchRequest, context: Context) -> fleet_pb2.DispatchResponse:
        """Take outcomes, give leases."""
        now = now_ms()
        for outcome in request.outcomes:
            if self._book.settle(outcome.lease_id, outcome.error_code, now):
                log.info("lease ended by Flower", lease_id=outcome.lease_id, code=outcome.error_code)
        if self._feed.closing:
            return fleet_pb2.DispatchResponse()
        nodes = await self._store.do(list_nodes)
        members = {row.node_id: row.member for row in nodes if row.node_id and not row.revoked}
        granted = self._book.grant(
            request.online_node_ids, members, context.peer(), now, iter(lambda: secrets.token_hex(16), "")
        )
        for lease in granted:
            log.info("lease granted", lease_id=lease.lease_id, member=lease.member)
        return fleet_pb2.DispatchResponse(
            leases=[
                fleet_pb2.Lease(
                    lease_id=lease.lease_id,
                    node_id=lease.node_id,
                    space_id=self._space_id,
                    hub_address=self._config.hub_address,
                    deadline_unix_ms=lease.deadline_ms,
                    max_updates=self._config.lease.max_updates,
                )
                for lease in granted
            ]
        )

    async def CloseLease(self, request: fleet_pb2.CloseLeaseRequest, context: Context) -> fleet_pb2.CloseLeaseResponse:
        """End a lease at its node's word."""
        member = CALLER.get().member
        if self._book.close(request.lease_id, member, request.idle, now_ms()):
            log.info(
                "lease closed",
                lease_id=request.lease_id,
                member=member,
                idle=request.idle,
                submitted=request.submitted,
            )
        return fleet_pb2.CloseLeaseResponse()

    async def ListNodes(self, request: fleet_pb2.ListNodesRequest, context: Context) -> fleet_pb2.ListNodesResponse:
        """Every enrolled node."""
        rows = await self._store.do(list_nodes)
        return fleet_pb2.ListNodesResponse(nodes=[convert.node(row) for row in rows])

    async def BindNode(self, request: fleet_pb2.BindNodeRequest, context: Context) -> fleet_pb2.BindNodeResponse:
        """Record Flower's id of a node."""
        split_task_id(request.member)
        await self._store.do(lambda journal: bind_node(journal, request.member, request.node_id))
        log.info("node bound", member=request.member, node_id=request.node_id)
        return fleet_pb2.BindNodeResponse()

    async def GetNode(self, request: fleet_pb2.GetNodeRequest, context: Context) -> fleet_pb2.GetNodeResponse:
        """Return the caller's own node."""
        member = CALLER.get().member
        row = await self._store.do(lambda journal: find_node(journal, member))
        if row is None:
            raise RequestError(f"member {member} enrolled without a node key: it has no Flower node")
        return fleet_pb2.GetNodeResponse(node=convert.node(row))
