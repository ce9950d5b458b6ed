"""The store: order of writing, damage found at the start, one process at a time."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from share_core.errors import (
    ConfigError,
    RebaseError,
    RequestError,
    StorageError,
    TokenError,
    UnavailableError,
    UnknownTaskError,
    UpdateConflictError,
    VersionError,
)
from share_core.identity import SignedManifest
from share_core.types import SpaceSpec
from share_server.store import blobs as blob_module
from share_server.store.blobs import BlobStore
from share_server.store.journal import Journal
from share_server.store.members import add_traffic, bind_node, enrol_member, find_node, list_nodes
from share_server.store.pages import PageSums
from share_server.store.records import (
    EvaluationRow,
    MemberRow,
    Merging,
    NewUpdate,
    UpdateState,
    VersionCommit,
    VersionRow,
)
from share_server.store.reports import MOST_METRICS, list_evaluations, list_traffic, record_evaluations
from share_server.store.store import Store
from share_server.store.updates import accept_update, count_states, find_update, list_accepted, refuse_update
from share_server.store.versions import (
    commit_version,
    find_task,
    head_version,
    list_tasks,
    mark_collected,
    read_version,
)

T = TypeVar("T")


def _new(payload: bytes = b"payload", *, sha256: str = "", create: bool = True, update_id: str = "") -> NewUpdate:
    return NewUpdate(
        update_id=update_id or secrets.token_hex(16),
        member="acme/alice",
        task_id="acme/task",
        create=create,
        base_version=0,
        sha256=sha256 or "ab" * 32,
        size=len(payload),
        coefficients=1,
        directions=2,
        heads=3,
        envelope=1,
        lease_id="",
        rows=0,
    )


def _commit(update_id: str, version: int = 1, delta: str = "cd" * 32, size: int = 5) -> VersionCommit:
    row = VersionRow(
        version, (update_id,), delta, size, None, 0, False, {"a": (1, 1)}, "{}", SignedManifest(b"{}", b"signature")
    )
    return VersionCommit(row=row, merged=[Merging(update_id, "acme/task", 0.25)], ledgers={})


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.db", "sha256:1")


def _with_store(root: Path, spec: SpaceSpec, work: Callable[[Store], Awaitable[T]]) -> T:
    async def run() -> T:
        store, _ = await Store.open(root, spec)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def _fill(root: Path, spec: SpaceSpec, payload: bytes) -> str:
    """Write one accepted update and return its id."""

    async def work(store: Store) -> str:
        new = _new(payload, sha256=await store.io(lambda: store.blobs.put(payload)))
        await store.do(lambda journal: accept_update(journal, new, 1))
        return new.update_id

    return _with_store(root, spec, work)


# --- order of writing -------------------------------------------------------------------------------------------


def _lint(events: list[str]) -> list[str]:
    """Return every breach of: payload flushed, renamed, directory flushed, then the row committed."""
    rules = (("fsync file", "rename"), ("rename", "fsync directory"), ("fsync directory", "commit"))
    problems = []
    for first, then in rules:
        if first not in events:
            problems.append(f"no {first}")
        elif then not in events or events.index(first) > events.index(then):
            problems.append(f"{then} before {first}")
    return problems


def _record_order(root: Path, monkeypatch: pytest.MonkeyPatch, mutant: str = "") -> list[str]:
    blobs = BlobStore(root)
    blobs.make_folders()
    journal = Journal(root / "journal.db", "sha256:1")
    events: list[str] = []
    rename = os.rename

    def recorded_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(blob_module, "sync_file", lambda file: events.append("fsync file"))
    monkeypatch.setattr(blob_module, "flush_directory", lambda path: events.append("fsync directory"))
    monkeypatch.setattr(os, "rename", recorded_rename)
    journal._db.set_trace_callback(lambda text: events.append("commit") if text == "COMMIT" else None)
    if mutant == "no fsync":
        monkeypatch.setattr(blob_module, "sync_file", lambda file: None)
    if mutant == "no directory fsync":
        monkeypatch.setattr(blob_module, "flush_directory", lambda path: None)
    if mutant == "row first":
        accept_update(journal, _new(), 1)
    digest = blobs.put(b"payload")
    if mutant != "row first":
        accept_update(journal, _new(sha256=digest), 1)
    journal.close()
    return events


def test_a_payload_is_durable_before_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _lint(_record_order(tmp_path, monkeypatch)) == []


@pytest.mark.parametrize("mutant", ["no fsync", "no directory fsync", "row first"])
def test_the_order_lint_catches_a_planted_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    assert _lint(_record_order(tmp_path, monkeypatch, mutant))


def test_the_journal_is_exclusive_and_fully_synchronous(tmp_path: Path, journal: Journal) -> None:
    settings = {name: journal.row(f"PRAGMA {name}") for name in ("synchronous", "journal_mode", "locking_mode")}
    assert {name: row[0] for name, row in settings.items() if row} == {
        "synchronous": 2,
        "journal_mode": "wal",
        "locking_mode": "exclusive",
    }
    accept_update(journal, _new(), 1)
    other = sqlite3.connect(tmp_path / "journal.db", timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("SELECT * FROM updates")
    other.close()
    assert not (tmp_path / "journal.db-shm").exists()
    journal.close()


# --- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["write", "fsync", "rename"])
def test_a_refusing_disk_is_a_storage_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    blobs = BlobStore(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, refuse)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            blobs.put(b"payload")
    assert str(tmp_path) not in str(caught.value)
    assert not [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]


def test_after_one_failure_nothing_touches_the_disk_again(tmp_path: Path, toy_spec: SpaceSpec) -> None:
    async def run() -> None:
        store, _ = await Store.open(tmp_path / "store", toy_spec)
        touched: list[int] = []

        def fail() -> None:
            raise StorageError("the disk refused")

        with pytest.raises(StorageError):
            await store.io(fail)
        await asyncio.wait_for(store.failed.wait(), 10)
        for call in (store.io(lambda: touched.append(1)), store.do(lambda journal: touched.append(2))):
            with pytest.raises(StorageError, match="the disk refused"):
                await call
        assert not touched
        await store.close()

    asyncio.run(run())


def test_an_upload_given_up_while_a_thread_writes_is_no_storage_error(tmp_path: Path) -> None:
    staged = BlobStore(tmp_path).stage()
    staged.write(b"half")
    staged.discard()
    for step in (lambda: staged.write(b"more"), staged.commit, staged.read):
        with pytest.raises(UnavailableError) as caught:
            step()
        assert not isinstance(caught.value, StorageError)
    assert not list((tmp_path / "staging").iterdir())


def test_staging_of_an_earlier_life_is_removed(tmp_path: Path) -> None:
    BlobStore(tmp_path).stage().write(b"half")
    assert list((tmp_path / "staging").iterdir())
    BlobStore(tmp_path)
    assert not list((tmp_path / "staging").iterdir())


# --- recovery ---------------------------------------------------------------------------------------------------


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def _sql(root: Path, statement: str) -> None:
    """Change the journal with care: the page sums are made to agree, so that only its meaning is wrong."""
    with sqlite3.connect(root / "journal.db") as other:
        other.execute(statement)
    other.close()
    PageSums(root / "journal.db").recount()


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "payload flipped": lambda root, blob: _flip(blob, 3),
    "payload cut": lambda root, blob: blob.write_bytes(blob.read_bytes()[:-1]),
    "payload gone": lambda root, blob: blob.unlink(),
    "row changed": lambda root, blob: _sql(root, "UPDATE updates SET member = 'acme/eve'"),
    "row removed": lambda root, blob: _sql(root, "DELETE FROM updates"),
    "entry changed": lambda root, blob: _sql(root, "UPDATE entries SET body = replace(body, 'alice', 'malice')"),
    "entry removed": lambda root, blob: _sql(root, "DELETE FROM entries"),
    "task removed": lambda root, blob: _sql(root, "DELETE FROM tasks"),
    "state changed": lambda root, blob: _sql(root, "UPDATE updates SET state = 'REFUSED'"),
    "merge invented": lambda root, blob: _sql(root, "UPDATE updates SET state = 'MERGED', version = 1"),
    "head moved": lambda root, blob: _sql(root, "UPDATE head SET version = 3"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_is_found_before_anything_is_served(tmp_path: Path, toy_spec: SpaceSpec, damage: str) -> None:
    root = tmp_path / "store"
    update_id = _fill(root, toy_spec, b"some payload")
    found = _with_store(root, toy_spec, lambda store: store.do(lambda journal: find_update(journal, update_id)))
    assert found is not None, "the store must open before it is damaged"
    blob = next(path for path in (root / "blobs").rglob("*") if path.is_file())
    DAMAGE[damage](root, blob)
    with pytest.raises(StorageError):
        _with_store(root, toy_spec, lambda store: store.do(head_version))


def test_two_stores_on_one_directory_are_refused(tmp_path: Path, toy_spec: SpaceSpec) -> None:
    async def work(store: Store) -> None:
        with pytest.raises(ConfigError, match="already runs"):
            await Store.open(tmp_path / "store", toy_spec)

    _with_store(tmp_path / "store", toy_spec, work)
    _with_store(tmp_path / "store", toy_spec, lambda store: store.do(head_version))


def test_another_space_or_format_is_refused(tmp_path: Path, journal: Journal) -> None:
    journal.close()
    with pytest.raises(ConfigError, match="belongs to space"):
        Journal(tmp_path / "journal.db", "sha256:2")
    with sqlite3.connect(tmp_path / "journal.db") as other:
        other.execute("PRAGMA user_version=99")
    other.close()
    with pytest.raises(ConfigError, match="format 99"):
        Journal(tmp_path / "journal.db", "sha256:1")
    (tmp_path / "rubbish.db").write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(StorageError):
        Journal(tmp_path / "rubbish.db", "sha256:1")


# --- rows -------------------------------------------------------------------------------------------------------


def test_an_update_is_accepted_once(journal: Journal) -> None:
    new = _new()
    first, duplicate = accept_update(journal, new, 5)
    again, repeated = accept_update(journal, new, 6)
    assert (duplicate, repeated) == (False, True)
    assert again == first
    assert (first.ingest_seq, first.state, first.received_ms) == (1, UpdateState.ACCEPTED, 5)
    with pytest.raises(UpdateConflictError):
        accept_update(journal, _new(sha256="ef" * 32, update_id=new.update_id), 7)
    assert accept_update(journal, _new(), 8)[0].ingest_seq == 2
    assert len(journal.verify_chain()) == 2


def test_a_task_is_never_made_by_accident(journal: Journal) -> None:
    with pytest.raises(UnknownTaskError):
        accept_update(journal, _new(create=False), 1)
    assert find_task(journal, "acme/task") is None
    assert not journal.verify_chain(), "a refused update must leave no entry"
    accept_update(journal, _new(), 1)
    accept_update(journal, _new(create=False), 2)
    assert not list_tasks(journal), "a task is listed once some version holds it"


def test_a_merge_is_committed_once_or_not_at_all(journal: Journal) -> None:
    row, _ = accept_update(journal, _new(), 1)
    update_id = row.new.update_id
    with pytest.raises(StorageError, match="does not follow the head"):
        commit_version(journal, _commit(update_id, version=2), 2)
    commit_version(journal, _commit(update_id), 2)
    merged = find_update(journal, update_id)
    assert merged is not None
    assert (merged.state, merged.version, merged.relative_error) == (UpdateState.MERGED, 1, 0.25)
    assert list_accepted(journal, 10) == []
    with pytest.raises(StorageError):
        commit_version(journal, _commit(update_id, version=2), 3)
    assert head_version(journal) == 1, "the failed second merge must be undone whole"
    assert [task.created_version for task in list_tasks(journal)] == [1]
    assert read_version(journal, 1).sizes == {"a": (1, 1)}
    with pytest.raises(VersionError):
        read_version(journal, 2)


def test_an_update_whose_base_was_just_collected_is_not_acknowledged(journal: Journal) -> None:
    first, second = _new(), _new(sha256="ef" * 32)
    for version, new in enumerate((first, second), start=1):
        accept_update(journal, new, 1)
        commit_version(journal, _commit(new.update_id, version), 1)
    mark_collected(journal, 2)
    late = replace(_new(sha256="12" * 32), base_version=1)
    with pytest.raises(RebaseError, match="version 1 is no longer kept: fetch version 2"):
        accept_update(journal, late, 1)
    assert find_update(journal, late.update_id) is None
    assert accept_update(journal, replace(late, base_version=2), 1)[1] is False
    assert accept_update(journal, first, 1)[1] is True  # what was acknowledged before stays so


def test_a_refused_update_keeps_its_reason_and_blocks_nobody(journal: Journal) -> None:
    first, _ = accept_update(journal, _new(), 1)
    second, _ = accept_update(journal, _new(), 2)
    refuse_update(journal, first.new.update_id, "because")
    found = find_update(journal, first.new.update_id)
    assert found is not None
    assert (found.state, found.reason) == (UpdateState.REFUSED, "because")
    assert list_accepted(journal, 10) == [second]
    assert {state: count for state, count in count_states(journal).items() if count} == {
        UpdateState.ACCEPTED: 1,
        UpdateState.REFUSED: 1,
    }


def _member(name: str, key: str) -> MemberRow:
    return MemberRow(f"acme/{name}", "trainer", key * 64, b"certificate", False)


def test_a_token_works_once_for_one_key(journal: Journal) -> None:
    enrol_member(journal, _member("alice", "a"), b"node key", "nonce", 1)
    enrol_member(journal, _member("alice", "a"), b"node key", "nonce", 2)  # the answer was lost, the same key asks
    with pytest.raises(TokenError, match="used already"):
        enrol_member(journal, _member("alice", "b"), b"node key", "nonce", 3)
    with pytest.raises(RequestError, match="another member"):
        enrol_member(journal, _member("bob", "c"), b"node key", "nonce2", 4)
    enrol_member(journal, _member("bob", "c"), b"other key", "nonce2", 5)
    assert [node.member for node in list_nodes(journal)] == ["acme/alice", "acme/bob"]


def test_node_ids_are_64_bits_wide_and_belong_to_one_key(journal: Journal) -> None:
    enrol_member(journal, _member("alice", "a"), b"node key", "n1", 1)
    bind_node(journal, "acme/alice", 2**64 - 1)
    enrol_member(journal, _member("alice", "a"), b"node key", "n2", 2)
    node = find_node(journal, "acme/alice")
    assert node is not None
    assert node.node_id == 2**64 - 1
    enrol_member(journal, _member("alice", "b"), b"fresh key", "n3", 3)
    node = find_node(journal, "acme/alice")
    assert node is not None
    assert (node.node_id, node.public_key) == (0, b"fresh key")
    enrol_member(journal, _member("bob", "c"), b"", "n4", 4)
    with pytest.raises(RequestError, match="no node"):
        bind_node(journal, "acme/bob", 5)


def test_traffic_adds_up(journal: Journal) -> None:
    accept_update(journal, _new(), 1)
    accept_update(journal, _new(), 2)
    add_traffic(journal, [("acme/alice", 10, 0, 4), ("acme/bob", 1, 2, 0)])
    add_traffic(journal, [("acme/alice", 5, 7, 9)])
    rows = {row.member: row for row in list_traffic(journal)}
    alice = rows["acme/alice"]
    assert (alice.updates, alice.coefficients, alice.directions, alice.heads) == (2, 2, 4, 6)
    assert (alice.down_deltas, alice.down_snapshots, alice.down_heads) == (15, 7, 13)
    bob = rows["acme/bob"]
    assert (bob.updates, bob.down_snapshots, bob.down_heads) == (0, 2, 0)


def test_traffic_of_format_3_is_taken_over(tmp_path: Path) -> None:
    """That format did not count heads that were sent."""
    path = tmp_path / "journal.db"
    journal = Journal(path, "sha256:toy")
    add_traffic(journal, [("acme/alice", 10, 3, 0)])
    journal.close()
    with sqlite3.connect(path) as older:
        older.execute("ALTER TABLE traffic DROP COLUMN down_heads")
        older.execute("PRAGMA user_version=3")
    older.close()
    PageSums(path).recount()
    for sent, expected in ((5, 5), (2, 7)):
        journal = Journal(path, "sha256:toy")
        add_traffic(journal, [("acme/alice", 0, 0, sent)])
        (row,) = list_traffic(journal)
        assert (row.down_deltas, row.down_snapshots, row.down_heads) == (10, 3, expected)
        journal.close()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["deleted", "emptied"])
def test_payloads_without_their_journal_are_not_taken_for_an_empty_space(
    tmp_path: Path, toy_spec: SpaceSpec, damage: Callable[[Path], object]
) -> None:
    _with_store(tmp_path, toy_spec, lambda store: store.io(lambda: store.blobs.put(b"payload")))
    assert (tmp_path / "journal.db").stat().st_size > 0
    damage(tmp_path / "journal.db")
    with pytest.raises(StorageError, match=r"journal .* is gone, but payloads"):
        _with_store(tmp_path, toy_spec, lambda store: store.io(store.blobs.free_bytes))


def test_a_store_that_is_gone_is_not_taken_for_a_fresh_one(tmp_path: Path, toy_spec: SpaceSpec) -> None:
    root = tmp_path / "store"
    _with_store(root, toy_spec, lambda store: store.do(head_version))
    shutil.rmtree(root)
    with pytest.raises(StorageError, match="the store is gone"):
        _with_store(root, toy_spec, lambda store: store.do(head_version))
    (tmp_path / "store.begun").unlink()
    assert _with_store(root, toy_spec, lambda store: store.do(head_version)) == 0


def test_metrics_of_one_task_and_version_are_limited_and_all_or_none(journal: Journal) -> None:
    accept_update(journal, _new(), 1)
    full = [EvaluationRow("acme/task", 1, f"metric{number}", 0.5, 10) for number in range(MOST_METRICS)]
    record_evaluations(journal, full)
    record_evaluations(journal, full)  # the same ones again replace their values
    with pytest.raises(RequestError, match="at most 16 are kept"):
        record_evaluations(journal, [EvaluationRow("acme/task", 1, "onemore", 0.5, 10)])
    assert list_evaluations(journal) == sorted(full, key=lambda one: one.metric)
