"""Rows of the journal as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from share_core.ledger import TaskLedger


class UpdateState(Enum):
    """The life of an update."""

    ACCEPTED = "ACCEPTED"
    """Durable, waiting to be merged."""
    MERGED = "MERGED"
    """Part of a committed version."""
    REFUSED = "REFUSED"
    """Durable, but it could not be merged."""


@dataclass(frozen=True)
class NewUpdate:
    """An update whose payload is durable and whose row is not yet."""

    update_id: str
    """32 hexadecimal digits, chosen by the client."""
    member: str
    """``organisation/name`` of the submitting certificate."""
    task_id: str
    """``organisation/name``."""
    create: bool
    """Whether the task may be created by this update."""
    base_version: int
    """Version in whose coordinates it is expressed."""
    sha256: str
    """Digest of the payload."""
    size: int
    """Bytes of the payload."""
    coefficients: int
    """Bytes of core factors."""
    directions: int
    """Bytes of residual factors."""
    heads: int
    """Bytes of shared heads."""
    envelope: int
    """The other bytes."""
    lease_id: str
    """Lease it was trained under, or empty."""
    rows: int
    """Declared training rows, or 0."""


@dataclass(frozen=True)
class UpdateRow:
    """An update in the journal."""

    new: NewUpdate
    """What was submitted."""
    ingest_seq: int
    """Place among all updates, from 1."""
    entry_hash: str
    """Hexadecimal hash of its journal entry."""
    state: UpdateState
    """How far it came."""
    reason: str
    """Why it was refused, else empty."""
    version: int
    """Version that holds it; 0 until merged."""
    received_ms: int
    """When it became durable, milliseconds since 1970."""
    relative_error: float
    """Error that its merge left on it."""


@dataclass(frozen=True)
class VersionRow:
    """One committed version."""

    version: int
    """Number, from 1."""
    update_id: str
    """The update it merged."""
    delta_sha256: str
    """Payload of the step from the version before."""
    delta_size: int
    """Bytes of that payload."""
    snapshot_sha256: str | None
    """Payload of the whole version, where one is kept."""
    snapshot_size: int
    """Bytes of that payload, or 0."""
    compacts: bool
    """Whether the step rotated any basis."""
    sizes: Mapping[str, tuple[int, int]]
    """(k_out, k_in) of every site in this version."""


@dataclass(frozen=True)
class TaskRow:
    """One task."""

    task_id: str
    """``organisation/name``."""
    owner: str
    """Member that created it."""
    created_version: int
    """First version that holds it; 0 while its first update waits."""
    updated_version: int
    """Last version that took an update of it."""
    updates: int
    """Merged updates."""


@dataclass(frozen=True)
class EvaluationRow:
    """One reported scalar."""

    task_id: str
    """The task."""
    version: int
    """The version it was measured at."""
    metric: str
    """Its name."""
    value: float
    """Its value."""
    rows: int
    """Rows measured on, or 0."""


@dataclass(frozen=True)
class MemberRow:
    """One enrolled member."""

    member: str
    """``organisation/name``."""
    role: str
    """Role in its certificate."""
    key_sha256: str
    """SHA-256 of the PEM of its public key: only certificates over this key are accepted."""
    certificate: bytes
    """Its newest certificate, PEM."""
    revoked: bool
    """Whether it is shut out."""


@dataclass(frozen=True)
class NodeRow:
    """The Flower node of one member."""

    member: str
    """``organisation/name``."""
    public_key: bytes
    """PEM of the key its SuperNode signs with."""
    node_id: int
    """Flower's id; 0 until registered."""
    revoked: bool
    """Whether its member is shut out."""


@dataclass(frozen=True)
class TrafficRow:
    """Payload bytes exchanged with one member."""

    member: str
    """``organisation/name``."""
    coefficients: int = 0
    """Up: core factors."""
    directions: int = 0
    """Up: residual factors."""
    heads: int = 0
    """Up: shared heads."""
    envelope: int = 0
    """Up: the rest."""
    updates: int = 0
    """Durable updates."""
    down_deltas: int = 0
    """Down: delta payloads."""
    down_snapshots: int = 0
    """Down: snapshot payloads."""


@dataclass(frozen=True)
class VersionCommit:
    """Everything one merge changes, to be written in one transaction."""

    row: VersionRow
    """The new version; its payloads are durable already."""
    task_id: str
    """The task it merged."""
    relative_error: float
    """Error left on the merged update."""
    ledgers: Mapping[str, TaskLedger]
    """Ledgers that this merge changed, by task id."""
