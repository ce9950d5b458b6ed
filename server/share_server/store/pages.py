"""Sums of the journal's pages: SQLite itself notices little of what happens to a file while nobody looks.

``journal.sums`` holds a CRC-32 per page of ``journal.db``. The main file changes only in a checkpoint, when pages move
into it from the write-ahead log, and checkpoints are made by us alone, in this order::

    pages copied and flushed, the log kept -> sums of those pages written and flushed -> log emptied

So at any moment a page either matches its sum, or a copy of it as it should be is in the log, where SQLite's own
checksums guard it; whether the log is complete is what :mod:`share_server.store.anchor` tells. A CRC-32 finds every
change of up to 32 bits in a row, and misses any other with a chance of one in four billion: this is about decay, not
about attackers, whom the hash chain and the signed manifests stop.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

from share_core.durable import write_atomic
from share_core.errors import StorageError
from share_server.store.blobs import storage

PAGE = 4096
"""Bytes per page of the journal."""

_MAGIC = b"fedshare sums 1\n"
_WAL_HEADER = 32
_FRAME_HEADER = 24
_FORMAT = slice(60, 64)  # of page 1: where SQLite keeps ``user_version``


class PageSums:
    """The sums of one journal file."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._log = database.with_name(database.name + "-wal")
        self._path = database.with_suffix(".sums")
        self._sums = array("I")

    def load(self) -> None:
        """Read the sums.

        Raises:
            StorageError: the file is damaged.
        """
        with storage("reading the journal's page sums"):
            data = self._path.read_bytes() if self._path.exists() else None
        if data is None:
            return
        body, digest = data[:-32], data[-32:]
        if not body.startswith(_MAGIC) or hashlib.sha256(body).digest() != digest:
            raise StorageError("the journal's page sums (store/journal.sums) are damaged: restore from a backup")
        self._sums = array("I")
        self._sums.frombytes(body[len(_MAGIC) :])

    def check(self) -> None:
        """Compare every page of the closed journal with its sum.

        Raises:
            StorageError: a page has changed and the log holds no newer copy of it, or pages are missing.
        """
        for problem in self.problems():
            raise StorageError(f"{problem}: restore the store from a backup")

    def problems(self) -> Iterator[str]:
        """Yield everything that :meth:`check` would refuse."""
        if not self._database.exists():
            if self._sums:
                yield "the journal (store/journal.db) is gone"
            return
        logged = {number for number, _ in self._frames()}
        with storage("checking the journal's pages"), self._database.open("rb") as file:
            number = 0
            while page := file.read(PAGE):
                number += 1
                known = self._sums[number - 1] if number <= len(self._sums) else None
                if zlib.crc32(page) != known and number not in logged:
                    yield f"page {number} of the journal is damaged"
        if number < len(self._sums):
            yield f"the journal ends after {number} of {len(self._sums)} pages"

    def recount(self) -> None:
        """Write the sums of the whole file, whose log must be empty; durable when this returns."""
        with storage("writing the journal's page sums"), self._database.open("rb") as file:
            self._sums = array("I")
            while page := file.read(PAGE):
                self._sums.append(zlib.crc32(page))
            self._write()

    def take_over(self, frames: int) -> None:
        """Write the sums of the pages in the first ``frames`` frames of the log; durable when this returns."""
        with storage("writing the journal's page sums"):
            for number, page in self._frames(frames):
                while len(self._sums) < number:
                    self._sums.append(0)
                self._sums[number - 1] = zlib.crc32(page)
            self._write()

    def _write(self) -> None:
        body = _MAGIC + self._sums.tobytes()
        write_atomic(self._path, body + hashlib.sha256(body).digest())

    @property
    def log_bytes(self) -> int:
        """Size of the write-ahead log."""
        try:
            return self._log.stat().st_size
        except FileNotFoundError:
            return 0

    def _frames(self, most: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Yield (page number, page) of the log's frames, oldest first, at most ``most``."""
        yield from _log_frames(self._log, most)


def stored_format(database: Path) -> int:
    """Return the format number of a journal, reading the file and its log only; 0 where there is no journal.

    Raises:
        StorageError: the disk refused.
    """
    log = database.with_name(database.name + "-wal")
    with storage("reading the journal's format"):
        if not database.exists():
            return 0
        with database.open("rb") as file:
            pages = [file.read(PAGE)]
        pages += [page for number, page in _log_frames(log, None) if number == 1]
    return int.from_bytes(pages[-1][_FORMAT], "big") if pages[-1].startswith(b"SQLite format 3\0") else 0


def _log_frames(log: Path, most: int | None) -> Iterator[tuple[int, bytes]]:
    if not log.exists():
        return
    with log.open("rb") as file:
        header = file.read(_WAL_HEADER)
        done = 0
        while done != most and len(frame := file.read(_FRAME_HEADER + PAGE)) == _FRAME_HEADER + PAGE:
            if frame[8:16] != header[16:24]:  # the salts: what follows is of an earlier life of the file
                return
            yield int.from_bytes(frame[:4], "big"), frame[_FRAME_HEADER:]
            done += 1


def remove_unused(database: Path) -> None:
    """Remove a journal that has promised nothing, so that it is created anew."""
    with storage("removing an unfinished journal"):
        for name in (database.name, database.name + "-wal", database.with_suffix(".sums").name):
            database.with_name(name).unlink(missing_ok=True)
        handle = os.open(database.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
