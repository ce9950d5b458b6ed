"""Content-addressed files: the durable half of every payload.

Layout: ``blobs/ab/<sha256>`` where ``ab`` are the first two digits; ``staging/<random>`` while being written.

A blob is durable when :meth:`Staged.commit` has returned, because of this order and nothing else::

    write staging file -> fsync(file) -> rename to its SHA-256 name -> fsync(directory)

``fsync`` is never tried twice: after a failure the kernel may have dropped the dirty pages, and a second call
would report success for bytes that are gone. Any ``OSError`` becomes
:class:`~share_core.errors.StorageError`, after which the process must stop acknowledging and end.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from share_core.durable import flush_directory
from share_core.errors import StorageError, UnavailableError


class Staged:
    """A payload being received: write it, then :meth:`commit` or :meth:`discard` it, from any thread."""

    def __init__(self, store: BlobStore, path: Path) -> None:
        self._store = store
        self._path = path
        self._hash = hashlib.sha256()
        self._open = True
        self._turn = threading.Lock()  # a caller that went away discards while a thread may still be writing
        with storage("creating a staging file"):
            self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self.size = 0

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of what was written so far."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Append ``data``; it is not durable yet.

        Raises:
            StorageError: the disk refused.
        """
        with self._turn:
            self._require_open()
            self._hash.update(data)
            self.size += len(data)
            view = memoryview(data)
            with storage("writing a payload"):
                while view:
                    view = view[os.write(self._file, view) :]

    def read(self) -> bytes:
        """Return everything written so far."""
        with self._turn, storage("reading a staged payload"):
            self._require_open()
            return os.pread(self._file, self.size, 0)

    def commit(self) -> str:
        """Make the payload durable under its digest and return the digest.

        Raises:
            StorageError: the disk refused; the payload is not durable.
        """
        digest = self.sha256
        target = self._store.path(digest)
        with self._turn, storage("making a payload durable"):
            self._require_open()
            sync_file(self._file)
            self._close()
            make_durable_directory(target.parent)
            os.rename(self._path, target)  # noqa: PTH104 - the order of these calls is checked by a test
            flush_directory(target.parent)
        return digest

    def discard(self) -> None:
        """Throw the payload away; nothing happens after a commit."""
        with self._turn, storage("removing a staging file"):
            if self._open:
                self._close()
                self._path.unlink(missing_ok=True)

    def _require_open(self) -> None:
        if not self._open:
            raise UnavailableError("this upload was given up: send it again")

    def _close(self) -> None:
        self._open = False
        os.close(self._file)


class BlobStore:
    """All payloads of one hub."""

    def __init__(self, root: Path) -> None:
        """Open the store under ``root``, creating it if needed, and remove what an earlier life left in staging."""
        self._blobs = root / "blobs"
        self._staging = root / "staging"
        with storage("opening the payload store"):
            for folder in (self._blobs, self._staging):
                make_durable_directory(folder)
            for rest in self._staging.iterdir():
                rest.unlink()

    def path(self, digest: str) -> Path:
        """Return where the payload with this hexadecimal SHA-256 lies."""
        return self._blobs / digest[:2] / digest

    def stage(self) -> Staged:
        """Begin a new payload."""
        return Staged(self, self._staging / secrets.token_hex(16))

    def put(self, payload: bytes) -> str:
        """Make ``payload`` durable and return its hexadecimal SHA-256."""
        staged = self.stage()
        try:
            staged.write(payload)
            return staged.commit()
        finally:
            staged.discard()

    def read(self, digest: str) -> bytes:
        """Return the payload with this digest, re-hashed.

        Raises:
            StorageError: it is missing or its bytes have changed: the store is damaged.
        """
        with storage(f"reading payload {digest}"):
            payload = self.path(digest).read_bytes()
        if hashlib.sha256(payload).hexdigest() != digest:
            raise StorageError(
                f"payload {digest} is damaged: its bytes no longer match its name; restore it from a backup"
            )
        return payload

    def verify(self, digest: str, size: int) -> None:
        """Check one payload without keeping it.

        Raises:
            StorageError: it is missing, has another size, or its bytes have changed.
        """
        with storage(f"verifying payload {digest}"):
            got = self.path(digest).stat().st_size
            with self.path(digest).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        if got != size or found != digest:
            raise StorageError(
                f"payload {digest} is damaged: expected {size} bytes of that digest, got {got} bytes of {found}"
            )

    def empty(self) -> bool:
        """Return whether no payload was ever kept here."""
        with storage("looking for payloads"):
            return next(self._blobs.glob("*/*"), None) is None

    def free_bytes(self) -> int:
        """Return how many bytes this user may still write on the disk."""
        with storage("asking for free space"):
            info = os.statvfs(self._blobs)
        return info.f_bavail * info.f_frsize


@contextmanager
def storage(what: str) -> Iterator[None]:
    """Turn ``OSError`` into a StorageError that says what was being done, without paths: clients read it too."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"the hub's storage failed while {what}: {error.strerror or error}") from error


def sync_file(file: int) -> None:
    """Flush one open file to the disk. Called once per file, never again after a failure."""
    os.fsync(file)


def make_durable_directory(path: Path) -> None:
    """Create ``path`` if it is missing, with its name flushed in the parent."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        flush_directory(path.parent)
