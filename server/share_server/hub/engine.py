"""The hub without its listeners: everything between a received message and a published version.

:mod:`share_server.hub.process` puts listeners in front of it; the fault campaigns run it alone, so that what they kill
and cut is the code that serves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from share_core.types import SpaceSpec
from share_server.config import ServerConfig
from share_server.hub.collecting import Collector
from share_server.hub.contents import Contents
from share_server.hub.feed import Feed
from share_server.hub.gate.parsers import ParseGate, in_this_process
from share_server.hub.heads import Heads
from share_server.hub.history import History
from share_server.hub.intake import Intake
from share_server.hub.merging import MergeLoop
from share_server.hub.metrics import Metrics
from share_server.hub.policy import policy_of
from share_server.hub.published import Published
from share_server.hub.signing import sign_unsigned
from share_server.hub.stepping import Stepper
from share_server.store.forgetting import sweep
from share_server.store.recovery import Verified, tell_nobody
from share_server.store.store import Store
from share_server.store.versions import oldest_version


@dataclass(frozen=True)
class Engine:
    """The running parts. Start :attr:`loop` as a task of its own; end with :meth:`close`."""

    store: Store
    """What is durable."""
    feed: Feed
    """What is published."""
    history: History
    """Earlier versions."""
    published: Published
    """Versions as readers get them."""
    intake: Intake
    """Where updates come in."""
    loop: MergeLoop
    """What turns them into versions."""
    collector: Collector
    """What removes old versions; the loop calls it."""
    metrics: Metrics
    """Counters."""
    gate: ParseGate
    """What parses the payloads of others."""
    heads: Heads
    """Shared heads as readers get them."""

    @classmethod
    async def open(
        cls,
        root: Path,
        spec: SpaceSpec,
        config: ServerConfig,
        signing_key: bytes,
        metrics: Metrics | None = None,
        verified: Verified = tell_nobody,
        gate_of: Callable[[Store, SpaceSpec, Metrics], ParseGate] = in_this_process,
    ) -> Engine:
        """Lock and verify the store under ``root`` and build the parts around its newest state.

        Args:
            root: the directory of the store.
            spec: the space it belongs to.
            config: limits and policies.
            signing_key: Ed25519 private key, PEM, under which versions are signed.
            metrics: where events are counted.
            verified: is told how far the verification is, on a thread.
            gate_of: makes what parses payloads. The default parses on a thread: not for payloads of strangers.

        Raises:
            ConfigError: another hub runs on this directory, or the store belongs to another space.
            StorageError: the store is damaged or the disk refused.
        """
        retention = config.retention
        store, state = await Store.open(root, spec, retention.upload_hours * 3600, verified)
        policy = policy_of(spec, config.merge, config.robust.policy)
        before = policy_of(spec, config.merge)  # versions without a signature were made when nothing was judged
        try:
            await store.do(lambda journal: sign_unsigned(journal, signing_key, spec.space_id, before))
            await sweep(store)
            feed = Feed(state, spec.space_id, await store.do(oldest_version))
            metrics = metrics or Metrics()
            gate = gate_of(store, spec, metrics)
        except BaseException:
            await store.close()
            raise
        history = History(store, spec, feed)
        contents = Contents(store, spec, history)
        collector = Collector(store, feed, contents, retention)
        intake = Intake(store, spec, config, feed, history, metrics, gate)
        stepper = Stepper(contents, spec)
        loop = MergeLoop(
            store, feed, contents, stepper, collector, policy, config.merge, retention, signing_key, metrics
        )
        published = Published(store, feed, history, signing_key)
        heads = Heads(store, feed, contents, signing_key)
        return cls(store, feed, history, published, intake, loop, collector, metrics, gate, heads)

    async def close(self) -> None:
        """Close the store and end the parsers; the merge loop must have ended."""
        await self.gate.close()
        await self.store.close()
