"""The hub without its listeners: everything between a received message and a published version.

:mod:`share_server.hub.process` puts listeners in front of it; the fault campaigns run it alone, so that what they kill
and cut is the code that serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from share_core.types import SpaceSpec
from share_server.config import ServerConfig
from share_server.hub.feed import Feed
from share_server.hub.history import History
from share_server.hub.intake import Intake
from share_server.hub.merging import MergeLoop
from share_server.store.store import Store


@dataclass(frozen=True)
class Engine:
    """The running parts. Start :attr:`loop` as a task of its own; end with :meth:`close`."""

    store: Store
    """What is durable."""
    feed: Feed
    """What is published."""
    history: History
    """Earlier versions."""
    intake: Intake
    """Where updates come in."""
    loop: MergeLoop
    """What turns them into versions."""

    @classmethod
    async def open(cls, root: Path, spec: SpaceSpec, config: ServerConfig, signing_key: bytes) -> Engine:
        """Lock and verify the store under ``root`` and build the parts around its newest state.

        Args:
            root: the directory of the store.
            spec: the space it belongs to.
            config: limits and policies.
            signing_key: Ed25519 private key, PEM, under which versions are signed.

        Raises:
            ConfigError: another hub runs on this directory, or the store belongs to another space.
            StorageError: the store is damaged or the disk refused.
        """
        store, state = await Store.open(root, spec)
        feed = Feed(state)
        history = History(store, spec, feed)
        intake = Intake(store, spec, config.limits, feed, history)
        loop = MergeLoop(store, spec, feed, history)
        return cls(store, feed, history, intake, loop)

    async def close(self) -> None:
        """Close the store; the merge loop must have ended."""
        await self.store.close()
