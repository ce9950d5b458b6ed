"""Rows of the journal as frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from share_core.identity import SignedManifest, UpdateStatement

if TYPE_CHECKING:  # the gateway, which reads rows of nodes, does without PyTorch
    from share_core.ledger import TaskLedger


class UpdateState(Enum):
    """The life of an update."""

    ACCEPTED = "ACCEPTED"
    """Durable, waiting to be merged."""
    MERGED = "MERGED"
    """Part of a committed version."""
    REFUSED = "REFUSED"
    """Durable, but it could not be merged."""
    QUARANTINED = "QUARANTINED"
    """Durable, set aside until the operator decides."""
    FORGOTTEN = "FORGOTTEN"
    """Taken out again with everything that it did; its payload is gone."""


@dataclass(frozen=True)
class Sharing:
    """Who beside the owner's organisation may contribute to a task."""

    open: bool = False
    """Everybody."""
    organisations: tuple[str, ...] = ()
    """These."""

    def allows(self, organisation: str) -> bool:
        """Return whether ``organisation`` may contribute."""
        return self.open or organisation in self.organisations

    @property
    def shared(self) -> bool:
        """Whether anybody beside the owner may contribute."""
        return self.open or bool(self.organisations)


PRIVATE = Sharing()
"""A task of one organisation."""


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
    sharing: Sharing = PRIVATE
    """Who may contribute to the task that it creates."""
    schema_sha256: str = ""
    """Digest of the task's label schema; empty if it is not told."""
    signer: str = ""
    """SHA-256 of the PEM of the public key it is signed with; empty for updates of format 2 and before."""
    sequence: int = 0
    """The signer's own count of what it has signed, from 1; 0 for updates of format 2 and before."""
    signature: bytes = b""
    """The signer's signature; empty for updates of format 2 and before."""
    privacy: str = ""
    """What it declares of noise and clipping, as canonical JSON; empty if nothing."""

    @property
    def organisation(self) -> str:
        """The organisation that answers for it."""
        return self.member.split("/", 1)[0]

    def statement(self, space_id: str) -> UpdateStatement:
        """Return what its signature is over; for an update of this space that is signed."""
        return UpdateStatement(
            space_id=space_id,
            task_id=self.task_id,
            update_id=self.update_id,
            member=self.member,
            sequence=self.sequence,
            payload_sha256=self.sha256,
            payload_size=self.size,
            create=self.create,
            open=self.sharing.open,
            organisations=self.sharing.organisations,
            schema_sha256=self.schema_sha256,
            rows=self.rows,
            lease_id=self.lease_id,
            privacy=self.privacy,
        )


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
    original_sha256: str | None = None
    """Its ambient factors, where the bases it was expressed in are no longer kept."""
    original_size: int = 0
    """Bytes of that payload, or 0."""
    released: bool = False
    """Whether the operator let it out of quarantine: filters do not hold it again."""


@dataclass(frozen=True)
class VersionRow:
    """One committed version."""

    version: int
    """Number, from 1."""
    updates: tuple[str, ...]
    """Ids of the updates it merged, in ingest order, without forgotten ones; none for a version that was rebuilt."""
    delta_sha256: str
    """Payload of the step from the version before; empty for a version that is only published whole."""
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
    policy: str
    """The merge policy in force, as JSON: what a replay needs. Empty for versions of format 1."""
    manifest: SignedManifest
    """What the hub says of it; empty bytes for versions of format 1."""
    collected: bool = False
    """Whether its payloads were removed by the retention policy."""


@dataclass(frozen=True)
class TaskRow:
    """One task."""

    task_id: str
    """``organisation/name``."""
    owner: str
    """Member that created it."""
    sharing: Sharing
    """Who beside the owner's organisation may contribute."""
    schema_sha256: str
    """Digest of its label schema, or empty."""
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
    hosts: tuple[str, ...] = ()
    """Names and addresses under which a relay may serve; empty for every other role."""


@dataclass(frozen=True)
class CertificateRow:
    """One certificate that was issued."""

    number: int
    """Place among all certificates."""
    key_sha256: str
    """SHA-256 of the PEM of its public key."""
    member: str
    """``organisation/name``."""
    certificate: bytes
    """PEM."""


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
    key_sha256: str
    """SHA-256 of the PEM of the public key in its member's certificate."""


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
    down_heads: int = 0
    """Down: shared heads."""


@dataclass(frozen=True)
class Merging:
    """One update in a merge."""

    update_id: str
    """The update."""
    task_id: str
    """Its task."""
    relative_error: float
    """Error that the merge left on it."""


@dataclass(frozen=True)
class VersionCommit:
    """Everything one merge changes, to be written in one transaction."""

    row: VersionRow
    """The new version; its payloads are durable already."""
    merged: Sequence[Merging]
    """The updates it merged, in ingest order."""
    ledgers: Mapping[str, TaskLedger]
    """Ledgers that this merge changed, by task id."""
