"""Bytes sent to each member, counted when sent.

The counters are written to the journal about once a second and when the hub stops, because a commit per chunk would
make every reader wait for the disk. A hub that is killed forgets at most the last second of them; nothing else depends
on it.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from share_server.store.members import add_traffic
from share_server.store.store import Store

_PERIOD_S = 1.0


class Traffic:
    """Downlink counters that are not written yet."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, member: str, kind: str, size: int) -> None:
        """Count payload bytes of a ``delta``, ``snapshot`` or ``head`` sent to ``member``."""
        self._counts[member, kind] += size

    async def flush(self) -> None:
        """Write what was counted since the last call."""
        if not self._counts:
            return
        counts, self._counts = self._counts, Counter()
        down = [
            (member, counts[member, "delta"], counts[member, "snapshot"], counts[member, "head"])
            for member in sorted({member for member, _ in counts})
        ]
        await self._store.do(lambda journal: add_traffic(journal, down))

    async def run(self) -> None:
        """Flush for ever; cancel it to end."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            await self.flush()
