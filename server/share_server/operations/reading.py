"""Reading the store of a stopped server without changing a byte of it.

Opening a journal folds its log in and may bring it to a newer format. What only reads therefore copies the journal into
a temporary directory and opens that; payload files never change, so they are read where they lie.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from share_core.errors import ConfigError, StorageError
from share_server.layout import Layout
from share_server.store.blobs import BlobStore, storage
from share_server.store.journal import Journal, migrate, refuse_newer
from share_server.store.pages import stored_format
from share_server.store.schema import APPLICATION_ID, SCHEMA_VERSION
from share_server.store.store import Store

T = TypeVar("T")

JOURNAL_FILES = ("journal.db", "journal.db-wal", "journal.db-journal", "journal.sums", "anchor")
"""What a journal consists of, as far as it is there."""

Told = Callable[[str, int, int], None]
"""Told (what is being done, how many are done, how many there are)."""


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


class ReadJournal(Journal):
    """A copy of a journal, opened for reading as far as SQLite can read it, and brought to this release's format."""

    def __init__(self, path: Path) -> None:
        """Open the copy.

        Raises:
            StorageError: SQLite cannot read it at all. ConfigError: it is no journal of this program.
        """
        self.format = stored_format(path)
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            application = self._scalar("PRAGMA application_id")
            if application == APPLICATION_ID and self.format < SCHEMA_VERSION:
                self._db.execute("BEGIN")
                migrate(self._db, self.format)
                self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise StorageError(f"the journal cannot be read: {error}") from error
        if application != APPLICATION_ID:
            raise ConfigError(f"store/journal.db belongs to application {application:#x}: it is no fedshare journal")

    def meta(self, name: str) -> str:
        """Return one value of the table ``meta``; empty if it is not there."""
        row = self.row("SELECT value FROM meta WHERE name = ?", (name,))
        return "" if row is None else str(row[0])

    def suppose(self, work: Callable[[], None]) -> None:
        """Let ``work`` change the copy, to see what would follow from it."""
        self._db.execute("BEGIN")
        work()
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the copy."""
        self._db.close()


class ReadStore(Store):
    """The payloads of a store and the copy of its journal. A failure is told to the caller and not remembered."""

    journal: ReadJournal

    @classmethod
    async def of(cls, folder: Path) -> ReadStore:
        """Open what :func:`copied` has made.

        Raises:
            StorageError, ConfigError: as :class:`ReadJournal`.
        """
        store = cls(folder)
        try:
            store.blobs = BlobStore(folder)
            store.journal = await store._on_journal(lambda: ReadJournal(folder / "journal.db"))
            store._journal = store.journal
        except BaseException:
            store._release()
            raise
        return store

    async def look(self, work: Callable[[ReadJournal], T]) -> T:
        """Run ``work`` with the copied journal on its thread."""
        return await self._on_journal(lambda: work(self.journal))

    def _guarded(self, work: Callable[[], T]) -> T:
        return work()


@contextmanager
def held(layout: Layout) -> Iterator[None]:
    """Keep every hub off this directory, without writing into it.

    Raises:
        ConfigError: it is no server directory, a hub runs on it, or a newer release wrote it.
    """
    if not layout.space.is_file() or not layout.store.is_dir():
        raise ConfigError(f"{layout.root} is no server directory with a store, nor a backup of one")
    refuse_newer(layout.store / "journal.db")
    with _lock(layout):
        yield


def is_running(layout: Layout) -> bool:
    """Return whether a hub, or another operation, has taken the store."""
    try:
        with _lock(layout):
            return False
    except ConfigError:
        return True


@contextmanager
def _lock(layout: Layout) -> Iterator[None]:
    path = layout.store / "lock"
    if not path.exists():  # no hub was ever started here, as in a backup
        yield
        return
    with storage("locking the store"):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise ConfigError(f"a hub (process {owner}) runs on {layout.root}: stop it first") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def copied(layout: Layout) -> Iterator[Path]:
    """Copy the journal beside a link to the payloads, into a temporary directory that is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="fedshare-") as name:
        folder = Path(name)
        with storage("copying the journal"):
            for one in JOURNAL_FILES:
                if (layout.store / one).exists():
                    shutil.copyfile(layout.store / one, folder / one)
            if (layout.store / "blobs").is_dir():
                (folder / "blobs").symlink_to((layout.store / "blobs").resolve())
        yield folder


@asynccontextmanager
async def reading(folder: Path) -> AsyncIterator[ReadStore]:
    """Open the copy in ``folder`` and close it in the end; raises as :meth:`ReadStore.of`."""
    store = await ReadStore.of(folder)
    try:
        yield store
    finally:
        await store.close()
