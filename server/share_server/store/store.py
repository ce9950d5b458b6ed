"""The store of one hub: payload files and journal behind threads, and one rule about failure.

Order rule, the reason why an acknowledgement can be trusted::

    payload durable -> row durable -> anchor durable -> ACK                 (an update)
    payload durable -> version row durable -> anchor durable -> publish     (a version)

Updates that are ready at the same time share the costly steps: their files are flushed side by side, then one group at
a time is renamed, its directories flushed and its rows committed together.

Failure rule: the first StorageError ends everything. The store remembers it, every later call raises it again
without touching the disk, :attr:`Store.failed` is set, and the process reports NOT_SERVING and exits. What is
true after a restart is what was read back from the disk.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from share_core.durable import write_atomic
from share_core.errors import ConfigError, StorageError
from share_core.merge import HubState
from share_core.types import SpaceSpec
from share_server.store.blobs import BlobStore, Staged, make_durable_directory, storage
from share_server.store.journal import Journal, refuse_newer
from share_server.store.records import NewUpdate, UpdateRow
from share_server.store.recovery import Verified, recover, tell_nobody
from share_server.store.updates import accept_updates

T = TypeVar("T")

_GROUP = 64
"""Most updates that share one commit."""

_FLUSHES = 8
"""Files flushed side by side; the file system joins their journal commits."""


_DIRECTORIES = 16
"""Directories flushed side by side."""


@dataclass(frozen=True)
class _Ready:
    """An update whose payload is flushed and that waits for its group."""

    staged: Staged
    new: NewUpdate
    now_ms: int
    answer: asyncio.Future[tuple[UpdateRow, bool]]


class Store:
    """An open store. :meth:`open` it inside the event loop that will use it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._loop = asyncio.get_running_loop()
        self._journal_thread = ThreadPoolExecutor(1, "journal")
        self._file_threads = ThreadPoolExecutor(4, "payloads")
        self._flush_threads = ThreadPoolExecutor(_FLUSHES, "flushes")
        self._adopting_thread = ThreadPoolExecutor(1, "adopting")  # never behind those who write or parse
        self._directory_threads = ThreadPoolExecutor(_DIRECTORIES, "directories")
        self._ready: list[_Ready] = []
        self._committer: asyncio.Task[None] | None = None
        self._failure: StorageError | None = None
        self.failed = asyncio.Event()
        """Set when the storage has failed: stop acknowledging and exit."""
        self._lock = lock_directory(root)

    @classmethod
    async def open(
        cls, root: Path, spec: SpaceSpec, keep_uploads_s: float = 0.0, verified: Verified = tell_nobody
    ) -> tuple[Store, HubState]:
        """Lock the directory, verify everything in it and return (the store, the newest committed state).

        Unfinished uploads younger than ``keep_uploads_s`` seconds can be continued. ``verified`` is told how far the
        verification is, on a thread.

        Raises:
            ConfigError: another hub runs on this directory, the store belongs to another space, or a newer
                release wrote it: then nothing was changed.
            StorageError: the store is damaged or the disk refused.
        """
        refuse_newer(root / "journal.db")
        store = cls(root)
        try:
            store.blobs = await store.io(lambda: BlobStore(root, keep_uploads_s))
            await store.io(lambda: _require_journal(root, store.blobs))
            store._journal = await store._on_journal(lambda: Journal(root / "journal.db", spec.space_id))
            state = await store.do(lambda journal: recover(journal, store.blobs, spec, verified))
            await store.io(lambda: _remember(root))
            await store.io(store.blobs.make_folders)
        except BaseException:
            if hasattr(store, "_journal"):
                store._journal.abandon()
            store._release()
            raise
        return store, state

    blobs: BlobStore
    """Payload files. Call its methods through :meth:`io`."""
    _journal: Journal

    @property
    def root(self) -> Path:
        """The directory of the store."""
        return self._root

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

    def here(self, work: Callable[[], T]) -> T:
        """Run ``work``, which reads payloads, on the calling thread, which is not the event loop's.

        Raises:
            StorageError: as for :meth:`do`.
        """
        return self._guarded(work)

    async def accept(self, staged: Staged, new: NewUpdate, now_ms: int) -> tuple[UpdateRow, bool]:
        """Make one received update durable; return (its row, whether it was there before). Then it may be acknowledged.

        Raises:
            StorageError: the disk refused: it may not be acknowledged.
            UpdateConflictError, UnknownTaskError: it is refused.
        """
        await self._loop.run_in_executor(self._flush_threads, self._guarded, staged.sync)
        ready = _Ready(staged, new, now_ms, self._loop.create_future())
        self._ready.append(ready)
        if self._committer is None or self._committer.done():
            self._committer = asyncio.create_task(self._commit_ready(), name="group commit")
        return await ready.answer

    def require_sound(self) -> None:
        """Raise StorageError if the storage has failed, whoever met it: nothing is acknowledged any more then."""
        if self._failure is not None:
            raise StorageError(str(self._failure))

    async def _commit_ready(self) -> None:
        """Commit whatever is ready, group after group, until nothing is."""
        while self._ready:
            group, self._ready = self._ready[:_GROUP], self._ready[_GROUP:]
            try:
                answers = await self._commit_group(group)
            except Exception as error:
                answers = [error] * len(group)
            for ready, answer in zip(group, answers, strict=True):
                if ready.answer.done():
                    continue
                if isinstance(answer, Exception):
                    ready.answer.set_exception(answer)
                else:
                    ready.answer.set_result(answer)

    async def _commit_group(self, group: list[_Ready]) -> Sequence[tuple[UpdateRow, bool] | Exception]:
        # The same payload may be in the group twice; its second file is renamed over the first, which is harmless.
        files = [ready.staged for ready in group]
        adopting = lambda: self.blobs.adopt(files, self._directory_threads.map)  # noqa: E731
        await self._loop.run_in_executor(self._adopting_thread, self._guarded, adopting)
        news, now_ms = [ready.new for ready in group], max(ready.now_ms for ready in group)
        return await self.do(lambda journal: accept_updates(journal, news, now_ms))

    async def close(self) -> None:
        """Finish what was begun, close the journal and free the directory; also after a failure."""
        if self._committer is not None:
            await asyncio.gather(self._committer, return_exceptions=True)
        if self._failure is None:
            await self._loop.run_in_executor(self._journal_thread, self._journal.close)
        else:
            # Nothing more can be promised; what lies on the disk now is read back by the next start.
            await self._loop.run_in_executor(self._journal_thread, self._journal.abandon)
        self._release()

    async def _on_journal(self, work: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._journal_thread, self._guarded, work)

    def _guarded(self, work: Callable[[], T]) -> T:
        """Run ``work`` on a thread. A failure is noted here, since the caller may be gone when it happens."""
        self.require_sound()
        try:
            return work()
        except StorageError as error:
            self._failure = self._failure or error
            self._loop.call_soon_threadsafe(self.failed.set)
            raise

    def _release(self) -> None:
        self._journal_thread.shutdown(wait=True)
        self._file_threads.shutdown(wait=True)
        self._flush_threads.shutdown(wait=True)
        self._adopting_thread.shutdown(wait=True)
        self._directory_threads.shutdown(wait=True)
        os.close(self._lock)


def _begun(root: Path) -> Path:
    """Return the file beside the store that says that it has been begun."""
    return root.with_name(root.name + ".begun")


def _remember(root: Path) -> None:
    if not _begun(root).exists():
        with storage("remembering that the store is begun"):
            write_atomic(_begun(root), b"The store beside this file holds what a hub has promised.\n")


def _require_journal(root: Path, blobs: BlobStore) -> None:
    """Refuse to begin anew where promises were made: an empty journal would forget what was acknowledged.

    Raises:
        StorageError: the journal is gone or empty, and payloads or the mark beside the store say that it was there.
    """
    path = root / "journal.db"
    if not path.exists() and _begun(root).exists() and blobs.empty():
        raise StorageError(
            f"the store is gone: bring {root.name}/ back from a backup, or remove {_begun(root).name} beside it to "
            "begin an empty space"
        )
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
