"""Leases: one open lease per node, pauses, and every way a lease ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import grpc
import pytest

from share_core import identity as ids
from share_core.errors import AccessError
from share_proto.v1 import fleet_pb2, fleet_pb2_grpc
from share_server.config import LeaseConfig
from share_server.hub.leases import LeaseBook, OpenLease
from share_server.local import LocalHub
from share_server.operator import named_error

MEMBERS = {1: "acme/alice", 2: "rival/bob"}
CONFIG = LeaseConfig(minutes=1.0, idle_retry_s=10.0, grace_s=5.0)


class _Dispatcher:
    """A book with a clock that the test moves."""

    def __init__(self) -> None:
        self.book = LeaseBook(CONFIG)
        self.now_ms = 1_000_000
        self._ids: Iterator[str] = (f"{number:032x}" for number in itertools.count(1))

    def ask(self, *online: int, carrier: str = "first") -> list[OpenLease]:
        return self.book.grant(online, MEMBERS, carrier, self.now_ms, self._ids)

    def nodes(self, *online: int, carrier: str = "first") -> list[int]:
        return [lease.node_id for lease in self.ask(*online, carrier=carrier)]


def test_every_enrolled_online_node_gets_one_lease() -> None:
    d = _Dispatcher()
    leases = d.ask(1, 2, 99)
    assert [(lease.node_id, lease.member) for lease in leases] == [(1, "acme/alice"), (2, "rival/bob")]
    assert {lease.deadline_ms for lease in leases} == {d.now_ms + 60_000}
    assert d.nodes(1, 2, 99) == []


def test_a_busy_node_gets_the_next_lease_at_once_and_an_idle_one_after_a_pause() -> None:
    d = _Dispatcher()
    busy, idle = d.ask(1, 2)
    assert d.book.close(busy.lease_id, "acme/alice", False, d.now_ms)
    assert d.book.close(idle.lease_id, "rival/bob", True, d.now_ms)
    assert d.nodes(1, 2) == [1]
    d.now_ms += 9_999
    assert d.nodes(1, 2) == []
    d.now_ms += 2
    assert d.nodes(1, 2) == [2]


def test_nobody_closes_a_lease_of_another_member() -> None:
    d = _Dispatcher()
    (lease,) = d.ask(1)
    with pytest.raises(AccessError):
        d.book.close(lease.lease_id, "rival/bob", True, d.now_ms)
    assert d.book.open == (lease,)
    assert not d.book.close("0" * 32, "rival/bob", True, d.now_ms)


def test_a_lost_lease_ends_with_its_outcome_or_after_deadline_and_grace() -> None:
    d = _Dispatcher()
    first, second = d.ask(1, 2)
    assert d.book.settle(first.lease_id, 0, d.now_ms)
    assert not d.book.settle(first.lease_id, 0, d.now_ms)
    assert d.nodes(1, 2) == [1]
    d.now_ms = second.deadline_ms + 4_999
    assert d.nodes(2) == []
    d.now_ms += 2
    assert d.nodes(2) == [2]


def test_a_failing_node_is_not_asked_in_a_tight_loop() -> None:
    d = _Dispatcher()
    (lease,) = d.ask(1)
    d.book.settle(lease.lease_id, 5, d.now_ms)
    assert d.nodes(1) == []
    d.now_ms += 5_001
    assert d.nodes(1) == [1]


def test_a_node_that_was_away_gets_a_fresh_lease() -> None:
    d = _Dispatcher()
    assert d.nodes(1) == [1]
    assert d.nodes() == []
    assert d.nodes(1) == [1]
    assert d.nodes(1) == []


def test_leases_of_an_earlier_run_do_not_keep_nodes_waiting() -> None:
    d = _Dispatcher()
    assert d.nodes(1, carrier="first") == [1]
    assert d.nodes(1, carrier="second") == [1]
    assert d.nodes(1, carrier="second") == []


def test_leases_over_the_wire(shared_hub: LocalHub) -> None:
    alice = shared_hub.enrol("acme/alice", node_key=ids.public_key_pem(ids.new_private_key_pem()))
    bob = shared_hub.enrol("rival/bob", node_key=ids.public_key_pem(ids.new_private_key_pem()))
    wide = 2**64 - 3
    with (
        shared_hub.channel(shared_hub.own("fleet")) as server_side,
        shared_hub.channel(alice) as alice_side,
        shared_hub.channel(bob) as bob_side,
    ):
        fleet = fleet_pb2_grpc.FleetStub(server_side)
        online = fleet_pb2.DispatchRequest(online_node_ids=[wide])
        assert not fleet.Dispatch(online, timeout=30).leases, "an unbound node gets nothing"
        fleet.BindNode(fleet_pb2.BindNodeRequest(member="acme/alice", node_id=wide), timeout=30)
        (lease,) = fleet.Dispatch(online, timeout=30).leases
        assert (lease.node_id, lease.space_id) == (wide, shared_hub.spec.space_id)
        assert lease.hub_address == shared_hub.config.hub_address
        close = fleet_pb2.CloseLeaseRequest(lease_id=lease.lease_id, submitted=1)
        with pytest.raises(grpc.RpcError) as caught:
            fleet_pb2_grpc.FleetStub(bob_side).CloseLease(close, timeout=30)
        assert isinstance(named_error(caught.value, "hub"), AccessError)
        assert not fleet.Dispatch(online, timeout=30).leases
        fleet_pb2_grpc.FleetStub(alice_side).CloseLease(close, timeout=30)
        assert len(fleet.Dispatch(online, timeout=30).leases) == 1
        nodes = {node.member: node.node_id for node in fleet.ListNodes(fleet_pb2.ListNodesRequest(), timeout=30).nodes}
        assert nodes == {"acme/alice": wide, "rival/bob": 0}
