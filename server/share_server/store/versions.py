"""Versions and tasks in the journal. A merge is one transaction: all of it or nothing."""

from __future__ import annotations

import json
import sqlite3

from share_core.errors import RebaseError, StorageError, VersionError
from share_core.ledger import TaskLedger, ledger_from_json, ledger_to_json
from share_server.store.journal import Journal
from share_server.store.records import TaskRow, VersionCommit, VersionRow


def head_version(journal: Journal) -> int:
    """Return the newest committed version; 0 before the first."""
    row = journal.row("SELECT version FROM head")
    if row is None:
        raise StorageError("the journal has no head: it is damaged")
    return int(row[0])


def read_version(journal: Journal, version: int) -> VersionRow:
    """Return one version.

    Raises:
        VersionError: it was never committed.
        RebaseError: it is no longer kept.
    """
    row = journal.row("SELECT * FROM versions WHERE version = ?", (version,))
    if row is not None:
        return _version(row)
    newest = head_version(journal)
    if not 0 < version <= newest:
        raise VersionError(f"this hub has no version {version}: its newest is {newest}")
    raise RebaseError(f"version {version} is no longer kept: fetch version {newest} and train from there")


def list_versions(journal: Journal, after: int, upto: int) -> list[VersionRow]:
    """Return the versions ``after < version <= upto`` that are kept, in order."""
    rows = journal.rows("SELECT * FROM versions WHERE version > ? AND version <= ? ORDER BY version", (after, upto))
    return [_version(row) for row in rows]


def chain_bytes(journal: Journal, after: int, upto: int) -> int:
    """Return how many payload bytes the deltas ``after < version <= upto`` have together.

    Raises:
        RebaseError: one of them is no longer kept.
    """
    row = journal.row(
        "SELECT count(*), coalesce(sum(delta_size), 0) FROM versions WHERE version > ? AND version <= ?", (after, upto)
    )
    if row is None or row[0] != upto - after:
        raise RebaseError(f"the deltas after version {after} are no longer kept: fetch version {upto}")
    return int(row[1])


def nearest_snapshot(journal: Journal, version: int) -> VersionRow | None:
    """Return the newest version up to ``version`` whose snapshot is kept; None means: start from version 0."""
    row = journal.row(
        "SELECT * FROM versions WHERE version <= ? AND snapshot_sha256 IS NOT NULL ORDER BY version DESC LIMIT 1",
        (version,),
    )
    return None if row is None else _version(row)


def epoch_end(journal: Journal, version: int) -> int:
    """Return the last version whose bases begin with those of ``version``: the one before the next compaction."""
    row = journal.row("SELECT min(version) FROM versions WHERE version > ? AND compacts = 1", (version,))
    following = row[0] if row else None
    return head_version(journal) if following is None else int(following) - 1


def count_compactions(journal: Journal) -> int:
    """Return how many versions rotated a basis."""
    row = journal.row("SELECT count(*) FROM versions WHERE compacts = 1")
    return int(row[0]) if row else 0


def commit_version(journal: Journal, commit: VersionCommit, now_ms: int) -> None:
    """Write a merge: head, version, update, task and ledgers in one transaction.

    Raises:
        StorageError: the disk refused, or the journal does not stand where the merge began.
    """
    row = commit.row
    with journal.transaction():
        _exactly_one(
            journal.change("UPDATE head SET version = ? WHERE version = ?", (row.version, row.version - 1)),
            f"version {row.version} does not follow the head",
        )
        entry_seq, _ = journal.append_entry("version", version_entry(row))
        journal.change(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                row.version,
                entry_seq,
                row.update_id,
                row.delta_sha256,
                row.delta_size,
                row.snapshot_sha256,
                row.snapshot_size,
                int(row.compacts),
                json.dumps(row.sizes, sort_keys=True),
                now_ms,
            ),
        )
        _exactly_one(
            journal.change(
                "UPDATE updates SET state = 'MERGED', version = ?, relative_error = ? "
                "WHERE update_id = ? AND state = 'ACCEPTED'",
                (row.version, commit.relative_error, row.update_id),
            ),
            f"update {row.update_id} does not wait for its merge",
        )
        _exactly_one(
            journal.change(
                "UPDATE tasks SET updates = updates + 1, updated_version = ?, "
                "created_version = CASE created_version WHEN 0 THEN ? ELSE created_version END WHERE task_id = ?",
                (row.version, row.version, commit.task_id),
            ),
            f"task {commit.task_id} does not exist",
        )
        for task_id, ledger in commit.ledgers.items():
            text = ledger_to_json({task_id: ledger})
            _exactly_one(
                journal.change("UPDATE tasks SET ledger = ? WHERE task_id = ?", (text, task_id)),
                f"task {task_id} does not exist",
            )


def version_entry(row: VersionRow) -> dict[str, str | int | None]:
    """Return what the hash chain says of a version."""
    return {
        "version": row.version,
        "update_id": row.update_id,
        "delta_sha256": row.delta_sha256,
        "snapshot_sha256": row.snapshot_sha256,
    }


def find_task(journal: Journal, task_id: str) -> TaskRow | None:
    """Return one task, also one whose first update still waits, or None."""
    row = journal.row("SELECT * FROM tasks WHERE task_id = ?", (task_id,))
    return None if row is None else _task(row)


def list_tasks(journal: Journal) -> list[TaskRow]:
    """Return the tasks that some version holds, sorted by id."""
    return [_task(row) for row in journal.rows("SELECT * FROM tasks WHERE created_version > 0 ORDER BY task_id")]


def read_ledger(journal: Journal) -> dict[str, TaskLedger]:
    """Return the error ledger of every task that some version holds."""
    ledger: dict[str, TaskLedger] = {}
    for row in journal.rows("SELECT ledger FROM tasks WHERE created_version > 0"):
        ledger.update(ledger_from_json(row[0]))
    return ledger


def _exactly_one(changed: int, otherwise: str) -> None:
    if changed != 1:
        raise StorageError(f"the journal does not stand where the merge began: {otherwise}")


def _version(row: sqlite3.Row) -> VersionRow:
    sizes = {site: (pair[0], pair[1]) for site, pair in json.loads(row["sizes"]).items()}
    return VersionRow(
        version=row["version"],
        update_id=row["update_id"],
        delta_sha256=row["delta_sha256"],
        delta_size=row["delta_size"],
        snapshot_sha256=row["snapshot_sha256"],
        snapshot_size=row["snapshot_size"],
        compacts=bool(row["compacts"]),
        sizes=sizes,
    )


def _task(row: sqlite3.Row) -> TaskRow:
    return TaskRow(
        task_id=row["task_id"],
        owner=row["owner"],
        created_version=row["created_version"],
        updated_version=row["updated_version"],
        updates=row["updates"],
    )
