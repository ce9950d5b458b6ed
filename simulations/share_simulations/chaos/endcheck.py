"""What a campaign may hold against a hub at its end: the promises of TRUST, asked over gRPC.

Every client writes into one :class:`Book` what it sent and what it was told. :func:`check_hub` then lets the hub settle
and compares its journal with the book.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from share_core.errors import UnavailableError
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.local import LocalHub
from share_server.operator import named_error
from share_simulations.journal import read_journal

_DEADLINE_S = 60.0
_EXCUSED = ("RebaseError: ",)
"""Refusals after the acknowledgement that an honest update can meet: its version was too old when its turn came."""


@dataclass(frozen=True)
class Receipt:
    """What the hub answered to a Submit."""

    ingest_seq: int
    """Place in the journal, from 1."""
    entry_hash: str
    """Hash of the journal entry."""


@dataclass
class Book:
    """What all clients of one server directory have sent and were told."""

    sent: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the payload by update id, acknowledged or not."""
    receipts: dict[str, Receipt] = field(default_factory=dict)
    """First receipt by update id."""
    versions: dict[int, str] = field(default_factory=dict)
    """SHA-256 of the delta by version, as followers received it."""
    duplicates: int = 0
    """Receipts that said the update had been durable before."""
    broken: list[str] = field(default_factory=list)
    """Promises that clients themselves saw broken, in words."""

    def send(self, update_id: str, sha256: str) -> None:
        """Note an update before its first byte leaves."""
        self.sent[update_id] = sha256

    def acknowledge(self, update_id: str, answer: hub_pb2.SubmitResponse) -> None:
        """Note a receipt; every later one for the same update must say the same."""
        receipt = Receipt(answer.ingest_seq, answer.entry_hash)
        self.duplicates += answer.duplicate
        known = self.receipts.setdefault(update_id, receipt)
        if answer.update_id != update_id:
            self.broken.append(f"update {update_id} was answered with the receipt of {answer.update_id}")
        if known != receipt:
            self.broken.append(f"update {update_id} was given two receipts: {known} and {receipt}")

    def publish(self, version: int, sha256: str) -> None:
        """Note a version that a follower received; it must never become another one."""
        known = self.versions.setdefault(version, sha256)
        if known != sha256:
            self.broken.append(f"version {version} was published with other bytes than before")


@dataclass(frozen=True)
class Verdict:
    """What came out of one check."""

    updates: int
    """Updates in the journal."""
    merged: int
    """Updates in a version."""
    refused: int
    """Updates refused with a reason."""
    versions: int
    """Newest version."""
    lost: int
    """Acknowledged updates that are not there with their bytes."""
    double: int
    """Updates that stand in the journal, or in versions, more than once."""
    problems: tuple[str, ...]
    """Every broken promise in words, the above included."""


def check_hub(server: LocalHub, book: Book, patience_s: float = 60.0) -> Verdict:
    """Wait until nothing waits for its merge, then compare the journal of the running hub with ``book``.

    Args:
        server: the hub.
        book: everything that was sent to this server directory.
        patience_s: how long the merges may stand still before they count as stuck.

    Raises:
        UnavailableError: the hub does not answer.
    """
    try:
        with server.hub(server.own("operator")) as hub:
            return _compare(hub, book, patience_s)
    except grpc.RpcError as error:
        reason = named_error(error, server.config.local_hub_address)
        raise UnavailableError(f"the hub could not be asked what it kept: {reason}") from error


def _compare(hub: hub_pb2_grpc.HubStub, book: Book, patience_s: float) -> Verdict:
    status = _settled(hub, patience_s)
    rows = read_journal(hub)
    lost = list(_lost(rows, book))
    double = list(_double(rows, book)) + list(_merged_twice(hub, rows))
    other = list(_disorder(rows, status)) + list(_unsettled(rows)) + list(_versions(book, status.version))
    return Verdict(
        updates=len(rows),
        merged=sum(row.state == hub_pb2.UPDATE_STATE_MERGED for row in rows),
        refused=sum(row.state == hub_pb2.UPDATE_STATE_REFUSED for row in rows),
        versions=status.version,
        lost=len(lost),
        double=len(double),
        problems=(*lost, *double, *other, *book.broken),
    )


def _settled(hub: hub_pb2_grpc.HubStub, patience_s: float) -> hub_pb2.GetStatusResponse:
    """Return the status when nothing waits, or when nothing has moved for ``patience_s``."""
    last, moved = -1, time.monotonic()
    while True:
        status = hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=_DEADLINE_S)
        if status.accepted != last:
            last, moved = status.accepted, time.monotonic()
        if status.accepted == 0 or time.monotonic() - moved > patience_s:
            return status
        time.sleep(0.05)


def _lost(rows: list[hub_pb2.UpdateRecord], book: Book) -> Iterator[str]:
    known = {row.update_id: row for row in rows}
    for update_id, receipt in book.receipts.items():
        row = known.get(update_id)
        if row is None:
            yield f"update {update_id} was acknowledged and is lost"
        elif row.payload_sha256 != book.sent[update_id]:
            yield f"update {update_id} was acknowledged and has other bytes"
        elif row.ingest_seq != receipt.ingest_seq:
            yield f"update {update_id} was acknowledged as number {receipt.ingest_seq} and is {row.ingest_seq}"


def _double(rows: list[hub_pb2.UpdateRecord], book: Book) -> Iterator[str]:
    """Payloads are unique in a campaign, so the same bytes under two ids are one update taken twice."""
    for update_id, count in Counter(row.update_id for row in rows).items():
        if count > 1:
            yield f"update {update_id} stands {count} times in the journal"
    for row in rows:
        if row.update_id not in book.sent:
            yield f"update {row.update_id} stands in the journal and nobody sent it under this name"


def _merged_twice(hub: hub_pb2_grpc.HubStub, rows: list[hub_pb2.UpdateRecord]) -> Iterator[str]:
    merged = Counter(row.task_id for row in rows if row.state == hub_pb2.UPDATE_STATE_MERGED)
    for task in hub.ListTasks(hub_pb2.ListTasksRequest(), timeout=_DEADLINE_S).tasks:
        if task.updates != merged[task.task_id]:
            yield f"task {task.task_id} counts {task.updates} merges of its {merged[task.task_id]} merged updates"


def _disorder(rows: list[hub_pb2.UpdateRecord], status: hub_pb2.GetStatusResponse) -> Iterator[str]:
    if [row.ingest_seq for row in rows] != list(range(1, len(rows) + 1)):
        yield "the ingest order has gaps"
    made = {row.version for row in rows if row.state == hub_pb2.UPDATE_STATE_MERGED}
    empty = sorted(set(range(1, status.version + 1)) - made)
    if empty:
        yield f"versions without an update: {len(empty)} of {status.version}, first {empty[0]}"
    if made and max(made) > status.version:
        yield f"an update is merged in version {max(made)}, but the newest is {status.version}"


def _unsettled(rows: list[hub_pb2.UpdateRecord]) -> Iterator[str]:
    for row in rows:
        if row.state == hub_pb2.UPDATE_STATE_MERGED and row.version > 0:
            continue
        if row.state == hub_pb2.UPDATE_STATE_REFUSED and row.reason.startswith(_EXCUSED):
            continue
        state = hub_pb2.UpdateState.Name(row.state).removeprefix("UPDATE_STATE_")
        yield f"update {row.update_id} is {state} in version {row.version}: {row.reason or 'no reason'}"


def _versions(book: Book, head: int) -> Iterator[str]:
    newest = max(book.versions, default=0)
    if newest > head:
        yield f"version {newest} was published and is lost: the newest is {head}"
