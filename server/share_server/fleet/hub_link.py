"""How the fleet's processes talk to the hub: gRPC with the fleet certificate."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from share_core.errors import UnavailableError
from share_proto.v1 import fleet_pb2, fleet_pb2_grpc
from share_server.config import ServerConfig
from share_server.layout import Layout
from share_server.operator import open_channel

CALL_SECONDS = 5.0
"""Longest wait for one call. The hub is on this machine."""

_GONE = -1
"""Stamp of a certificate that cannot be looked at: the connection there is stays in use."""

_TRANSIENT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
"""What a restarting or overloaded hub answers. Anything else means that we are wrong and retrying is no help."""


@dataclass(frozen=True)
class EnrolledNode:
    """One row of the hub's table of nodes."""

    member: str
    """``organisation/name``."""
    public_key: bytes
    """PEM of the key its SuperNode signs with."""
    node_id: int
    """Flower's id; 0 until it has one."""
    revoked: bool
    """True when the member is shut out."""
    key_sha256: str
    """SHA-256 of the PEM of the public key in the member's certificate."""


class HubLink:
    """A connection to the hub. Safe to use from several threads; ``close`` when done.

    When the hub has renewed our certificate, the next call opens a connection with the new one. Every method raises
    UnavailableError when the hub cannot be reached or asks to come again.
    """

    def __init__(self, layout: Layout, config: ServerConfig) -> None:
        self._layout = layout
        self._config = config
        self._lock = threading.Lock()
        self._channel, self._opened_with = open_channel(layout, config, "fleet"), self._stamp()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _current(self) -> grpc.Channel:
        """Return the connection, a new one if the certificate has changed since it was opened.

        The old one is let go, not closed: another thread may be waiting for an answer on it.
        """
        with self._lock:
            if (stamp := self._stamp()) not in (self._opened_with, _GONE):
                self._channel, self._opened_with = open_channel(self._layout, self._config, "fleet"), stamp
            return self._channel

    def _stamp(self) -> int:
        try:
            return self._layout.certificate("fleet").stat().st_mtime_ns
        except OSError:
            return _GONE

    @property
    def _fleet(self) -> fleet_pb2_grpc.FleetStub:
        return fleet_pb2_grpc.FleetStub(self._current())

    def serving(self) -> bool:
        """Return whether the hub says that it serves. Raises nothing."""
        try:
            health = health_pb2_grpc.HealthStub(self._current())
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def list_nodes(self) -> list[EnrolledNode]:
        """Return every enrolled node."""
        try:
            answer = self._fleet.ListNodes(fleet_pb2.ListNodesRequest(), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise _unavailable("ListNodes", error) from error
        return [EnrolledNode(n.member, n.public_key_pem, n.node_id, n.revoked, n.key_sha256) for n in answer.nodes]

    def bind_node(self, member: str, node_id: int) -> None:
        """Record Flower's id of a member's node."""
        try:
            self._fleet.BindNode(fleet_pb2.BindNodeRequest(member=member, node_id=node_id), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise _unavailable("BindNode", error) from error

    def dispatch(self, request: fleet_pb2.DispatchRequest) -> fleet_pb2.DispatchResponse:
        """Tell who is online and what became of leases; return the leases to hand out."""
        try:
            return self._fleet.Dispatch(request, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise _unavailable("Dispatch", error) from error


def _unavailable(method: str, error: grpc.RpcError) -> Exception:
    """Return what to raise: UnavailableError for what may pass, the error itself for what will not."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    if code not in _TRANSIENT:
        return error
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return UnavailableError(f"hub did not answer {method}: {code.name}: {details}")
