"""The store of one hub: payload files and journal behind threads, and one rule about failure.

Order rule, the reason why an acknowledgement can be trusted::

    payload durable -> row durable -> ACK                 (an update)
    payload durable -> version row durable -> publish     (a version)

Failure rule: the first StorageError ends everything. The store remembers it, every later call raises it again
without touching the disk, :attr:`Store.failed` is set, and the process reports NOT_SERVING and exits. What is
true after a restart is what was read back from the disk.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from share_core.errors import ConfigError, StorageError
from share_core.merge import HubState
from share_core.types import SpaceSpec
from share_server.store.blobs import BlobStore, make_durable_directory, storage
from share_server.store.journal import Journal
from share_server.store.recovery import recover

T = TypeVar("T")


class Store:
    """An open store. :meth:`open` it inside the event loop that will use it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._loop = asyncio.get_running_loop()
        self._journal_thread = ThreadPoolExecutor(1, "journal")
        self._file_threads = ThreadPoolExecutor(4, "payloads")
        self._failure: StorageError | None = None
        self.failed = asyncio.Event()
        """Set when the storage has failed: stop acknowledging and exit."""
        self._lock = lock_directory(root)

    @classmethod
    async def open(cls, root: Path, spec: SpaceSpec) -> tuple[Store, HubState]:
        """Lock the directory, verify everything in it and return (the store, the newest committed state).

        Raises:
            ConfigError: another hub runs on this directory, or the store belongs to another space.
            StorageError: the store is damaged or the disk refused.
        """
        store = cls(root)
        try:
            store.blobs = await store.io(lambda: BlobStore(root))
            await store.io(lambda: _require_journal(root, store.blobs))
            store._journal = await store._on_journal(lambda: Journal(root / "journal.db", spec.space_id))
            state = await store.do(lambda journal: recover(journal, store.blobs, spec))
        except BaseException:
            store._release()
            raise
        return store, state

    blobs: BlobStore
    """Payload files. Call its methods through :meth:`io`."""
    _journal: Journal

    async def do(self, work: Callable[[Journal], T]) -> T:
        """Run ``work`` with the journal on the journal's own thread.

        Raises:
            StorageError: now, or earlier in the life of this store; whatever else ``work`` raises.
        """
        return await self._on_journal(lambda: work(self._journal))

    async def io(self, work: Callable[[], T]) -> T:
        """Run ``work``, which reads or writes payloads, on a thread.

        Raises:
            StorageError: as for :meth:`do`.
        """
        return await self._loop.run_in_executor(self._file_threads, self._guarded, work)

    async def close(self) -> None:
        """Finish what was begun, close the journal and free the directory; also after a failure."""
        closing = self._loop.run_in_executor(self._journal_thread, self._journal.close)
        if self._failure is None:
            await closing
        else:
            # Nothing more can be promised; what a close leaves behind is read back by the next start.
            await asyncio.gather(closing, return_exceptions=True)
        self._release()

    async def _on_journal(self, work: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._journal_thread, self._guarded, work)

    def _guarded(self, work: Callable[[], T]) -> T:
        """Run ``work`` on a thread. A failure is noted here, since the caller may be gone when it happens."""
        if self._failure is not None:
            raise StorageError(str(self._failure))
        try:
            return work()
        except StorageError as error:
            self._failure = self._failure or error
            self._loop.call_soon_threadsafe(self.failed.set)
            raise

    def _release(self) -> None:
        self._journal_thread.shutdown(wait=True)
        self._file_threads.shutdown(wait=True)
        os.close(self._lock)


def _require_journal(root: Path, blobs: BlobStore) -> None:
    """Refuse payloads without a journal: an empty one would begin a new space and forget what was acknowledged.

    Raises:
        StorageError: the journal is gone or empty and payloads are there.
    """
    path = root / "journal.db"
    if (not path.exists() or path.stat().st_size == 0) and not blobs.empty():
        raise StorageError(
            "the journal (store/journal.db) is gone, but payloads of earlier updates are there: bring it back from a "
            "backup, or move the whole store away to begin an empty space"
        )


def lock_directory(root: Path) -> int:
    """Take ``root`` for this process alone and return the open lock; the kernel frees it when the process ends.

    Raises:
        ConfigError: another process holds it.
    """
    with storage("locking the store"):
        make_durable_directory(root)
        handle = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise ConfigError(f"another hub (process {owner}) already runs on {root}: stop it first") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle
