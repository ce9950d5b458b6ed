"""The newest version, and how those who wait learn of it.

A subscriber holds nothing here but its own position: publishing replaces one reference and wakes everybody, whatever
their number and speed. Only the merge loop publishes.
"""

from __future__ import annotations

import asyncio

from share_core.merge import HubState
from share_core.types import Core, Space


class Feed:
    """What this hub currently publishes."""

    def __init__(self, state: HubState, space_id: str, oldest: int = 0) -> None:
        self._state = state
        self.space_id = space_id
        """The space that all versions belong to."""
        self.oldest = oldest
        """The oldest version whose bases are kept; 0 while all are. Raised by the collector."""
        self._changed = asyncio.Event()
        self.closing = False
        """Whether the hub is about to stop."""

    @property
    def state(self) -> HubState:
        """The newest committed state."""
        return self._state

    @property
    def version(self) -> int:
        """The newest published version."""
        return self._state.space.version

    def publish(self, state: HubState) -> None:
        """Replace the newest state and wake everybody. The state must be committed already."""
        self._state = state
        self._wake()

    def close(self) -> None:
        """Tell everybody who waits that the hub is stopping."""
        self.closing = True
        self._wake()

    async def wait_after(self, version: int, timeout_s: float) -> None:
        """Return when a version after ``version`` is published, when the hub closes, or after ``timeout_s``."""
        if self.version > version or self.closing:
            return
        try:
            async with asyncio.timeout(timeout_s):  # not wait_for: it can forget a cancellation
                await self._changed.wait()
        except TimeoutError:
            return

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def bases_bytes(space: Space) -> int:
    """Return the size of all bases in float32."""
    return sum(basis.left.numel() + basis.right.numel() for basis in space.bases.values()) * 4


def snapshot_bytes(space: Space) -> int:
    """Return about how large a snapshot is: bases and cores in float32, without the header."""
    cores = (core for own in space.cores.values() for core in own.values())
    return bases_bytes(space) + sum(_numbers(core) for core in cores) * 4


def coefficients(space: Space, task_id: str) -> int:
    """Return how many scalars the cores of one task hold."""
    return sum(_numbers(core) for core in space.cores.get(task_id, {}).values())


def _numbers(core: Core) -> int:
    return core.out.numel() + core.in_.numel()
