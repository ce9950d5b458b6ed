"""A lease as it travels in a Flower message: a handful of scalars, no tensors, in both directions.

The server side writes it, the client side reads it; this module is the only thing they share about it. Node ids are
64-bit unsigned and travel as text, because a plain integer on that road is signed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from share_core.errors import RequestError

MESSAGE_ACTION = "lease"
"""The ClientApp registers its handler under it: ``@app.train(MESSAGE_ACTION)``."""

MESSAGE_TYPE = f"train.{MESSAGE_ACTION}"
"""Type of the Flower message that carries a lease."""

LEASE_RECORD = "lease"
"""Name of the record in the message."""

REPORT_RECORD = "report"
"""Name of the record in the reply."""

Scalar = str | int
"""What a record of ours may hold."""


@dataclass(frozen=True)
class Lease:
    """A bounded right to train and submit."""

    lease_id: str
    """32 lower-case hexadecimal digits."""
    node_id: int
    """Flower's id of the node it was made for."""
    space_id: str
    """The space to train in."""
    hub_address: str
    """``host:port`` of the Hub service."""
    deadline_unix_ms: int
    """The node takes no new work after this time, in milliseconds since 1970."""
    max_updates: int
    """The node ends the lease after this many submissions; 0 means no limit."""

    def to_record(self) -> dict[str, Scalar]:
        """Return the scalars of the message."""
        return {
            "lease_id": self.lease_id,
            "node_id": str(self.node_id),
            "space_id": self.space_id,
            "hub_address": self.hub_address,
            "deadline_unix_ms": self.deadline_unix_ms,
            "max_updates": self.max_updates,
        }


@dataclass(frozen=True)
class LeaseReport:
    """What the node tells when it ends a lease. A hint: ``Fleet.CloseLease`` at the hub decides."""

    lease_id: str
    """The lease that ended."""
    submitted: int
    """Updates sent under it."""
    idle: bool
    """True when nothing was left to do."""
    reason: str = ""
    """Why it ended early, for people; empty if it did not."""

    def to_record(self) -> dict[str, Scalar]:
        """Return the scalars of the reply."""
        return {
            "lease_id": self.lease_id,
            "submitted": self.submitted,
            "idle": int(self.idle),
            "reason": self.reason,
        }


def lease_from_record(record: Mapping[str, object]) -> Lease:
    """Read a lease out of a message.

    Raises:
        RequestError: a scalar is missing or of another type.
    """
    node_id = _text(record, "node_id")
    if not node_id.isascii() or not node_id.isdigit():
        raise RequestError(f"lease: node_id must be decimal digits, got {node_id[:80]!r}")
    return Lease(
        lease_id=_text(record, "lease_id"),
        node_id=int(node_id),
        space_id=_text(record, "space_id"),
        hub_address=_text(record, "hub_address"),
        deadline_unix_ms=_whole(record, "deadline_unix_ms"),
        max_updates=_whole(record, "max_updates"),
    )


def report_from_record(record: Mapping[str, object]) -> LeaseReport:
    """Read a report out of a reply.

    Raises:
        RequestError: a scalar is missing or of another type.
    """
    return LeaseReport(
        lease_id=_text(record, "lease_id"),
        submitted=_whole(record, "submitted"),
        idle=bool(_whole(record, "idle")),
        reason=_text(record, "reason"),
    )


def _text(record: Mapping[str, object], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise RequestError(f"lease: {name} must be text, got {type(value).__name__}")
    return value


def _whole(record: Mapping[str, object], name: str) -> int:
    value = record.get(name)
    if not isinstance(value, int) or value < 0:
        raise RequestError(f"lease: {name} must be a whole number, zero or more, got {str(value)[:80]!r}")
    return int(value)
