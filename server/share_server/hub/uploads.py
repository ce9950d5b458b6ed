"""Uploads in progress and unfinished ones: where a broken connection left off, another one goes on.

A payload grows in a staging file named after its member and update id. When the connection breaks, the file is flushed
and stays; ``GetUpload`` tells its length, and a new ``Submit`` continues from there. The newest connection wins: it
takes the file over from one that still seems alive, since that is what a client sees that has reconnected. Only what
is being committed right now is waited for. What a client may leave behind is bounded per organisation and in time.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from share_core.errors import OverloadError, UnavailableError
from share_server.config import RetentionConfig
from share_server.hub.access import Caller
from share_server.store.blobs import Staged
from share_server.store.store import Store


@dataclass
class Upload:
    """One payload being received."""

    key: str
    """Name of its staging file."""
    staged: Staged
    """The file."""
    committing: bool = False
    """Whether all bytes are there and being made durable."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is durable, suspended or discarded."""


class Uploads:
    """All uploads of one hub."""

    def __init__(self, store: Store, config: RetentionConfig) -> None:
        self._store = store
        self._config = config
        self._active: dict[str, Upload] = {}
        self._left = {key: length for key, length, _ in store.blobs.uploads()}  # unfinished ones, oldest first
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def settled(self, caller: Caller, update_id: str) -> None:
        """Wait until no connection is committing this very update."""
        upload = self._active.get(_key(caller, update_id))
        if upload is not None and upload.committing:
            await upload.over.wait()

    async def begin(self, caller: Caller, update_id: str, offset: int, size: int) -> Upload:
        """Begin a payload of ``size`` bytes, or go on at ``offset``; an older connection loses it.

        Raises:
            UnavailableError: the hub has another number of bytes than ``offset``.
            OverloadError: the organisation has left too much unfinished.
        """
        key = _key(caller, update_id)
        # One after the other: two that open the staging file at once would truncate what the other one writes.
        async with self._turns.setdefault(key, asyncio.Lock()):
            return await self._begin(caller, key, update_id, offset, size)

    async def _begin(self, caller: Caller, key: str, update_id: str, offset: int, size: int) -> Upload:
        await self._take_over(key)
        if offset:
            staged = await self._store.io(lambda: self._store.blobs.resume(key))
            if staged.size != offset:
                await self._store.io(staged.suspend)
                raise UnavailableError(
                    f"the hub has {staged.size} bytes of update {update_id}, not {offset}: ask GetUpload, or begin at 0"
                )
        else:
            if self._left:
                await self._make_room(caller, size)
            staged = self._store.blobs.stage(key)
        self._left.pop(key, None)
        upload = self._active[key] = Upload(key, staged)
        return upload

    async def end(self, upload: Upload, keep: bool) -> None:
        """Finish with an upload: keep its bytes for another connection, or remove what is not committed."""
        if self._active.get(upload.key) is upload:
            del self._active[upload.key]
        upload.over.set()
        if upload.staged.open:
            await self._store.io(upload.staged.suspend if keep else upload.staged.discard)
        if keep and upload.key not in self._active:
            self._left[upload.key] = upload.staged.size

    async def kept(self, caller: Caller, update_id: str) -> int:
        """Return how many bytes of an update are durable here; a connection that seems alive loses it."""
        key = _key(caller, update_id)
        await self._take_over(key)
        return await self._store.io(lambda: self._store.blobs.kept_bytes(key))

    async def _take_over(self, key: str) -> None:
        while (older := self._active.get(key)) is not None:
            if older.committing:
                await older.over.wait()
            else:
                await self.end(older, keep=True)

    async def _make_room(self, caller: Caller, size: int) -> None:
        """Remove the oldest unfinished uploads of an organisation until ``size`` more bytes fit its share."""
        owner = _digest(caller.organisation)
        left = {key: length for key, length in self._left.items() if key.startswith(owner) and key not in self._active}
        total = sum(left.values()) + size
        for key, length in left.items():  # oldest first
            if total <= self._config.staging_bytes_per_organisation:
                return
            await self._store.io(lambda key=key: self._store.blobs.forget_uploads(float("inf"), [key]))  # type: ignore[misc]
            del self._left[key]
            total -= length
        if total > max(size, self._config.staging_bytes_per_organisation):
            raise OverloadError(
                f"{caller.organisation} has {total - size} bytes of unfinished uploads here, of at most "
                f"{self._config.staging_bytes_per_organisation}: finish those first",
                retry_after_ms=5000,
            )


def key_prefix(name: str) -> str:
    """Return how the keys of the uploads of ``organisation/name``, or of a whole ``organisation``, begin."""
    organisation, slash, _ = name.partition("/")
    return f"{_digest(organisation)}-" + (f"{_digest(name)}-" if slash else "")


def _key(caller: Caller, update_id: str) -> str:
    return f"{key_prefix(caller.member)}{update_id}"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]
