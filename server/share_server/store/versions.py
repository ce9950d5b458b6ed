"""Versions and tasks in the journal. A merge is one transaction: all of it or nothing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from share_core.errors import RebaseError, StorageError, VersionError
from share_core.identity import SignedManifest
from share_core.ledger import TaskLedger, ledger_from_json, ledger_to_json
from share_server.store.journal import Journal
from share_server.store.privacy import record_spend, restore_privacy
from share_server.store.records import PRIVATE, Merging, Sharing, TaskRow, VersionCommit, VersionRow


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
        if row["collected"]:
            raise no_longer_kept(version, head_version(journal))
        return _version(journal, row)
    newest = head_version(journal)
    if not 0 < version <= newest:
        raise VersionError(f"this hub has no version {version}: its newest is {newest}")
    raise no_longer_kept(version, newest)


def policy_in_force(journal: Journal, merged_in: int, upto: int) -> str:
    """Return the recorded policy under which a task, last merged in version ``merged_in``, stands in version ``upto``.

    That is the one of its merge, unless the space was rebuilt since: then every task was mixed again. What a
    forgetting made was merged again under the policies of its merges.
    """
    row = journal.row(
        "SELECT policy FROM versions JOIN entries ON seq = entry_seq WHERE version BETWEEN ? AND ? AND (version = ? OR "
        "json_extract(body, '$.updates') = '[]' AND version NOT IN "
        "(SELECT json_extract(body, '$.version') FROM entries WHERE kind = 'forgotten')) "
        "ORDER BY version DESC LIMIT 1",
        (merged_in, upto, merged_in),
    )
    if row is None:
        raise StorageError(f"version {merged_in} is missing: the journal is damaged")
    return str(row[0])


def read_manifest(journal: Journal, version: int) -> SignedManifest | None:
    """Return what the hub said of a version; None before the first, and for versions of format 1."""
    row = journal.row("SELECT manifest, signature FROM versions WHERE version = ? AND manifest <> x''", (version,))
    return None if row is None else SignedManifest(row[0], row[1])


def oldest_version(journal: Journal) -> int:
    """Return the oldest version whose bases are kept; 0 while everything is."""
    row = journal.row("SELECT max(version) FROM versions WHERE collected = 1")
    return 0 if row is None or row[0] is None else int(row[0]) + 1


def list_versions(journal: Journal, after: int, upto: int) -> list[VersionRow]:
    """Return the versions ``after < version <= upto``, in order, collected ones included."""
    rows = journal.rows("SELECT * FROM versions WHERE version > ? AND version <= ? ORDER BY version", (after, upto))
    return [_version(journal, row) for row in rows]


def chain_bytes(journal: Journal, after: int, upto: int) -> int:
    """Return how many payload bytes the deltas ``after < version <= upto`` have together.

    Raises:
        RebaseError: one of them is no longer kept.
    """
    row = journal.row(
        "SELECT count(*), coalesce(sum(delta_size), 0) FROM versions "
        "WHERE version > ? AND version <= ? AND collected = 0 AND delta_sha256 <> ''",
        (after, upto),
    )
    if row is None or row[0] != upto - after:
        raise RebaseError(f"the deltas after version {after} are no longer kept: fetch version {upto}")
    return int(row[1])


def nearest_snapshot(journal: Journal, version: int) -> VersionRow | None:
    """Return the newest version up to ``version`` whose snapshot is kept; None means: start from version 0."""
    row = journal.row(
        "SELECT * FROM versions WHERE version <= ? AND snapshot_sha256 IS NOT NULL AND collected = 0 "
        "ORDER BY version DESC LIMIT 1",
        (version,),
    )
    return None if row is None else _version(journal, row)


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
    """Write a merge: head, version, updates, tasks and ledgers, those of privacy too, in one transaction.

    A version that merges nothing was rebuilt: then the ledgers of privacy are made anew from the hash chain.

    Raises:
        StorageError: the disk refused, or the journal does not stand where the merge began.
    """
    with journal.transaction():
        insert_version(journal, commit.row, now_ms)
        for one in commit.merged:
            _record_merging(journal, commit.row.version, one)
        if commit.merged:
            record_spend(journal, [one.update_id for one in commit.merged])
        else:
            restore_privacy(journal)
        write_ledgers(journal, commit.ledgers)


def insert_version(journal: Journal, row: VersionRow, now_ms: int) -> None:
    """Make ``row`` the head, inside a transaction; raises as :func:`commit_version`."""
    _exactly_one(
        journal.change("UPDATE head SET version = ? WHERE version = ?", (row.version, row.version - 1)),
        f"version {row.version} does not follow the head",
    )
    entry_seq, _ = journal.append_entry("version", version_entry(row))
    journal.change(
        "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?)",
        (
            row.version,
            entry_seq,
            row.delta_sha256,
            row.delta_size,
            row.snapshot_sha256,
            row.snapshot_size,
            int(row.compacts),
            json.dumps(row.sizes, sort_keys=True),
            row.policy,
            row.manifest.body,
            row.manifest.signature,
            now_ms,
        ),
    )


def write_ledgers(journal: Journal, ledgers: Mapping[str, TaskLedger]) -> None:
    """Replace the error ledgers of some tasks, inside a transaction; raises as :func:`commit_version`."""
    for task_id, ledger in ledgers.items():
        text = ledger_to_json({task_id: ledger})
        _exactly_one(
            journal.change("UPDATE tasks SET ledger = ? WHERE task_id = ?", (text, task_id)),
            f"task {task_id} does not exist",
        )


def _record_merging(journal: Journal, version: int, one: Merging) -> None:
    _exactly_one(
        journal.change(
            "UPDATE updates SET state = 'MERGED', version = ?, relative_error = ? "
            "WHERE update_id = ? AND state = 'ACCEPTED'",
            (version, one.relative_error, one.update_id),
        ),
        f"update {one.update_id} does not wait for its merge",
    )
    _exactly_one(
        journal.change(
            "UPDATE tasks SET updates = updates + 1, updated_version = ?, "
            "created_version = CASE created_version WHEN 0 THEN ? ELSE created_version END WHERE task_id = ?",
            (version, version, one.task_id),
        ),
        f"task {one.task_id} does not exist",
    )


def record_manifests(journal: Journal, manifests: Mapping[int, SignedManifest], policy: str) -> None:
    """Write the manifests of versions that have none, in one transaction; chain them and the policy of that time."""
    with journal.transaction():
        for version, manifest in manifests.items():
            _exactly_one(
                journal.change(
                    "UPDATE versions SET manifest = ?, signature = ? WHERE version = ? AND manifest = x''",
                    (manifest.body, manifest.signature, version),
                ),
                f"version {version} is signed already",
            )
        digests = {str(version): manifest.sha256 for version, manifest in manifests.items()}
        journal.append_entry("signed", {"versions": digests, "policy": json.loads(policy)})


def mark_collected(journal: Journal, before: int) -> int:
    """Say that the payloads of every version below ``before`` may go; return how many versions that concerns.

    Committed before a file is removed: a file that is still there afterwards is only left over.
    """
    with journal.transaction():
        return chain_collected(journal, before)


def chain_collected(journal: Journal, before: int) -> int:
    """:func:`mark_collected` inside a transaction that the caller has begun."""
    changed = journal.change("UPDATE versions SET collected = 1 WHERE version < ? AND collected = 0", (before,))
    journal.append_entry("collected", {"before": before})
    return changed


def referenced_blobs(journal: Journal) -> set[str]:
    """Return the digest of every payload that some row still needs."""
    rows = journal.rows(
        "SELECT sha256 FROM updates WHERE state <> 'FORGOTTEN' "
        "UNION SELECT original_sha256 FROM updates WHERE original_sha256 IS NOT NULL "
        "UNION SELECT delta_sha256 FROM versions WHERE collected = 0 "
        "UNION SELECT snapshot_sha256 FROM versions WHERE collected = 0 AND snapshot_sha256 IS NOT NULL"
    )
    return {row[0] for row in rows}


def version_entry(row: VersionRow) -> dict[str, Any]:
    """Return what the hash chain says of a version."""
    if not row.policy:  # written by format 1: one update per version, no manifest
        names: dict[str, Any] = {"update_id": row.updates[0]} if row.updates else {}
    else:
        names = {"updates": list(row.updates), "policy": json.loads(row.policy), "manifest_sha256": row.manifest.sha256}
    return {
        "version": row.version,
        "delta_sha256": row.delta_sha256,
        "snapshot_sha256": row.snapshot_sha256,
        **names,
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


def no_longer_kept(version: int, newest: int) -> RebaseError:
    """Return the refusal of what refers to a collected version."""
    return RebaseError(f"version {version} is no longer kept: fetch version {newest} and train from there")


def _version(journal: Journal, row: sqlite3.Row) -> VersionRow:
    merged = journal.rows("SELECT update_id FROM updates WHERE version = ? ORDER BY ingest_seq", (row["version"],))
    sizes = {site: (pair[0], pair[1]) for site, pair in json.loads(row["sizes"]).items()}
    return VersionRow(
        version=row["version"],
        updates=tuple(one[0] for one in merged),
        delta_sha256=row["delta_sha256"],
        delta_size=row["delta_size"],
        snapshot_sha256=row["snapshot_sha256"],
        snapshot_size=row["snapshot_size"],
        compacts=bool(row["compacts"]),
        sizes=sizes,
        policy=row["policy"],
        manifest=SignedManifest(row["manifest"], row["signature"]),
        collected=bool(row["collected"]),
    )


def _sharing(text: str) -> Sharing:
    if not text:
        return PRIVATE
    values = json.loads(text)
    return Sharing(values["open"], tuple(values["organisations"]))


def _task(row: sqlite3.Row) -> TaskRow:
    return TaskRow(
        task_id=row["task_id"],
        owner=row["owner"],
        sharing=_sharing(row["sharing"]),
        schema_sha256=row["schema_sha256"],
        created_version=row["created_version"],
        updated_version=row["updated_version"],
        updates=row["updates"],
    )
