"""The merge loop: the only writer of versions.

One accepted update at a time, in ingest order. Each is lifted in the bases of the version it was trained in, merged on
a thread, committed in one transaction, and only then published. An update that cannot be merged is recorded as refused
with its reason; it never holds up the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from share_core.errors import FedshareError, StorageError
from share_core.merge import HubState, MergePolicy, merge
from share_core.space import advance, update_adapter
from share_core.types import Adapter, SiteBasis, SpaceSpec
from share_core.wire import decode_delta, decode_snapshot, decode_update, encode_delta, encode_snapshot
from share_server.hub import log
from share_server.hub.clock import now_ms
from share_server.hub.feed import Feed
from share_server.hub.history import History
from share_server.hub.originals import Originals
from share_server.store.records import UpdateRow, VersionCommit, VersionRow
from share_server.store.recovery import SNAPSHOT_EVERY, sizes_of
from share_server.store.store import Store
from share_server.store.updates import next_accepted, refuse_update
from share_server.store.versions import commit_version


@dataclass(frozen=True)
class _Computed:
    """A merge that is not stored yet."""

    state: HubState
    """The next state, made from the bytes below: what is stored is the authority, not what was computed."""
    delta: bytes
    snapshot: bytes | None
    compacts: bool
    relative_error: float


class MergeLoop:
    """Runs until :meth:`stop`; a storage failure or a fault in the program ends it with an exception."""

    def __init__(self, store: Store, spec: SpaceSpec, feed: Feed, history: History) -> None:
        self._store = store
        self._spec = spec
        self._feed = feed
        self._history = history
        self._policy = MergePolicy(k_max=spec.k_max, tau=spec.tau)
        self._thread = ThreadPoolExecutor(1, "merge")
        self._work = asyncio.Event()
        self._stopping = False

    def wake(self) -> None:
        """Say that an update may be waiting."""
        self._work.set()

    def stop(self) -> None:
        """Let the loop end after the merge in progress."""
        self._stopping = True
        self._work.set()

    async def run(self) -> None:
        """Merge what waits, then wait for more."""
        try:
            while not self._stopping:
                self._work.clear()
                while not self._stopping and (row := await self._store.do(next_accepted)) is not None:
                    await self._merge_one(row)
                if not self._stopping:
                    await self._work.wait()
        finally:
            self._thread.shutdown(wait=True)

    async def _merge_one(self, row: UpdateRow) -> None:
        state = self._feed.state
        try:
            payload = await self._store.io(lambda: self._store.blobs.read(row.new.sha256))
            bases = await self._history.bases(row.new.base_version)
            loop = asyncio.get_running_loop()
            others = frozenset(state.space.cores) - {row.new.task_id}
            originals = Originals(self._store, self._spec, self._history, others)
            computed = await loop.run_in_executor(self._thread, self._compute, state, row, payload, bases, originals)
        except StorageError:
            raise
        except FedshareError as error:
            await self._refuse(row, f"{type(error).__name__}: {error}")
            return
        except Exception as error:
            # One update that trips a fault in the mathematics must not stop the merges of everybody else.
            log.failure("merge failed", error, update_id=row.new.update_id, task_id=row.new.task_id)
            await self._refuse(row, "the merge failed on this update; the operator's log has the reason")
            return
        await self._commit(row, state, computed)

    async def _commit(self, row: UpdateRow, before: HubState, computed: _Computed) -> None:
        space = computed.state.space
        snapshot = computed.snapshot
        delta_sha256 = await self._store.io(lambda: self._store.blobs.put(computed.delta))
        snapshot_sha256 = None if snapshot is None else await self._store.io(lambda: self._store.blobs.put(snapshot))
        commit = VersionCommit(
            row=VersionRow(
                version=space.version,
                update_id=row.new.update_id,
                delta_sha256=delta_sha256,
                delta_size=len(computed.delta),
                snapshot_sha256=snapshot_sha256,
                snapshot_size=0 if snapshot is None else len(snapshot),
                compacts=computed.compacts,
                sizes=sizes_of(space),
            ),
            task_id=row.new.task_id,
            relative_error=computed.relative_error,
            ledgers={task: own for task, own in computed.state.ledger.items() if before.ledger.get(task) != own},
        )
        await self._store.do(lambda journal: commit_version(journal, commit, now_ms()))
        self._feed.publish(computed.state)
        log.info(
            "merged",
            version=space.version,
            update_id=row.new.update_id,
            task_id=row.new.task_id,
            staleness=space.version - 1 - row.new.base_version,
            relative_error=computed.relative_error,
            compacts=computed.compacts,
        )

    async def _refuse(self, row: UpdateRow, reason: str) -> None:
        await self._store.do(lambda journal: refuse_update(journal, row.new.update_id, reason))
        log.warning("refused to merge", update_id=row.new.update_id, task_id=row.new.task_id, reason=reason)

    def _compute(
        self,
        state: HubState,
        row: UpdateRow,
        payload: bytes,
        bases: Mapping[str, SiteBasis],
        originals: Mapping[str, Adapter],
    ) -> _Computed:
        """Merge one update; runs on the merge thread."""
        adapter = update_adapter(decode_update(payload, self._spec), bases)
        merged = merge(state, row.new.task_id, adapter, self._policy, originals)
        delta = encode_delta(merged.delta)
        space = advance(state.space, decode_delta(delta, self._spec))
        snapshot = None
        if merged.delta.compacts or space.version % SNAPSHOT_EVERY == 0:
            snapshot = encode_snapshot(space)
            space = decode_snapshot(snapshot, self._spec)
        return _Computed(
            state=HubState(space=space, ledger=merged.state.ledger),
            delta=delta,
            snapshot=snapshot,
            compacts=merged.delta.compacts,
            relative_error=merged.relative_error,
        )
