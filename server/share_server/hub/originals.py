"""The retained originals, as the mathematics wants them: what each task's last update said, in ambient factors.

A merge asks for an original only if a compaction pushed that task's error bound past the budget, so nothing is read
before it is asked for. The merge runs on its own thread and asks from there; the event loop fetches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

from share_core.space import update_adapter
from share_core.types import Adapter, SpaceSpec
from share_core.wire import decode_update
from share_server.hub.history import History
from share_server.store.store import Store
from share_server.store.updates import newest_merged


class Originals(Mapping[str, Adapter]):
    """Ambient factors by task id. Use it from any thread but the event loop's own."""

    def __init__(self, store: Store, spec: SpaceSpec, history: History, tasks: frozenset[str]) -> None:
        self._store = store
        self._spec = spec
        self._history = history
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()

    def __getitem__(self, task_id: str) -> Adapter:
        """Return what the last merged update of ``task_id`` said."""
        if task_id not in self._tasks:
            raise KeyError(task_id)
        return asyncio.run_coroutine_threadsafe(self._fetch(task_id), self._loop).result()

    def __contains__(self, task_id: object) -> bool:
        """Return whether the task has an original; reads nothing."""
        return task_id in self._tasks

    def __iter__(self) -> Iterator[str]:
        """Iterate over the task ids."""
        return iter(self._tasks)

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self._tasks)

    async def _fetch(self, task_id: str) -> Adapter:
        row = await self._store.do(lambda journal: newest_merged(journal, task_id))
        payload = await self._store.io(lambda: self._store.blobs.read(row.new.sha256))
        bases = await self._history.bases(row.new.base_version)
        return await self._store.io(lambda: update_adapter(decode_update(payload, self._spec), bases))
