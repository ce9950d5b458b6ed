"""Retention: what old versions occupy is given back, and nothing that anybody was promised goes with it.

Kept are always: the journal itself, every update as it arrived, the newest version and all it needs. Removed are the
payloads of versions older than the horizon, up to the newest whole version before it. Updates expressed in the
coordinates of a version that goes are first written out in ambient factors: what they said stays readable for ever.
Versions that a waiting update is based on stay until it is merged.

Order, so that a kill at any point loses nothing: originals durable -> recorded -> versions marked as collected -> files
removed. Files whose removal was cut short are found at a later collection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from share_core.wire import encode_adapter
from share_server.config import RetentionConfig
from share_server.hub import log
from share_server.hub.contents import Contents
from share_server.hub.feed import Feed
from share_server.store.journal import Journal
from share_server.store.records import UpdateRow
from share_server.store.store import Store
from share_server.store.updates import keep_original, list_bound_to, oldest_waiting_base
from share_server.store.versions import (
    list_versions,
    mark_collected,
    nearest_snapshot,
    oldest_version,
    referenced_blobs,
)

_PAGE = 32
_MOST_ORIGINALS = 64
"""Updates written out in ambient factors between two merges: a long backlog must not hold the merges up."""
_LEFT_OVER_S = 24 * 3600.0
"""Age at which a payload without a row counts as left behind: longer than any upload lasts."""


class Collector:
    """Removes what the retention policy no longer keeps. Called between merges, by nobody else."""

    def __init__(self, store: Store, feed: Feed, contents: Contents, config: RetentionConfig) -> None:
        self._store = store
        self._feed = feed
        self._contents = contents
        self._config = config
        self.held = asyncio.Lock()
        """While somebody holds it, as a backup does, nothing is removed; merges go on."""

    async def collect(self) -> int:
        """Remove what may go; return how many versions that concerned."""
        if self._feed.version - self._feed.oldest <= self._config.horizon_versions + self._config.snapshot_every:
            return 0
        if self.held.locked():
            return 0  # the next merge asks again
        async with self.held:
            return await self._collect(_MOST_ORIGINALS)

    async def collect_now(self) -> int:
        """As :meth:`collect`, all of it, without waiting until it is worth it, but until nobody holds the files."""
        async with self.held:
            return await self._collect(None)

    async def _collect(self, most_originals: int | None) -> int:
        cut = await self._store.do(lambda journal: _cut(journal, self._feed.version - self._config.horizon_versions))
        if cut is None:
            return 0
        before = await self._store.do(lambda journal: _payloads(journal, cut))
        bound, count = await self._store.do(lambda journal: _mark(journal, cut))
        kept = 0
        while bound:
            if most_originals is not None and kept >= most_originals:
                return 0  # the next merge goes on
            await self.keep_originals(bound)
            kept += len(bound)
            bound, count = await self._store.do(lambda journal: _mark(journal, cut))
        self._feed.oldest = cut
        needed = await self._store.do(referenced_blobs)
        blobs = self._store.blobs
        gone = before - needed
        freed = await self._store.io(lambda: blobs.remove(gone))
        freed += await self._store.io(lambda: blobs.remove(blobs.unreferenced(needed, _LEFT_OVER_S)))
        await self._store.io(lambda: blobs.forget_uploads(self._config.upload_hours * 3600))
        log.info("collected", versions=count, oldest=cut, freed_bytes=freed)
        return count

    async def keep_originals(self, rows: Sequence[UpdateRow]) -> None:
        """Write some updates out in ambient factors, so that they no longer need the versions they are based on."""
        kept: list[tuple[str, str, int]] = []
        for row in rows:
            payload = encode_adapter(await self._contents.of_update(row))
            digest = await self._store.io(lambda payload=payload: self._store.blobs.put(payload))  # type: ignore[misc]
            kept.append((row.new.update_id, digest, len(payload)))

        def record(journal: Journal) -> None:
            with journal.transaction():
                for update_id, digest, size in kept:
                    keep_original(journal, update_id, digest, size)

        await self._store.do(record)


def _cut(journal: Journal, horizon: int) -> int | None:
    """Return the version from which on everything is kept; None where nothing may go."""
    waiting = oldest_waiting_base(journal)
    start = nearest_snapshot(journal, horizon if waiting is None else min(horizon, waiting))
    return start.version if start is not None and start.version > max(1, oldest_version(journal)) else None


def _mark(journal: Journal, cut: int) -> tuple[list[UpdateRow], int]:
    """Mark the versions below ``cut`` and return how many; or return updates that need them, and mark nothing.

    One turn at the journal: an update that is accepted after the last look would lose the bases that it is read with.
    """
    bound = list_bound_to(journal, cut, _PAGE)
    return (bound, 0) if bound else ([], mark_collected(journal, cut))


def _payloads(journal: Journal, before: int) -> set[str]:
    """Return the digests of what versions below ``before`` still have on disk."""
    found: set[str] = set()
    for row in list_versions(journal, oldest_version(journal) - 1, before - 1):
        found.update(digest for digest in (row.delta_sha256, row.snapshot_sha256) if digest)
    return found
