"""Older versions, when somebody needs them: bases to lift a stale update, snapshots to fetch.

Between two compactions bases only grow, so the bases of a version are the first columns of the last bases of its epoch:
how many is written in its row. The current epoch is therefore answered from memory; an older one is rebuilt from stored
payloads and kept for the next who asks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from share_core.errors import VersionError
from share_core.types import SiteBasis, Space, SpaceSpec
from share_core.wire import encode_snapshot
from share_server.hub.feed import Feed
from share_server.hub.once import Once
from share_server.store.recovery import plan_replay, replay, sizes_of
from share_server.store.store import Store
from share_server.store.versions import epoch_end, read_version

_KEPT_SPACES = 4
_KEPT_SIZES = 256


class History:
    """Read access to every kept version."""

    def __init__(self, store: Store, spec: SpaceSpec, feed: Feed) -> None:
        self._store = store
        self._spec = spec
        self._feed = feed
        self._spaces: OrderedDict[int, Space] = OrderedDict()
        self._sizes: OrderedDict[int, Mapping[str, tuple[int, int]]] = OrderedDict()
        self._rebuilding: Once[int, Space] = Once()

    async def space(self, version: int) -> Space:
        """Return one version.

        Raises:
            VersionError: it was never published; RebaseError: it is no longer kept.
        """
        newest = self._feed.state.space
        if version == newest.version:
            return newest
        if version > newest.version:
            raise VersionError(f"this hub has no version {version}: its newest is {newest.version}")
        if version not in self._spaces:
            self._spaces[version] = await self._rebuilding.run(version, lambda: self._rebuild(version))
        self._spaces.move_to_end(version)
        found = self._spaces[version]
        while len(self._spaces) > _KEPT_SPACES:
            self._spaces.popitem(last=False)
        return found

    async def _rebuild(self, version: int) -> Space:
        plan = await self._store.do(lambda journal: plan_replay(journal, version))
        return await self._store.io(lambda: replay(self._store.blobs, self._spec, plan))

    async def sizes(self, version: int) -> Mapping[str, tuple[int, int]]:
        """Return (k_out, k_in) of every site in one version; raises as :meth:`space`."""
        newest = self._feed.state.space
        if version == newest.version:
            return sizes_of(newest)
        if version == 0:
            return dict.fromkeys(self._spec.sites, (0, 0))
        if version > newest.version:
            raise VersionError(f"this hub has no version {version}: its newest is {newest.version}")
        if version < self._feed.oldest or version not in self._sizes:  # of a collected one the journal tells
            self._sizes[version] = (await self._store.do(lambda journal: read_version(journal, version))).sizes
        self._sizes.move_to_end(version)
        found = self._sizes[version]
        while len(self._sizes) > _KEPT_SIZES:
            self._sizes.popitem(last=False)
        return found

    async def bases(self, version: int) -> Mapping[str, SiteBasis]:
        """Return the bases of one version; raises as :meth:`space`."""
        sizes = await self.sizes(version)
        last = await self._store.do(lambda journal: epoch_end(journal, version)) if version else 0
        whole = (await self.space(last)).bases
        return {
            site: SiteBasis(basis.left[:, : sizes[site][0]], basis.right[:, : sizes[site][1]])
            for site, basis in whole.items()
        }

    async def snapshot(self, version: int) -> bytes:
        """Return one version as a snapshot payload; raises as :meth:`space`."""
        space = await self.space(version)
        return await self._store.io(lambda: encode_snapshot(space))
