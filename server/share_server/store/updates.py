"""Updates in the journal: accepted, set aside, merged or refused, each exactly once."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import fields
from typing import Any

from share_core.errors import (
    FedshareError,
    RequestError,
    SignatureError,
    StorageError,
    UnknownTaskError,
    UnknownUpdateError,
    UpdateConflictError,
)
from share_server.store.journal import Journal, canonical
from share_server.store.records import NewUpdate, Sharing, UpdateRow, UpdateState
from share_server.store.versions import head_version, no_longer_kept, oldest_version

_SELECT = "SELECT u.*, e.hash AS entry_hash FROM updates u JOIN entries e ON e.seq = u.entry_seq"


def find_update(journal: Journal, update_id: str) -> UpdateRow | None:
    """Return one update, or None."""
    row = journal.row(f"{_SELECT} WHERE u.update_id = ?", (update_id,))
    return None if row is None else _update(row)


def list_updates(journal: Journal, after_seq: int, limit: int, organisation: str | None = None) -> list[UpdateRow]:
    """Return up to ``limit`` updates after an ingest number, in ingest order, of one organisation or of all."""
    rows = journal.rows(
        f"{_SELECT} WHERE u.ingest_seq > ? AND (? IS NULL OR u.organisation = ?) ORDER BY u.ingest_seq LIMIT ?",
        (after_seq, organisation, organisation, limit),
    )
    return [_update(row) for row in rows]


def list_accepted(journal: Journal, most: int) -> list[UpdateRow]:
    """Return up to ``most`` updates that wait for their merge, in ingest order."""
    rows = journal.rows(f"{_SELECT} WHERE u.state = 'ACCEPTED' ORDER BY u.ingest_seq LIMIT ?", (most,))
    return [_update(row) for row in rows]


def oldest_waiting_base(journal: Journal) -> int | None:
    """Return the oldest version that a waiting update with coefficients is based on, or None."""
    row = journal.row(
        "SELECT min(base_version) FROM updates WHERE state IN ('ACCEPTED', 'QUARANTINED') AND base_version > 0"
    )
    return None if row is None else row[0]


_EVERY_VERSION = 2**62


def list_newest(journal: Journal, task_id: str, upto: int = _EVERY_VERSION) -> list[UpdateRow]:
    """Return the newest update of each organisation for a task that is merged in a version up to ``upto``."""
    rows = journal.rows(
        f"{_SELECT} WHERE u.ingest_seq IN (SELECT max(ingest_seq) FROM updates WHERE task_id = ? AND version BETWEEN 1 "
        "AND ? GROUP BY organisation) ORDER BY u.organisation",
        (task_id, upto),
    )
    return [_update(row) for row in rows]


def newest_merged(journal: Journal, task_id: str, upto: int) -> list[UpdateRow]:
    """Return the updates that a task's content in version ``upto`` came from: the newest of each organisation.

    Raises:
        StorageError: the task has none: the journal is damaged.
    """
    rows = list_newest(journal, task_id, upto)
    if not rows:
        raise StorageError(f"task {task_id} has no merged update: the journal is damaged")
    return rows


def first_merged(journal: Journal, task_id: str, upto: int) -> UpdateRow | None:
    """Return the update that a task began with, if some version up to ``upto`` holds it."""
    row = journal.row(
        f"{_SELECT} WHERE u.task_id = ? AND u.version BETWEEN 1 AND ? ORDER BY u.version, u.ingest_seq LIMIT 1",
        (task_id, upto),
    )
    return None if row is None else _update(row)


def count_states(journal: Journal) -> dict[UpdateState, int]:
    """Return how many updates are in each state."""
    found = {row[0]: row[1] for row in journal.rows("SELECT state, count(*) FROM updates GROUP BY state")}
    return {state: found.get(state.value, 0) for state in UpdateState}


def same_update(known: UpdateRow, *, update_id: str, member: str, task_id: str, sha256: str, size: int) -> bool:
    """Return True: what is described is the update already known under its id, sent again.

    Raises:
        UpdateConflictError: it carries the same id but is something else.
    """
    ours = known.new
    if (ours.member, ours.task_id, ours.sha256, ours.size) == (member, task_id, sha256, size):
        return True
    raise UpdateConflictError(
        f"update id {update_id} is already durable with other content: choose a fresh id for new content"
    )


_STORED = tuple(f.name for f in fields(NewUpdate) if f.name not in ("create", "sharing", "schema_sha256"))
"""What of a new update has a column of its own; the rest, its terms, share one."""

Accepted = tuple[UpdateRow, bool] | FedshareError
"""What became of one update of a group: (its row, whether it was there before), or why it is refused."""


def accept_updates(journal: Journal, group: Sequence[NewUpdate], now_ms: int) -> list[Accepted]:
    """Write updates whose payloads are durable, all in one transaction; return what became of each.

    The rows are durable when this returns; only then may they be acknowledged. A refusal (UpdateConflictError: the id
    is taken by other content; UnknownTaskError: the task does not exist and ``create`` is not set) concerns that update
    alone; so does RebaseError: the version it is based on was collected since it was looked at, and an acknowledged
    update must not lose the bases it is read with; and SignatureError: its number signs another update already.
    """
    answers: list[Accepted] = []
    with journal.transaction():
        desk = _Desk(journal, group)
        for new in group:
            try:
                answers.append(desk.accept(new, now_ms))
            except StorageError:
                raise
            except FedshareError as error:
                answers.append(error)
    return answers


def accept_update(journal: Journal, new: NewUpdate, now_ms: int) -> tuple[UpdateRow, bool]:
    """Write one update: :func:`accept_updates` with one, its refusal raised."""
    (answer,) = accept_updates(journal, [new], now_ms)
    if isinstance(answer, FedshareError):
        raise answer
    return answer


class _Desk:
    """Accepts one group of updates inside a transaction. What they need to know of the journal is read once for all."""

    def __init__(self, journal: Journal, group: Sequence[NewUpdate]) -> None:
        ids, tasks = sorted({new.update_id for new in group}), sorted({new.task_id for new in group})
        rows = journal.rows(f"{_SELECT} WHERE u.update_id IN ({_marks(ids)})", ids)
        self._journal = journal
        self._known = {row["update_id"]: _update(row) for row in rows}
        self._tasks = {
            row[0] for row in journal.rows(f"SELECT task_id FROM tasks WHERE task_id IN ({_marks(tasks)})", tasks)
        }
        self._signed = signed_already(journal, [(new.signer, new.sequence) for new in group])
        last = journal.row("SELECT coalesce(max(ingest_seq), 0) FROM updates")
        self._last = int(last[0]) if last else 0
        self._oldest = oldest_version(journal)

    def accept(self, new: NewUpdate, now_ms: int) -> tuple[UpdateRow, bool]:
        """Write one update; return (its row, whether it was there before)."""
        known = self._known.get(new.update_id)
        if known is not None and same_update(
            known,
            update_id=new.update_id,
            member=new.member,
            task_id=new.task_id,
            sha256=new.sha256,
            size=new.size,
        ):
            return known, True
        require_fresh(self._signed, new.signer, new.sequence)
        if 0 < new.base_version < self._oldest:
            raise no_longer_kept(new.base_version, head_version(self._journal))
        if new.task_id not in self._tasks:
            self._create_task(new)
        ingest_seq = self._last + 1
        entry_seq, entry_hash = self._journal.append_entry("update", update_entry(new, ingest_seq, now_ms))
        stored = {name: getattr(new, name) for name in _STORED}
        values = {
            **stored,
            "ingest_seq": ingest_seq,
            "entry_seq": entry_seq,
            "organisation": new.organisation,
            "state": UpdateState.ACCEPTED.value,
            "received_ms": now_ms,
            "terms": terms_to_text(new),
        }
        self._journal.change(
            f"INSERT INTO updates ({', '.join(values)}) VALUES ({_marks(values)})", list(values.values())
        )
        row = UpdateRow(
            new=new,
            ingest_seq=ingest_seq,
            entry_hash=entry_hash.hex(),
            state=UpdateState.ACCEPTED,
            reason="",
            version=0,
            received_ms=now_ms,
            relative_error=0.0,
        )
        self._last = ingest_seq
        self._known[new.update_id] = row
        if new.sequence:
            self._signed[new.signer, new.sequence] = new.update_id
        return row, False

    def _create_task(self, new: NewUpdate) -> None:
        if not new.create:
            raise UnknownTaskError(f"there is no task {new.task_id!r}: set create to make it with this update")
        self._journal.change(
            "INSERT INTO tasks (task_id, owner, sharing, schema_sha256) VALUES (?, ?, ?, ?)",
            (new.task_id, new.member, sharing_to_text(new.sharing), new.schema_sha256),
        )
        if new.sharing.shared:
            terms = {"open": new.sharing.open, "organisations": sorted(new.sharing.organisations)}
            body = {"task_id": new.task_id, "owner": new.member, "schema_sha256": new.schema_sha256, **terms}
            self._journal.append_entry("shared", body)
        self._tasks.add(new.task_id)


def _marks(values: Sized) -> str:
    return ", ".join("?" * len(values))


def refuse_update(journal: Journal, update_id: str, reason: str) -> None:
    """Record that an accepted update cannot be merged."""
    _move(journal, "refused", update_id, UpdateState.ACCEPTED, UpdateState.REFUSED, reason)


def quarantine_update(journal: Journal, update_id: str, reason: str) -> None:
    """Set an accepted update aside until the operator decides."""
    _move(journal, "quarantined", update_id, UpdateState.ACCEPTED, UpdateState.QUARANTINED, reason)


def decide_update(journal: Journal, update_id: str, release: bool, reason: str) -> UpdateRow:
    """Record what the operator decides on an update that is set aside, and return it.

    Released, it waits again for its merge, and is not judged any more; else it is refused with the reason.

    Raises:
        UnknownUpdateError: there is none of that id. RequestError: it is not set aside.
    """
    row = find_update(journal, update_id)
    if row is None:
        raise UnknownUpdateError(f"there is no update {update_id}")
    if row.state is not UpdateState.QUARANTINED:
        raise RequestError(f"update {update_id} is {row.state.value}: only one that is set aside can be decided on")
    if release:
        _move(journal, "released", update_id, UpdateState.QUARANTINED, UpdateState.ACCEPTED, reason)
    else:
        _move(journal, "refused", update_id, UpdateState.QUARANTINED, UpdateState.REFUSED, reason)
    decided = find_update(journal, update_id)
    assert decided is not None
    return decided


def has_newer(journal: Journal, row: UpdateRow) -> bool:
    """Return whether a later update of the same organisation for the same task is merged already."""
    found = journal.row(
        "SELECT 1 FROM updates WHERE task_id = ? AND organisation = ? AND version > 0 AND ingest_seq > ? LIMIT 1",
        (row.new.task_id, row.new.organisation, row.ingest_seq),
    )
    return found is not None


def _move(journal: Journal, kind: str, update_id: str, old: UpdateState, new: UpdateState, reason: str) -> None:
    """Write one step in the life of an update, with its entry in the chain."""
    released = kind == "released"
    with journal.transaction():
        journal.append_entry(kind, {"update_id": update_id, "reason": reason})
        changed = journal.change(
            "UPDATE updates SET state = ?, reason = ?, released = max(released, ?) WHERE update_id = ? AND state = ?",
            (new.value, "" if released else reason, int(released), update_id, old.value),
        )
        if changed != 1:
            raise StorageError(f"update {update_id} was to be {kind} but is not {old.value}: the journal is damaged")


def keep_original(journal: Journal, update_id: str, sha256: str, size: int) -> None:
    """Record the ambient factors of an update whose base version is about to be collected."""
    journal.append_entry("original", {"update_id": update_id, "sha256": sha256})
    changed = journal.change(
        "UPDATE updates SET original_sha256 = ?, original_size = ? WHERE update_id = ? AND original_sha256 IS NULL",
        (sha256, size, update_id),
    )
    if changed != 1:
        raise StorageError(f"update {update_id} has its original already: the journal is damaged")


def list_bound_to(journal: Journal, before: int, most: int) -> list[UpdateRow]:
    """Return up to ``most`` updates that can only be read with the bases of a version in 1 to ``before`` - 1."""
    rows = journal.rows(
        f"{_SELECT} WHERE u.base_version BETWEEN 1 AND ? AND u.original_sha256 IS NULL "
        "AND u.state NOT IN ('REFUSED', 'FORGOTTEN') ORDER BY u.ingest_seq LIMIT ?",
        (before - 1, most),
    )
    return [_update(row) for row in rows]


def sharing_to_text(sharing: Sharing) -> str:
    """Return a task's sharing as stored; empty for a private task."""
    return canonical({"open": sharing.open, "organisations": sorted(sharing.organisations)}) if sharing.shared else ""


