"""The hub's versions as its streams read them: from the payload files, the newest ones from memory, all signed."""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict

from share_core.errors import RebaseError
from share_core.identity import SignedManifest
from share_proto.v1 import hub_pb2
from share_server.hub.feed import Feed, snapshot_bytes
from share_server.hub.history import History
from share_server.hub.once import Once
from share_server.hub.signing import sign_newest, sign_whole
from share_server.hub.streams import SMALL_CHAIN_BYTES, Newest
from share_server.store.store import Store
from share_server.store.versions import chain_bytes, read_manifest, read_version

_KEPT_STEP_BYTES = 64 * 2**20
_KEPT_WHOLE = 2
_SAID_S = 5.0
"""Seconds for which one signed statement of the newest version is handed out."""

Step = tuple[hub_pb2.DeltaHeader, bytes]
Whole = tuple[hub_pb2.SnapshotHeader, bytes]


class Published:
    """A :class:`share_server.hub.streams.Source` over the store."""

    def __init__(self, store: Store, feed: Feed, history: History, signing_key: bytes) -> None:
        self._store = store
        self._feed = feed
        self._history = history
        self._signing_key = signing_key
        self._steps: OrderedDict[int, Step] = OrderedDict()
        self._step_bytes = 0
        self._whole: OrderedDict[int, Whole] = OrderedDict()
        self._better: tuple[int, dict[int, bool]] = (-1, {})
        self._reading: Once[int, Step] = Once()
        self._making: Once[int, Whole] = Once()
        self._comparing: Once[tuple[int, int], bool] = Once()
        self._saying: Once[int, Newest] = Once()
        self._said: Newest | None = None
        self._said_at = -math.inf
        self.subscribers = 0
        """Open FollowVersions streams."""

    @property
    def space_id(self) -> str:
        """The space that the versions belong to."""
        return self._feed.space_id

    @property
    def version(self) -> int:
        """The newest published version."""
        return self._feed.version

    @property
    def closing(self) -> bool:
        """Whether the hub is about to stop."""
        return self._feed.closing

    async def newest(self) -> Newest:
        """Return a statement of the newest version, signed a moment ago, the same one for all who ask now."""
        version = self._feed.version
        if self._said is None or self._said[0] != version or time.monotonic() - self._said_at > _SAID_S:
            self._said = await self._saying.run(version, lambda: self._say(version))
            self._said_at = time.monotonic()
        return self._said

    async def _say(self, version: int) -> Newest:
        own = await self._store.do(lambda journal: read_manifest(journal, version))
        return version, _message(sign_newest(self._signing_key, self._feed.space_id, version, own))

    async def wait_after(self, version: int, timeout_s: float) -> None:
        """Return when a version after ``version`` is published, when the hub closes, or after ``timeout_s``."""
        await self._feed.wait_after(version, timeout_s)

    async def whole_is_better(self, position: int) -> bool:
        """Return whether the steps after ``position`` are gone, or more bytes than the newest version itself."""
        newest = self._feed.version
        if self._better[0] != newest:
            self._better = (newest, {})
        known = self._better[1]
        if position not in known:  # a thousand readers stand at the same position: ask the journal once
            known[position] = await self._comparing.run((position, newest), lambda: self._compare(position, newest))
        return known[position]

    async def _compare(self, position: int, newest: int) -> bool:
        try:
            size = await self._store.do(lambda journal: chain_bytes(journal, position, newest))
        except RebaseError:
            return True
        return size > max(SMALL_CHAIN_BYTES, snapshot_bytes(self._feed.state.space))

    async def step(self, version: int) -> Step:
        """Return header and payload of the step to ``version``; raises RebaseError if it is no longer kept."""
        if (found := self._steps.get(version)) is None:
            return await self._reading.run(version, lambda: self._read_step(version))
        self._steps.move_to_end(version)
        return found

    async def _read_step(self, version: int) -> Step:
        row = await self._store.do(lambda journal: read_version(journal, version))
        payload = await self._store.io(lambda: self._store.blobs.read(row.delta_sha256))
        header = hub_pb2.DeltaHeader(
            from_version=version - 1,
            version=version,
            payload_size=row.delta_size,
            payload_sha256=row.delta_sha256,
            manifest=_message(row.manifest),
        )
        self._steps[version] = (header, payload)
        self._step_bytes += len(payload)
        while len(self._steps) > 1 and self._step_bytes > _KEPT_STEP_BYTES:
            self._step_bytes -= len(self._steps.popitem(last=False)[1][1])
        return header, payload

    async def whole(self, version: int) -> Whole:
        """Return header and payload of one whole version, 0 for the newest; raises VersionError, RebaseError."""
        version = version or self._feed.version
        if version not in self._whole:
            self._whole[version] = await self._making.run(version, lambda: self._make_whole(version))
        self._whole.move_to_end(version)
        found = self._whole[version]
        while len(self._whole) > _KEPT_WHOLE:
            self._whole.popitem(last=False)
        return found

    async def _make_whole(self, version: int) -> Whole:
        payload = await self._history.snapshot(version)
        digest = await self._store.io(lambda: hashlib.sha256(payload).hexdigest())
        own = await self._store.do(lambda journal: read_manifest(journal, version))
        header = hub_pb2.SnapshotHeader(version=version, payload_size=len(payload), payload_sha256=digest)
        if version:
            signed = sign_whole(self._signing_key, self._feed.space_id, version, (digest, len(payload)), own)
            header.manifest.CopyFrom(_message(signed))
        if own is not None:
            header.version_manifest.CopyFrom(_message(own))
        return header, payload


def _message(signed: SignedManifest) -> hub_pb2.Manifest:
    return hub_pb2.Manifest(body=signed.body, signature=signed.signature)
