"""Leases: who may work now. In memory only: a lease paces work, it authorises nothing, and losing one costs a wait.

A node has at most one open lease. It ends when the node closes it, when Flower tells what became of it, when the node
was offline meanwhile, or at its deadline plus a grace. A new connection of the dispatcher means that the run that
carried the older leases may be gone; they stop counting then, and a node that still works on one just finds the next
one queued.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from share_core.errors import AccessError
from share_server.config import LeaseConfig

_AFTER_ERROR_S = 5.0
"""Pause after Flower reported an error, so that a failing node is not asked in a tight loop."""


@dataclass(frozen=True)
class OpenLease:
    """A lease that was handed out."""

    lease_id: str
    """32 hexadecimal digits."""
    node_id: int
    """Flower's id of the node."""
    member: str
    """The node's member."""
    deadline_ms: int
    """The node takes no new work after it, milliseconds since 1970."""
    carrier: str
    """Connection of the dispatcher that took it."""


class LeaseBook:
    """Open leases and pauses. The clock and fresh ids are passed in."""

    def __init__(self, config: LeaseConfig) -> None:
        self._config = config
        self._by_node: dict[int, OpenLease] = {}
        self._pause_until_ms: dict[int, int] = {}
        self._absent: set[int] = set()

    @property
    def open(self) -> tuple[OpenLease, ...]:
        """Every open lease."""
        return tuple(self._by_node.values())

    def grant(
        self, online: Iterable[int], members: Mapping[int, str], carrier: str, now_ms: int, fresh_ids: Iterable[str]
    ) -> list[OpenLease]:
        """Return new leases for online nodes that are enrolled, have none, and are not pausing.

        Args:
            online: node ids that Flower sees.
            members: enrolled members by node id; others get nothing.
            carrier: connection of the dispatcher.
            now_ms: milliseconds since 1970.
            fresh_ids: an endless supply of unused lease ids.
        """
        present = set(online)
        self._expire(present, carrier, now_ms)
        ids = iter(fresh_ids)
        granted: list[OpenLease] = []
        for node_id in sorted(present & set(members)):
            if node_id in self._by_node or self._pause_until_ms.get(node_id, 0) > now_ms:
                continue
            deadline = now_ms + int(self._config.minutes * 60_000)
            lease = OpenLease(next(ids), node_id, members[node_id], deadline, carrier)
            self._by_node[node_id] = lease
            granted.append(lease)
        return granted

    def close(self, lease_id: str, member: str, idle: bool, now_ms: int) -> bool:
        """End a lease at its node's word; return whether it was open.

        Raises:
            AccessError: it is another member's lease.
        """
        lease = self._find(lease_id)
        if lease is None:
            return False
        if lease.member != member:
            raise AccessError(f"lease {lease_id} is not a lease of {member}")
        del self._by_node[lease.node_id]
        if idle:
            self._pause_until_ms[lease.node_id] = now_ms + int(self._config.idle_retry_s * 1000)
        return True

    def settle(self, lease_id: str, error_code: int, now_ms: int) -> bool:
        """End a lease because Flower told its outcome; return whether it was still open."""
        lease = self._find(lease_id)
        if lease is None:
            return False
        del self._by_node[lease.node_id]
        if error_code:
            self._pause_until_ms[lease.node_id] = now_ms + int(_AFTER_ERROR_S * 1000)
        return True

    def _expire(self, present: set[int], carrier: str, now_ms: int) -> None:
        grace_ms = int(self._config.grace_s * 1000)
        for node_id, lease in list(self._by_node.items()):
            if node_id not in present:
                self._absent.add(node_id)
            returned = node_id in present and node_id in self._absent
            if returned or lease.carrier != carrier or now_ms > lease.deadline_ms + grace_ms:
                del self._by_node[node_id]
        self._absent -= present
        self._absent &= set(self._by_node)

    def _find(self, lease_id: str) -> OpenLease | None:
        return next((lease for lease in self._by_node.values() if lease.lease_id == lease_id), None)
