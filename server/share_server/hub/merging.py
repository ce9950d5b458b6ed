"""The merge loop: the only writer of versions.

It takes what waits in ingest order, several updates at once, but each private task at most once per version. Each is
lifted through the bases of the version it was trained in, all are merged on a thread and committed in one transaction,
and only then published. An update that cannot be merged is recorded as refused with its reason; it never holds up the
others. One that the other organisations outvote, or that would cost somebody else's stored task more than the limit, is
set aside until the operator decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from share_core.errors import FedshareError, StorageError
from share_core.ledger import TaskLedger
from share_core.merge import HubState
from share_server.config import MergeConfig, RetentionConfig
from share_server.hub import log
from share_server.hub.clock import now_ms
from share_server.hub.collecting import Collector
from share_server.hub.contents import Contents
from share_server.hub.feed import Feed
from share_server.hub.heads import misfit
from share_server.hub.metrics import Metrics
from share_server.hub.policy import StepPolicy
from share_server.hub.signing import sign_version
from share_server.hub.stepping import Step, Stepper
from share_server.store.records import NewUpdate, UpdateRow, VersionCommit, VersionRow
from share_server.store.recovery import sizes_of
from share_server.store.store import Store
from share_server.store.updates import has_newer, list_accepted, list_newest, quarantine_update, refuse_update
from share_server.store.versions import commit_version, read_manifest


class MergeLoop:
    """Runs until :meth:`stop`; a storage failure or a fault in the program ends it with an exception."""

    def __init__(
        self,
        store: Store,
        feed: Feed,
        contents: Contents,
        stepper: Stepper,
        collector: Collector,
        policy: StepPolicy,
        config: MergeConfig,
        retention: RetentionConfig,
        signing_key: bytes,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._feed = feed
        self._contents = contents
        self._stepper = stepper
        self._collector = collector
        self._policy = policy
        self._config = config
        self._retention = retention
        self._signing_key = signing_key
        self._metrics = metrics
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
                pause: float | None = None
                while not self._stopping:
                    batch, pause = await self._next_batch()
                    if not batch:
                        break
                    await self._merge(batch)
                    await self._collector.collect()
                if not self._stopping:
                    await self._wait(pause)
        finally:
            self._stepper.close()

    async def _wait(self, pause_s: float | None) -> None:
        try:
            async with asyncio.timeout(pause_s):  # not wait_for: it can forget a cancellation
                await self._work.wait()
        except TimeoutError:
            return

    async def _next_batch(self) -> tuple[list[UpdateRow], float | None]:
        """Return the updates to merge now; none, and for how long to wait in seconds, where a buffer is not full."""
        rows = await self._store.do(lambda journal: list_accepted(journal, self._config.batch))
        batch: list[UpdateRow] = []
        seen: set[str] = set()
        for row in rows:
            if row.released:  # nothing is held against it, so it goes alone
                return (batch or [row]), None
            once = await self._once_per_version(row.new)
            if once in seen:
                break
            seen.update({once} if once else ())
            batch.append(row)
        if self._config.buffer > 1 and 0 < len(batch) < self._config.buffer:
            waited_s = (now_ms() - batch[0].received_ms) / 1000
            if waited_s < self._config.buffer_wait_s and any(
                [await self._contents.is_shared(row.new.task_id) for row in batch]
            ):
                return [], self._config.buffer_wait_s - waited_s
        return batch, None

    async def _once_per_version(self, new: NewUpdate) -> str | None:
        """Return what a version may hold one update of: of a private task, which takes the newest update whole.

        Two of one task in a version would lose the first unseen. Where shared tasks move by steps and are judged, it is
        one of each organisation, so that none moves the task without being judged.
        """
        if not await self._contents.is_shared(new.task_id):
            return new.task_id
        if self._policy.robust.filters and self._policy.mixing != "mean":
            return f"{new.task_id} {new.organisation}"
        return None

    async def _merge(self, batch: Sequence[UpdateRow]) -> None:
        batch = await self._with_fitting_heads(batch)
        if not batch:
            return
        state = self._feed.state
        started_ms = now_ms()
        for row in batch:
            if row.released and await self._store.do(lambda journal, row=row: has_newer(journal, row)):  # type: ignore[misc]
                await self._refuse(row, "it was released after a newer update of its task had been merged")
                return
        try:
            tried = await self._stepper.step(state, batch, self._policy, self._retention.snapshot_every)
        except StorageError:
            raise
        except Exception as error:
            await self._merge_alone(batch, error)
            return
        for row in batch:
            if (reason := tried.refused.get(row.new.update_id)) is not None:
                await self._refuse(row, f"{type(reason).__name__}: {reason}")
            if (outvoted := tried.aside.get(row.new.update_id)) is not None:
                await self._quarantine(row, outvoted)
        if tried.step is not None and tried.step.harm is not None and not any(row.released for row in batch):
            await self._hold(tried.step, batch)
        elif tried.step is not None:
            await self._commit(tried.step, batch)
            rows = {row.new.update_id: row for row in batch}
            waited_s = [(now_ms() - rows[one.update_id].received_ms) / 1000 for one in tried.step.merged]
            self._metrics.merged(len(waited_s), (now_ms() - started_ms) / 1000, waited_s)

    async def _with_fitting_heads(self, batch: Sequence[UpdateRow]) -> list[UpdateRow]:
        """Refuse the updates of shared tasks whose heads do not go with those of the others; return the rest."""
        kept: list[UpdateRow] = []
        for row in batch:
            task_id = row.new.task_id
            if row.new.heads and await self._contents.is_shared(task_id):
                known = await self._store.do(lambda journal, task_id=task_id: list_newest(journal, task_id))  # type: ignore[misc]
                known += [one for one in kept if one.new.task_id == task_id]
                if (reason := await misfit(self._contents, row, known)) is not None:
                    await self._refuse(row, reason)
                    continue
            kept.append(row)
        return kept

    async def _hold(self, step: Step, batch: Sequence[UpdateRow]) -> None:
        """Do not publish a version that costs somebody else too much; find out which of its updates does."""
        taken = {one.update_id for one in step.merged}
        rows = [row for row in batch if row.new.update_id in taken]
        if len(rows) == 1:
            await self._quarantine(rows[0], str(step.harm))
            return
        log.warning("version held", version=step.state.space.version, updates=len(rows), reason=str(step.harm))
        for row in rows:
            await self._merge([row])

    async def _merge_alone(self, batch: Sequence[UpdateRow], error: Exception) -> None:
        """Find the update of a batch on which the mathematics failed, and refuse that one only."""
        if len(batch) > 1:
            for row in batch:
                await self._merge([row])
            return
        (row,) = batch
        if isinstance(error, FedshareError):
            await self._refuse(row, f"{type(error).__name__}: {error}")
            return
        # One update that trips a fault in the mathematics must not stop the merges of everybody else.
        log.failure("merge failed", error, update_id=row.new.update_id, task_id=row.new.task_id)
        await self._refuse(row, "the merge failed on this update; the operator's log has the reason")

    async def _commit(self, step: Step, batch: Sequence[UpdateRow]) -> None:
        before, space = self._feed.state, step.state.space
        snapshot = step.snapshot
        delta_sha256 = await self._store.io(lambda: self._store.blobs.put(step.delta))
        snapshot_sha256 = None if snapshot is None else await self._store.io(lambda: self._store.blobs.put(snapshot))
        previous = await self._store.do(lambda journal: read_manifest(journal, space.version - 1))
        delta = (delta_sha256, len(step.delta))
        manifest = sign_version(self._signing_key, self._feed.space_id, space.version, delta, previous)
        commit = VersionCommit(
            row=VersionRow(
                version=space.version,
                updates=tuple(one.update_id for one in step.merged),
                delta_sha256=delta_sha256,
                delta_size=len(step.delta),
                snapshot_sha256=snapshot_sha256,
                snapshot_size=0 if snapshot is None else len(snapshot),
                compacts=step.compacts,
                sizes=sizes_of(space),
                policy=self._policy.to_text(),
                manifest=manifest,
            ),
            merged=step.merged,
            ledgers=_changed(before, step.state),
        )
        await self._store.do(lambda journal: commit_version(journal, commit, now_ms()))
        self._feed.publish(step.state)
        self._log(step, batch)

    def _log(self, step: Step, batch: Sequence[UpdateRow]) -> None:
        version, rows = step.state.space.version, {row.new.update_id: row for row in batch}
        for one in step.merged:
            row = rows[one.update_id]
            log.info(
                "merged",
                version=version,
                update_id=one.update_id,
                task_id=one.task_id,
                staleness=version - 1 - row.new.base_version,
                relative_error=one.relative_error,
                compacts=step.compacts,
            )

    async def _refuse(self, row: UpdateRow, reason: str) -> None:
        await self._store.do(lambda journal: refuse_update(journal, row.new.update_id, reason))
        log.warning("refused to merge", update_id=row.new.update_id, task_id=row.new.task_id, reason=reason)

    async def _quarantine(self, row: UpdateRow, reason: str) -> None:
        await self._store.do(lambda journal: quarantine_update(journal, row.new.update_id, reason))
        log.warning("quarantined", update_id=row.new.update_id, task_id=row.new.task_id, reason=reason)


def _changed(before: HubState, after: HubState) -> dict[str, TaskLedger]:
    return {task: own for task, own in after.ledger.items() if before.ledger.get(task) != own}
