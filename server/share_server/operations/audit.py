"""``share-server audit``: who contributed what to which version, and whether their signatures prove it.

Of a running hub the operator asks for its updates and certificates and checks the signatures itself, with the authority
in its own directory; of a stopped one the journal is read. Both give the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from share_core.spec_file import read_spec
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.config import read_config
from share_server.layout import Layout
from share_server.operations.reading import copied, held, is_running, reading
from share_server.operations.signatures import SignatureChecker
from share_server.operator import ask, operator_stub
from share_server.store.members import all_certificates
from share_server.store.records import CertificateRow, NewUpdate, Sharing, UpdateRow, UpdateState
from share_server.store.recovery import all_updates

T = TypeVar("T")

_PAGE = 1000


@dataclass(frozen=True)
class Line:
    """One update."""

    ingest_seq: int
    """Place in the journal, from 1."""
    update_id: str
    """32 hexadecimal digits."""
    member: str
    """Who contributed it, ``organisation/name``."""
    task_id: str
    """To which task."""
    payload_sha256: str
    """Hexadecimal digest of what it contributed."""
    payload_bytes: int
    """Size of that."""
    base_version: int
    """Version it was trained in."""
    state: str
    """What became of it: ACCEPTED, MERGED, REFUSED, QUARANTINED or FORGOTTEN."""
    reason: str
    """Why, where there is a reason."""
    version: int
    """Version that holds it; 0 for none."""
    received_unix_ms: int
    """When it became durable."""
    sequence: int
    """The signer's number; 0 for an update that is not signed."""
    signature: str
    """valid, invalid, or none for an update of a store of format 2 or before."""
    certificate_serial: str
    """Hexadecimal serial number of the signer's certificate; only of a valid signature."""
    problem: str
    """What is wrong with an invalid signature."""


@dataclass(frozen=True)
class Contributors:
    """Whose updates one version took."""

    version: int
    """The version."""
    members: list[str]
    """Sorted, each once."""


@dataclass(frozen=True)
class Audit:
    """The answer."""

    updates: list[Line] = field(default_factory=list)
    """In ingest order."""
    versions: list[Contributors] = field(default_factory=list)
    """Of the updates above, by version."""

    def count(self, signature: str) -> int:
        """Return how many updates have a signature of which this is said."""
        return sum(line.signature == signature for line in self.updates)


@dataclass(frozen=True)
class Filter:
    """Which updates are asked for; what is not set holds nothing back."""

    version: int = 0
    """Only those in this version."""
    member: str = ""
    """Only those of this member, or of this organisation if there is no slash in it."""
    task: str = ""
    """Only those of this task."""

    def takes(self, row: UpdateRow) -> bool:
        """Whether an update is asked for."""
        owner = row.new.member if "/" in self.member else row.new.organisation
        return (
            self.version in (0, row.version)
            and (not self.member or owner == self.member)
            and (not self.task or row.new.task_id == self.task)
        )


def audit(layout: Layout, wanted: Filter = Filter()) -> Audit:
    """Say who contributed what; the hub of this directory may run.

    Raises:
        ConfigError: it is no server directory. FedshareError: what the running hub or the journal raises.
    """
    found = _of_running(layout) if is_running(layout) else _of_stopped(layout)
    return make_audit(layout.ca_cert.read_bytes(), read_spec(layout.space).space_id, *found, wanted)


def make_audit(
    ca_cert: bytes,
    space_id: str,
    rows: Iterable[UpdateRow],
    certificates: Iterable[CertificateRow],
    wanted: Filter = Filter(),
) -> Audit:
    """Return what rows and certificates say, checked with the authority (PEM)."""
    checker = SignatureChecker(ca_cert, space_id, certificates)
    lines = [_line(checker, row) for row in rows if wanted.takes(row)]
    members: dict[int, set[str]] = {}
    for line in lines:
        if line.version:
            members.setdefault(line.version, set()).add(line.member)
    versions = [Contributors(version, sorted(members[version])) for version in sorted(members)]
    return Audit(lines, versions)


def _line(checker: SignatureChecker, row: UpdateRow) -> Line:
    checked = checker.check(row.new)
    return Line(
        ingest_seq=row.ingest_seq,
        update_id=row.new.update_id,
        member=row.new.member,
        task_id=row.new.task_id,
        payload_sha256=row.new.sha256,
        payload_bytes=row.new.size,
        base_version=row.new.base_version,
        state=row.state.value,
        reason=row.reason,
        version=row.version,
        received_unix_ms=row.received_ms,
        sequence=row.new.sequence,
        signature=checked.signature,
        certificate_serial=checked.serial,
        problem=checked.problem,
    )


def _all(page: Callable[[int], list[T]], number: Callable[[T], int]) -> list[T]:
    found: list[T] = []
    while rows := page(number(found[-1]) if found else 0):
        found.extend(rows)
    return found


def _of_stopped(layout: Layout) -> tuple[list[UpdateRow], list[CertificateRow]]:
    async def read() -> tuple[list[UpdateRow], list[CertificateRow]]:
        with copied(layout) as folder:
            async with reading(folder) as store:
                return await store.do(all_updates), await store.do(all_certificates)

    with held(layout):
        return asyncio.run(read())


def _of_running(layout: Layout) -> tuple[list[UpdateRow], list[CertificateRow]]:
    config = read_config(layout.config)
    address = config.local_hub_address
    with operator_stub(layout, config) as hub:

        def updates(after: int) -> list[UpdateRow]:
            request = hub_pb2.ListUpdatesRequest(after_seq=after, limit=_PAGE)
            return [row_of(record) for record in ask(hub.ListUpdates, request, address).updates]

        return _all(updates, lambda row: row.ingest_seq), _all(
            lambda after: _certificates(hub, after, address), lambda row: row.number
        )


def _certificates(hub: hub_pb2_grpc.HubStub, after: int, address: str) -> list[CertificateRow]:
    answer = ask(hub.ListCertificates, hub_pb2.ListCertificatesRequest(after=after, limit=_PAGE), address)
    return [CertificateRow(one.number, one.key_sha256, one.member, one.certificate_pem) for one in answer.certificates]


def row_of(record: hub_pb2.UpdateRecord) -> UpdateRow:
    """Return an update as the hub's answer tells it: the inverse of ``convert.update_record``, as far as it is told."""
    parts = record.bytes
    new = NewUpdate(
        update_id=record.update_id,
        member=record.member,
        task_id=record.task_id,
        create=record.create,
        base_version=record.base_version,
        sha256=record.payload_sha256,
        size=parts.coefficients + parts.directions + parts.heads + parts.envelope,
        coefficients=parts.coefficients,
        directions=parts.directions,
        heads=parts.heads,
        envelope=parts.envelope,
        lease_id=record.lease_id,
        rows=record.rows,
        sharing=Sharing(record.sharing.open, tuple(record.sharing.organisations)),
        schema_sha256=record.schema_sha256,
        signer=record.signer,
        sequence=record.sequence,
        signature=record.signature,
        privacy=record.privacy,
    )
    return UpdateRow(
        new=new,
        ingest_seq=record.ingest_seq,
        entry_hash="",
        state=UpdateState[hub_pb2.UpdateState.Name(record.state).removeprefix("UPDATE_STATE_")],
        reason=record.reason,
        version=record.version,
        received_ms=record.received_unix_ms,
        relative_error=record.relative_error,
    )