def terms_to_text(new: NewUpdate) -> str:
    """Return what an update says of the task that it may make, as stored: its signature is over it."""
    sharing = {"open": new.sharing.open, "organisations": list(new.sharing.organisations)}
    return canonical({"create": new.create, "schema_sha256": new.schema_sha256, **sharing})


def signed_already(journal: Journal, pairs: Iterable[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Return the ids of the updates that are stored under one of these (signer, sequence)."""
    pairs = sorted({(signer, sequence) for signer, sequence in pairs if sequence > 0})
    if not pairs:
        return {}
    rows = journal.rows(
        "SELECT signer, sequence, update_id FROM updates WHERE sequence > 0 AND (signer, sequence) IN "
        f"(VALUES {', '.join(['(?, ?)'] * len(pairs))})",
        [value for pair in pairs for value in pair],
    )
    return {(row["signer"], row["sequence"]): row["update_id"] for row in rows}


def require_fresh(signed: Mapping[tuple[str, int], str], signer: str, sequence: int) -> None:
    """Raise SignatureError if a key has signed another update under this number; see :func:`signed_already`."""
    if (other := signed.get((signer, sequence))) is not None:
        raise SignatureError(
            f"sequence {sequence} signs update {other} already: two updates of one key never carry the same number; "
            "sign it anew with a larger one (was the client's directory restored from a copy?)"
        )


def update_entry(new: NewUpdate, ingest_seq: int, now_ms: int) -> dict[str, str | int]:
    """Return what the hash chain says of an accepted update."""
    signed: dict[str, str | int] = {"signer": new.signer, "sequence": new.sequence, "signature": new.signature.hex()}
    signed["terms"] = terms_to_text(new)
    return {
        **(signed if new.signature else {}),
        **({"privacy": new.privacy} if new.privacy else {}),
        "update_id": new.update_id,
        "ingest_seq": ingest_seq,
        "member": new.member,
        "task_id": new.task_id,
        "base_version": new.base_version,
        "sha256": new.sha256,
        "size": new.size,
        "received_ms": now_ms,
    }


def _terms(text: str) -> dict[str, Any]:
    try:
        terms = json.loads(text) if text else {}
    except ValueError as error:
        raise StorageError(f"the terms of an update cannot be read ({error}): the journal is damaged") from error
    if not isinstance(terms, dict):
        raise StorageError(f"the terms of an update are {text!r:.100}: the journal is damaged")
    return terms


def _update(row: sqlite3.Row) -> UpdateRow:
    terms = _terms(row["terms"])
    new = NewUpdate(
        update_id=row["update_id"],
        member=row["member"],
        task_id=row["task_id"],
        create=terms.get("create", False),
        base_version=row["base_version"],
        sha256=row["sha256"],
        size=row["size"],
        coefficients=row["coefficients"],
        directions=row["directions"],
        heads=row["heads"],
        envelope=row["envelope"],
        lease_id=row["lease_id"],
        rows=row["rows"],
        signer=row["signer"],
        sequence=row["sequence"],
        signature=row["signature"],
        privacy=row["privacy"],
        sharing=Sharing(terms.get("open", False), tuple(terms.get("organisations", ()))),
        schema_sha256=terms.get("schema_sha256", ""),
    )
    return UpdateRow(
        new=new,
        ingest_seq=row["ingest_seq"],
        entry_hash=row["entry_hash"].hex(),
        state=UpdateState(row["state"]),
        reason=row["reason"],
        version=row["version"],
        received_ms=row["received_ms"],
        relative_error=row["relative_error"],
        original_sha256=row["original_sha256"],
        original_size=row["original_size"],
        released=bool(row["released"]),
    )
