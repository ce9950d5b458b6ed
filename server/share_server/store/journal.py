"""The journal file: one SQLite connection on one thread, and a hash chain over everything that was promised.

The connection takes the file exclusively (``locking_mode=EXCLUSIVE`` before WAL), so that no second
connection exists anywhere, and commits with ``synchronous=FULL``: when :meth:`Journal.transaction` has ended,
its rows survive a power cut, and the anchor says so. Before the file is opened every page is compared with its sum, and
after it the count of transactions with the anchor: see :mod:`share_server.store.pages` and ``anchor``.

Chain: every promise (an accepted or refused update, a version, an enrolment) is an entry
``hash = SHA-256("fedshare journal 1" || previous || len(kind) || kind || len(body) || body)`` with eight-byte
big-endian lengths and ``body`` canonical JSON. The first ``previous`` is 32 zero bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from share_core.durable import flush_directory
from share_core.errors import ConfigError, StorageError
from share_server.store.anchor import Anchor, Mark
from share_server.store.blobs import storage
from share_server.store.pages import PAGE, PageSums, remove_unused, stored_format
from share_server.store.schema import APPLICATION_ID, MIGRATIONS, SCHEMA, SCHEMA_VERSION

_DOMAIN = b"fedshare journal 1"
_GENESIS = bytes(32)
_CHECKPOINT_BYTES = 4 * 2**20
_PRAGMAS = (
    f"page_size={PAGE}",
    "locking_mode=EXCLUSIVE",  # before WAL: then no shared-memory file, and no second connection
    "journal_mode=WAL",
    "synchronous=FULL",
    "wal_autocheckpoint=0",  # Journal.checkpoint does it, with the page sums
    "foreign_keys=ON",
    "trusted_schema=OFF",
    "cell_size_check=ON",
)


class Journal:
    """An open journal. Every method must be called from the thread that opened it."""

    def __init__(self, path: Path, space_id: str) -> None:
        """Open or create the journal of one space.

        Raises:
            StorageError: the file is damaged or the disk refused.
            ConfigError: it belongs to another space or another version of this program.
        """
        refuse_newer(path)
        self._last = (0, _GENESIS)
        self._count = 0
        self._anchor = Anchor(path.with_name("anchor"))
        self._sums = PageSums(path)
        try:
            self._prove_pages(path)
            with _database("opening the journal"):
                self._db = sqlite3.connect(path, isolation_level=None)
            self._open(path)
        except BaseException:
            self.abandon()
            raise
        owner = self._scalar("SELECT value FROM meta WHERE name = 'space_id'")
        if owner is None:
            with self.transaction():
                self.change("INSERT INTO meta VALUES ('space_id', ?)", (space_id,))
        elif owner != space_id:
            self.close()
            raise ConfigError(f"the store belongs to space {owner}, but space.toml describes {space_id}")

    def _prove_pages(self, path: Path) -> None:
        """Compare the file's pages with their sums; a journal that has promised nothing is begun again instead."""
        if self._anchor.mark.count:
            self._sums.load()
            self._sums.check()
        elif not _is_whole(path):
            remove_unused(path)

    def _open(self, path: Path) -> None:
        with _database("opening the journal"):
            self._db.row_factory = sqlite3.Row
            for pragma in _PRAGMAS:
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            fresh = not self._scalar("SELECT count(*) FROM sqlite_schema")
        if fresh:
            self._create()
        with _database("checking the journal"):
            problems = self._scalar("PRAGMA quick_check(1)")
        if problems != "ok":
            raise StorageError(f"the journal is damaged: {problems}; restore it from a backup")
        with storage("opening the journal"):
            flush_directory(path.parent)
        self._check()
        self._last = self._read_last()
        self._compare_with_anchor()
        if not (fresh or self._anchor.mark.count):
            self._adopt()
        self.checkpoint()

    def _adopt(self) -> None:
        """Begin page sums and anchor for a journal that has none yet: one of format 1, brought forward."""
        if self._count > 1:
            raise StorageError("the journal's anchor (store/anchor) is gone: restore the store from a backup")
        with _database("copying the journal's log"):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._sums.recount()
        if self._count:  # committed, and cut short before it was anchored
            self._anchor.write(Mark(self._count, *self._last))
            return
        with self.transaction():
            pass

    def _compare_with_anchor(self) -> None:
        """Refuse a journal that has lost something that was promised."""
        mark = self._anchor.mark
        with _database("comparing the journal with its anchor"):
            self._count = int(self._scalar("SELECT value FROM meta WHERE name = 'transactions'"))
            found = self._scalar(f"SELECT hash FROM entries WHERE seq = {mark.entries}") if mark.entries else _GENESIS
        # A kill between commit and anchor leaves the journal one ahead; nobody was told of that one.
        if self._count not in (mark.count, mark.count + 1) or found != mark.hash:
            raise StorageError(
                f"the journal has {self._count} transactions and {self._last[0]} entries, but its anchor says "
                f"{mark.count} and {mark.entries}: one of them is damaged or of another time; restore from a backup"
            )

    def _create(self) -> None:
        with self._unanchored():
            for statement in SCHEMA.split(";"):
                if statement.strip():
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _check(self) -> None:
        application, version = self._scalar("PRAGMA application_id"), self._scalar("PRAGMA user_version")
        if application != APPLICATION_ID:
            raise ConfigError(f"store/journal.db belongs to application {application:#x}: it is no fedshare journal")
        if version < SCHEMA_VERSION:
            with _database("bringing the journal to the format of this release"), self._unanchored():
                migrate(self._db, version)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Run one transaction; it is durable when the block has ended and undone when the block raises."""
        with self._unanchored():
            yield
            self._count += 1
            self.change("UPDATE meta SET value = ? WHERE name = 'transactions'", (str(self._count),))
        self._anchor.write(Mark(self._count, *self._last))
        if self._sums.log_bytes > _CHECKPOINT_BYTES:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Move the write-ahead log into the file, page sums included, and empty it."""
        with _database("copying the journal's log"):
            busy, frames, copied = self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if busy or copied != frames:
            raise StorageError(f"the journal's log could not be copied: {copied} of {frames} pages")
        self._sums.take_over(frames)
        with _database("emptying the journal's log"):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def copy_to(self, path: Path) -> None:
        """Write a consistent copy of the journal, with its page sums and anchor, to a new file; all durable.

        Raises:
            StorageError: it could not be read, or not be written.
        """
        with _database("copying the journal"):
            target = sqlite3.connect(path)
            try:
                self._db.backup(target)
            finally:
                target.close()
        PageSums(path).recount()
        anchor = Anchor(path.with_name("anchor"))
        try:
            anchor.write(Mark(self._count, *self._last))
        finally:
            anchor.close()
        with storage("copying the journal"):
            flush_directory(path.parent)

    @contextmanager
    def _unanchored(self) -> Iterator[None]:
        """Run one transaction that the anchor does not count."""
        with _database("beginning a transaction"):
            self._db.execute("BEGIN IMMEDIATE")
        last, count = self._last, self._count
        try:
            yield
        except BaseException:
            self._last, self._count = last, count
            if self._db.in_transaction:
                with _database("undoing a transaction"):
                    self._db.execute("ROLLBACK")
            raise
        with _database("committing to the journal"):
            self._db.execute("COMMIT")

    def change(self, statement: str, values: Sequence[Any] = ()) -> int:
        """Run a statement inside a transaction and return how many rows it changed."""
        if not self._db.in_transaction:
            raise StorageError("the journal is changed outside a transaction: this is a fault in the program")
        with _database("writing to the journal"):
            return self._db.execute(statement, values).rowcount

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Return all rows of a query."""
        with _database("reading the journal"):
            return self._db.execute(statement, values).fetchall()

    def row(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Row | None:
        """Return the first row of a query, or None."""
        with _database("reading the journal"):
            found: sqlite3.Row | None = self._db.execute(statement, values).fetchone()
            return found

    def append_entry(self, kind: str, body: dict[str, Any]) -> tuple[int, bytes]:
        """Add one entry to the chain inside a transaction; return (its number, its hash)."""
        text = canonical(body)
        seq, previous = self._last[0] + 1, self._last[1]
        digest = entry_hash(previous, kind, text)
        self.change("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", (seq, kind, text, previous, digest))
        self._last = (seq, digest)
        return self._last

    def verify_chain(self) -> dict[int, tuple[str, dict[str, Any], str]]:
        """Re-hash every entry; return (kind, body, hexadecimal hash) by number.

        Raises:
            StorageError: an entry was changed, removed or inserted.
        """
        previous, expected = _GENESIS, 1
        found: dict[int, tuple[str, dict[str, Any], str]] = {}
        for row in self.rows("SELECT * FROM entries ORDER BY seq"):
            digest = entry_hash(previous, row["kind"], row["body"])
            if row["seq"] != expected or row["previous"] != previous or row["hash"] != digest:
                raise StorageError(
                    f"the journal's hash chain breaks at entry {row['seq']} (expected entry {expected}): "
                    "the store was damaged or tampered with; restore it from a backup"
                )
            found[expected] = (row["kind"], json.loads(row["body"]), digest.hex())
            previous, expected = digest, expected + 1
        return found

    def close(self) -> None:
        """Close the file; the write-ahead log is folded in."""
        try:
            self.checkpoint()
        except BaseException:
            self.abandon()
            raise
        with _database("closing the journal"):
            self._db.close()
        self._anchor.close()

    def abandon(self) -> None:
        """Let go of the file after a failure, writing nothing more.

        SQLite copies its log into the file when a connection closes, and the page sums would not follow. So the
        connection is kept from closing: after a failure the process is about to end, and the next one reads what lies
        on the disk.
        """
        self._anchor.close()
        if hasattr(self, "_db"):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._db))

    def _read_last(self) -> tuple[int, bytes]:
        row = self.row("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1")
        return (row["seq"], row["hash"]) if row else (0, _GENESIS)

    def _scalar(self, statement: str) -> Any:
        row = self._db.execute(statement).fetchone()
        return None if row is None else row[0]


def canonical(body: dict[str, Any]) -> str:
    """Return ``body`` as the one JSON text that is hashed for it."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def entry_hash(previous: bytes, kind: str, body: str) -> bytes:
    """Return the hash of an entry that follows ``previous``; the formula stands in the module's docstring."""
    parts = b"".join(len(text.encode()).to_bytes(8, "big") + text.encode() for text in (kind, body))
    return hashlib.sha256(_DOMAIN + previous + parts).digest()


