"""The anchor: a second, tiny record of how far the journal had come, so that a lost tail is noticed.

A write-ahead log ends where its checksums end: if one bit of it changes, SQLite takes the log to end there, and what
was committed after it is gone without a word. The hash chain cannot tell either, since a shorter chain is a chain. So
every commit is counted, and the count is written here, and flushed, before anybody is told about the commit. A journal
that has counted less than its anchor has lost something that was promised.

The file holds two slots of one disk sector each, written in turn; a sector is written whole or not at all. A slot is
``magic || count || entries || hash of the last entry`` and the SHA-256 of all that, filled up with zeros.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from share_core.durable import write_atomic
from share_core.errors import StorageError
from share_server.store.blobs import storage

SECTOR = 512
_MAGIC = b"fedshare anchor1"
_USED = len(_MAGIC) + 8 + 8 + 32


@dataclass(frozen=True)
class Mark:
    """How far a journal has come."""

    count: int
    """Committed transactions."""
    entries: int
    """Entries of the hash chain."""
    hash: bytes
    """Hash of the last entry; 32 zero bytes before the first."""


START = Mark(0, 0, bytes(32))
"""A journal that has promised nothing yet."""


class Anchor:
    """The open file. Use it from the journal's thread."""

    def __init__(self, path: Path) -> None:
        """Open the anchor, creating it at :data:`START`.

        Raises:
            StorageError: it is damaged, or the disk refused.
        """
        if not path.exists():
            with storage("creating the journal's anchor"):
                write_atomic(path, _slot(START) * 2)
        with storage("opening the journal's anchor"):
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.mark = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> Mark:
        with storage("reading the journal's anchor"):
            data = os.pread(self._file, 2 * SECTOR + 1, 0)
        slots = [_parse(data[i * SECTOR : (i + 1) * SECTOR]) for i in range(2)]
        marks = [mark for mark in slots if mark is not None]
        if len(data) != 2 * SECTOR or len(marks) != 2:
            raise StorageError("the journal's anchor (store/anchor) is damaged: restore the store from a backup")
        return max(marks, key=lambda mark: mark.count)

    def write(self, mark: Mark) -> None:
        """Record ``mark``; it is durable when this returns.

        Raises:
            StorageError: the disk refused.
        """
        with storage("writing the journal's anchor"):
            slot, done = _slot(mark), 0
            while done < len(slot):  # a write may take a part only
                done += os.pwrite(self._file, slot[done:], (mark.count % 2) * SECTOR + done)
            os.fdatasync(self._file)
        self.mark = mark

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _slot(mark: Mark) -> bytes:
    body = _MAGIC + mark.count.to_bytes(8, "big") + mark.entries.to_bytes(8, "big") + mark.hash
    body = body.ljust(SECTOR - 32, b"\0")
    return body + hashlib.sha256(body).digest()


def _parse(slot: bytes) -> Mark | None:
    body, digest = slot[:-32], slot[-32:]
    if len(slot) != SECTOR or hashlib.sha256(body).digest() != digest or not body.startswith(_MAGIC):
        return None
    at = len(_MAGIC)
    return Mark(
        int.from_bytes(body[at : at + 8], "big"), int.from_bytes(body[at + 8 : at + 16], "big"), body[at + 16 : _USED]
    )
