"""Updates that are taken out again, in the journal and on the disk.

A forgotten update keeps its row, without a version, and its entries in the hash chain: that it was there, when, from
whom and with which digest stays provable. What it said goes: its payload and its original, what was merged of it, and
every version that it shaped.

Order, so that a kill at any point leaves everything or nothing: a sweep is announced -> whatever is written meanwhile
is durable -> rows, version and the sweep's work in one transaction -> files removed -> the sweep is over. A start that
finds a sweep announced does it: it removes every payload that no row needs, which is right at a start, since nobody
uploads yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from share_core.errors import StorageError
from share_core.ledger import TaskLedger
from share_server.store.journal import Journal, canonical
from share_server.store.records import VersionRow
from share_server.store.store import Store
from share_server.store.versions import chain_collected, insert_version, referenced_blobs, write_ledgers

_SWEEP = "sweep"
"""Name in the table ``meta`` of the announced sweep."""


@dataclass(frozen=True)
class Forgetting:
    """Everything one forgetting changes, to be written in one transaction."""

    name: str
    """``organisation/name`` or ``organisation``."""
    updates: Sequence[str]
    """Ids of its updates, in ingest order."""
    row: VersionRow | None
    """The version without them, its payload durable already; None where no version held any of them."""
    ledgers: Mapping[str, TaskLedger]
    """Ledgers of that version, of all its tasks."""
    uploads: Sequence[str]
    """How the keys of its unfinished uploads begin."""


def commit_forgotten(journal: Journal, forgetting: Forgetting, now_ms: int) -> None:
    """Write a forgetting: version, rows, tasks, ledgers, evaluations and what is to be swept, in one transaction.

    Raises:
        StorageError: the disk refused, or the journal does not stand where the forgetting began.
    """
    row = forgetting.row
    version = 0 if row is None else row.version
    with journal.transaction():
        if row is not None:
            insert_version(journal, row, now_ms)
        body = {"name": forgetting.name, "version": version, "updates": list(forgetting.updates), "at_ms": now_ms}
        journal.append_entry("forgotten", body)
        take_out(journal, forgetting.updates, version)
        write_ledgers(journal, forgetting.ledgers)
        if row is not None:
            chain_collected(journal, row.version)
        _announce(journal, forgetting.uploads)


def take_out(journal: Journal, updates: Sequence[str], version: int) -> None:
    """Make updates forgotten, and their tasks what the others have left of them, inside a transaction."""
    reason = f"forgotten in version {version}" if version else "forgotten before it was merged"
    tasks: set[str] = set()
    for name in updates:
        found = journal.row("SELECT task_id FROM updates WHERE update_id = ? AND state <> 'FORGOTTEN'", (name,))
        if found is None:
            raise StorageError(f"update {name} was to be forgotten but is not there: the journal is damaged")
        tasks.add(found["task_id"])
        journal.change(
            "UPDATE updates SET state = 'FORGOTTEN', reason = ?, version = 0, relative_error = 0, "
            "original_sha256 = NULL, original_size = 0 WHERE update_id = ?",
            (reason, name),
        )
    for task_id in sorted(tasks):
        left = journal.row(
            "SELECT count(*), coalesce(min(version), 0), coalesce(max(version), 0) FROM updates "
            "WHERE task_id = ? AND version > 0",
            (task_id,),
        )
        assert left is not None
        journal.change(
            "UPDATE tasks SET updates = ?, created_version = ?, updated_version = ? WHERE task_id = ?",
            (*left, task_id),
        )
        if not left[0]:
            journal.change("UPDATE tasks SET ledger = '' WHERE task_id = ?", (task_id,))
            journal.change("DELETE FROM evaluations WHERE task_id = ?", (task_id,))


def announce_sweep(journal: Journal) -> None:
    """Have the next start remove what no row needs, should this process end before :func:`sweep`."""
    with journal.transaction():
        _announce(journal, ())


def announced_sweep(journal: Journal) -> list[str] | None:
    """Return how the keys of the uploads that an announced sweep removes begin; None where none is announced."""
    row = journal.row("SELECT value FROM meta WHERE name = ?", (_SWEEP,))
    return None if row is None else list(json.loads(row[0])["uploads"])


async def sweep(store: Store) -> int:
    """Do an announced sweep; return how many bytes of payloads that freed. Nobody may be uploading.

    Raises:
        StorageError: the disk refused.
    """
    begin = await store.do(announced_sweep)
    if begin is None:
        return 0
    needed, blobs = await store.do(referenced_blobs), store.blobs
    gone = await store.io(lambda: blobs.unreferenced(needed, float("-inf")))
    keys = [key for key, _, _ in await store.io(blobs.uploads) if key.startswith(tuple(begin))]
    freed = await store.io(lambda: blobs.erase(gone, keys))
    await store.do(_end_sweep)
    return freed


def _announce(journal: Journal, uploads: Sequence[str]) -> None:
    journal.change("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_SWEEP, canonical({"uploads": list(uploads)})))


def _end_sweep(journal: Journal) -> None:
    with journal.transaction():
        journal.change("DELETE FROM meta WHERE name = ?", (_SWEEP,))
