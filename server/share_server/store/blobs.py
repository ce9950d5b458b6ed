"""Content-addressed files: the durable half of every payload.

Layout: ``blobs/ab/<sha256>`` where ``ab`` are the first two digits; ``staging/t-<random>`` while being written by the
hub itself, ``staging/u-<key>`` while being received: an upload whose connection broke stays there and can be continued.

A blob is durable when :meth:`BlobStore.adopt` has returned, because of this order and nothing else::

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
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from share_core.durable import flush_directory
from share_core.errors import StorageError, UnavailableError

_READ_BYTES = 2**20

Each = Callable[[Callable[[Path], None], list[Path]], Iterable[None]]


class Staged:
    """A payload being received: write it, then commit, suspend or discard it, from any thread."""

    def __init__(self, store: BlobStore, path: Path, resume: bool = False) -> None:
        """Begin ``path``, which is made at the first write; or with ``resume`` go on with what lies there."""
        self._store = store
        self._path = path
        self._hash = hashlib.sha256()
        self._open = True
        self._turn = threading.Lock()  # a caller that went away discards while a thread may still be writing
        self._file: int | None = None
        self.size = 0
        if resume:
            with storage("reading a staged payload"):
                self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                while part := os.read(self._file, _READ_BYTES):
                    self._hash.update(part)
                    self.size += len(part)

    @property
    def open(self) -> bool:
        """Whether it is neither committed, suspended nor discarded."""
        return self._open

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of what was written so far."""
        return self._hash.hexdigest()

    def write(self, *parts: bytes | memoryview) -> None:
        """Append ``parts``; they are not durable yet.

        Raises:
            StorageError: the disk refused.
        """
        with self._turn:
            file = self._require_file()
            for part in parts:
                self._hash.update(part)
                self.size += len(part)
                view = memoryview(part)
                with storage("writing a payload"):
                    while view:
                        view = view[os.write(file, view) :]

    def read(self) -> bytes:
        """Return everything written so far."""
        with self._turn, storage("reading a staged payload"):
            return os.pread(self._require_file(), self.size, 0)

    def reader(self) -> int:
        """Return a descriptor that reads what was written so far; the caller closes it.

        Raises:
            StorageError: the disk refused. UnavailableError: the payload was given up.
        """
        with self._turn, storage("opening a staged payload"):
            self._require_file()
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def sync(self) -> None:
        """Flush the bytes to the disk; the payload has no name yet under which it would be found.

        Raises:
            StorageError: the disk refused.
        """
        with self._turn, storage("making a payload durable"):
            sync_file(self._require_file())

    def commit(self) -> str:
        """Make the payload durable under its digest and return the digest.

        Raises:
            StorageError: the disk refused; the payload is not durable.
        """
        self.sync()
        self._store.adopt([self])
        return self.sha256

    def rename(self, target: Path) -> None:
        """Give the flushed payload its name; durable once the directory of ``target`` is flushed."""
        with self._turn:
            self._require_file()
            self._close()
            os.rename(self._path, target)  # noqa: PTH104 - the order of these calls is checked by a test

    def suspend(self) -> int:
        """Keep what was received for another connection to continue; return how many bytes that are, now durable."""
        with self._turn, storage("keeping an unfinished upload"):
            if not self._open:
                return 0
            if self._file is not None:
                sync_file(self._file)
            self._close()
        return self.size

    def discard(self) -> None:
        """Throw the payload away; nothing happens after a commit."""
        with self._turn, storage("removing a staging file"):
            if self._open:
                made = self._file is not None
                self._close()
                if made:
                    self._path.unlink(missing_ok=True)

    def _require_file(self) -> int:
        """Return the open file, made now if nothing was written yet."""
        if not self._open:
            raise UnavailableError("this upload was given up: send it again")
        if self._file is None:
            with storage("creating a staging file"):
                self._file = os.open(self._path, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC, 0o600)
        return self._file

    def _close(self) -> None:
        self._open = False
        if self._file is not None:
            os.close(self._file)