def refuse_newer(path: Path) -> None:
    """Refuse a journal of a format that this release does not know, before a byte of the store is changed.

    Raises:
        ConfigError: it is one. StorageError: the disk refused.
    """
    if (version := stored_format(path)) > SCHEMA_VERSION:
        raise ConfigError(
            f"the store has format {version} and this release of fedshare writes format {SCHEMA_VERSION}: "
            "use the newer release that wrote it; nothing was changed"
        )


def migrate(database: sqlite3.Connection, version: int) -> None:
    """Bring a journal of an older format to this release's, inside the transaction that the caller has begun."""
    for step in range(version, SCHEMA_VERSION):
        for statement in MIGRATIONS[step].split(";"):
            if statement.strip():
                database.execute(statement)
    database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def _is_whole(path: Path) -> bool:
    """Return whether a journal without a counted promise is kept: made completely, perhaps by format 1, or not ours.

    A creation that a power cut ended half way may leave anything. It is begun again, unless payloads show that promises
    were made: then the journal is damaged, and opening it says so. The file's header alone does not tell what it holds,
    since all of it may still be in the log.
    """
    if not path.exists() or path.stat().st_size == 0:
        return False
    with storage("reading the journal"), path.open("rb") as file:
        magic = file.read(16)
    if magic not in (b"SQLite format 3\0", bytes(16)) or any(path.parent.glob("blobs/*/*")):
        return True
    try:
        with closing(sqlite3.connect(path)) as database:
            made = database.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'entries'").fetchone()[0]
            return bool(made) and database.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
    except sqlite3.Error:
        return False


@contextmanager
def _database(what: str) -> Iterator[None]:
    """Turn every SQLite error into a StorageError: whatever went wrong, nothing may be acknowledged any more."""
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(f"the hub's storage failed while {what}: {error}") from error
