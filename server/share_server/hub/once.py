"""Work that many ask for at the same moment, done once.

A thousand readers wake when a version is published and want the same step. A cache alone does not help: nothing is in
it yet when they all look, so each would read the payload and hold a copy of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Once(Generic[K, T]):
    """Work in progress by key. It keeps no answers: that is for a cache in front of it."""

    def __init__(self) -> None:
        self._running: dict[K, asyncio.Task[T]] = {}

    async def run(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what ``work`` gives, or what the work that is already running for ``key`` gives.

        A caller that goes away ends nothing, since others may wait for the same. What the work raises, all of them get.
        """
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(work())
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)

    def _forget(self, key: K, done: asyncio.Task[T]) -> None:
        del self._running[key]
        if not done.cancelled():
            done.exception()  # seen, also where every caller has gone