class BlobStore:
    """All payloads of one hub."""

    def __init__(self, root: Path, keep_uploads_s: float = 0.0) -> None:
        """Open the store under ``root``, creating it if needed.

        What an earlier life left in staging is removed, except uploads touched in the last ``keep_uploads_s`` seconds.
        """
        self._blobs = root / "blobs"
        self._staging = root / "staging"
        with storage("opening the payload store"):
            for folder in (self._blobs, self._staging):
                make_durable_directory(folder)
            for rest in self._staging.glob("t-*"):
                rest.unlink()
        self.forget_uploads(keep_uploads_s)

    def make_folders(self) -> None:
        """Make every folder of payloads at once: one flush now instead of one at each first use."""
        with storage("making the folders of payloads"):
            missing = {f"{number:02x}" for number in range(256)} - {path.name for path in self._blobs.iterdir()}
            for name in missing:
                (self._blobs / name).mkdir()
            if missing:
                flush_directory(self._blobs)

    def path(self, digest: str) -> Path:
        """Return where the payload with this hexadecimal SHA-256 lies."""
        return self._blobs / digest[:2] / digest

    def stage(self, key: str = "") -> Staged:
        """Begin a new payload; with a ``key`` (a file name) it can be resumed later, and replaces an older one."""
        return Staged(self, self._staging / (f"u-{key}" if key else f"t-{secrets.token_hex(16)}"))

    def resume(self, key: str) -> Staged:
        """Continue the upload ``key`` where it was suspended; a fresh one where nothing is kept."""
        path = self._staging / f"u-{key}"
        return Staged(self, path, resume=path.exists())

    def kept_bytes(self, key: str) -> int:
        """Return how many bytes of the upload ``key`` are kept; 0 for none."""
        try:
            return (self._staging / f"u-{key}").stat().st_size
        except FileNotFoundError:
            return 0

    def uploads(self) -> list[tuple[str, int, float]]:
        """Return (key, bytes, when touched) of every unfinished upload, oldest first."""
        found = []
        with storage("looking at unfinished uploads"):
            for path in self._staging.glob("u-*"):
                with suppress(FileNotFoundError):  # committed or given up since it was listed
                    info = path.stat()
                    found.append((path.name[2:], info.st_size, info.st_mtime))
        return sorted(found, key=lambda one: one[2])

    def forget_uploads(self, older_than_s: float, keys: Iterable[str] = ()) -> None:
        """Remove unfinished uploads that nobody touched for ``older_than_s`` seconds, and those named."""
        named = {f"u-{key}" for key in keys}
        with storage("removing unfinished uploads"):
            for path in self._staging.glob("u-*"):
                with suppress(FileNotFoundError):  # committed or given up since it was listed
                    if path.name in named or time.time() - path.stat().st_mtime >= older_than_s:
                        path.unlink(missing_ok=True)

    def adopt(self, group: Sequence[Staged], each: Each = map) -> None:
        """Give flushed payloads the names under which they are found; all durable when this returns.

        ``each`` applies a function to all of a list, like ``map``. With one that does so side by side, the flushes of
        the directories join the same commit of the file system; one after the other each would begin another one, which
        writes out whatever other uploads have brought meanwhile.

        Raises:
            StorageError: the disk refused; none of them counts as durable.
        """
        with storage("making a payload durable"):
            targets = [self.path(staged.sha256) for staged in group]
            folders = sorted({target.parent for target in targets})
            for folder in folders:
                make_durable_directory(folder)
            for staged, target in zip(group, targets, strict=True):
                staged.rename(target)
            list(each(flush_directory, folders))

    def remove(self, digests: Iterable[str]) -> int:
        """Remove payloads that no row needs any more; return how many bytes that freed."""
        freed = 0
        with storage("removing collected payloads"):
            for digest in digests:
                path = self.path(digest)
                if path.exists():
                    freed += path.stat().st_size
                    path.unlink()
        return freed

    def unreferenced(self, referenced: Container[str], older_than_s: float) -> list[str]:
        """Return payloads that no row needs and that are older than ``older_than_s``: left behind by a crash."""
        with storage("looking for left over payloads"):
            return [
                path.name
                for path in self._blobs.glob("*/*")
                if path.name not in referenced and time.time() - path.stat().st_mtime > older_than_s
            ]

    def erase(self, digests: Iterable[str], keys: Iterable[str]) -> int:
        """Remove payloads and unfinished uploads so that no power cut brings them back; return the freed bytes."""
        gone = sorted(digests)
        freed = self.remove(gone)
        self.forget_uploads(float("inf"), keys)
        with storage("flushing removals"):
            for folder in sorted({self.path(digest).parent for digest in gone} | {self._staging}):
                flush_directory(folder)
        return freed

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
