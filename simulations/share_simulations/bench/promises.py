"""What a hub has promised, checked: every receipt, the order of the journal, no merge lost and none doubled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_simulations.journal import read_journal


@dataclass(frozen=True)
class Promises:
    """Counts; everything up to ``empty_versions`` must be zero."""

    lost: int
    """Receipts whose update is not in the journal."""
    wrong_bytes: int
    """Receipts whose update is there with another SHA-256."""
    doubled: int
    """Update ids that are in the journal more than once."""
    gaps: int
    """Places 1..n of the journal that hold no update, or several."""
    unexplained: int
    """Updates that are merged without a version, or set aside without a reason."""
    empty_versions: int
    """Versions up to the newest that hold no update."""
    receipts: int
    """Receipts that were checked."""
    merged: int
    """Merged updates."""
    waiting: int
    """Durable updates that wait for their merge."""
    refused: int
    """Updates that were refused or quarantined, with a reason."""

    @property
    def kept(self) -> bool:
        """Whether every promise is kept."""
        return not any((self.lost, self.wrong_bytes, self.doubled, self.gaps, self.unexplained, self.empty_versions))

    def as_json(self) -> dict[str, Any]:
        """Return the counts by name, and whether all is well."""
        return {"kept": self.kept, **asdict(self)}


def check_promises(
    receipts: Iterable[tuple[str, str]], journal: Sequence[hub_pb2.UpdateRecord], newest: int
) -> Promises:
    """Compare receipts (update id, SHA-256) with the journal of a hub at version ``newest``."""
    receipts = set(receipts)
    found: Mapping[str, str] = {record.update_id: record.payload_sha256 for record in journal}
    ids = Counter(record.update_id for record in journal)
    places = Counter(record.ingest_seq for record in journal)
    states = Counter(record.state for record in journal)
    wanted = range(1, max(places, default=0) + 1)
    in_versions = {record.version for record in journal if record.state == hub_pb2.UPDATE_STATE_MERGED}
    aside = (hub_pb2.UPDATE_STATE_REFUSED, hub_pb2.UPDATE_STATE_QUARANTINED)
    return Promises(
        lost=sum(update_id not in found for update_id, _ in receipts),
        wrong_bytes=sum(found.get(update_id, sha256) != sha256 for update_id, sha256 in receipts),
        doubled=sum(count > 1 for count in ids.values()),
        gaps=sum(places[place] != 1 for place in wanted) + sum(place < 1 for place in places),
        unexplained=sum(
            (record.state == hub_pb2.UPDATE_STATE_MERGED and not 0 < record.version <= newest)
            or (record.state in aside and not record.reason)
            for record in journal
        ),
        empty_versions=sum(version not in in_versions for version in range(1, newest + 1)),
        receipts=len(receipts),
        merged=states[hub_pb2.UPDATE_STATE_MERGED],
        waiting=states[hub_pb2.UPDATE_STATE_ACCEPTED],
        refused=sum(states[state] for state in aside),
    )


def journal_and_newest(hub: hub_pb2_grpc.HubStub) -> tuple[list[hub_pb2.UpdateRecord], int]:
    """Return every update of a hub in order of arrival, and the newest version as they know it; it may be merging."""
    newest = int(hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30.0).version)
    records = read_journal(hub)
    return records, max([newest, *(record.version for record in records)])
