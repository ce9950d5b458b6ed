"""What updates and tasks say, in ambient factors, whichever version they were expressed in.

Everything is read from what is durable, so that a replay of the journal reads the same. The content of a private task
is its newest update. The content of a shared task is a mixture of the newest update of every organisation, or, where
it is moved by steps, what the version before held plus the step: see :mod:`share_core.mixing` for the rules, and
:mod:`share_server.hub.judging` for who counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from share_core.mixing import mix_adapters
from share_core.space import task_adapter, update_adapter
from share_core.types import Adapter, Factors, Space, SpaceSpec
from share_core.wire import check_update, decode_adapter, decode_update
from share_server.hub.history import History
from share_server.hub.judging import Background, Said, counted_of, mean_of, newest_of_each, verdicts_on
from share_server.hub.policy import StepPolicy, policy_from_text
from share_server.store.records import TaskRow, UpdateRow
from share_server.store.store import Store
from share_server.store.updates import first_merged, newest_merged
from share_server.store.versions import find_task, policy_in_force


class Contents:
    """Read access to what was submitted."""

    def __init__(self, store: Store, spec: SpaceSpec, history: History) -> None:
        self._store = store
        self._spec = spec
        self._history = history

    async def of_update(self, row: UpdateRow) -> Adapter:
        """Return what one update says.

        Raises:
            RebaseError: its base version is no longer kept; PayloadError: it does not fit its base version.
        """
        if row.original_sha256 is not None:
            digest = row.original_sha256
            return await self._store.io(lambda: decode_adapter(self._store.blobs.read(digest), self._spec))
        payload = await self._store.io(lambda: self._store.blobs.read(row.new.sha256))
        bases = await self._history.bases(row.new.base_version)
        return await self._store.io(lambda: update_adapter(decode_update(payload, self._spec), bases))

    async def head_of(self, row: UpdateRow) -> Mapping[str, Tensor]:
        """Return the tensors of a shared head by name; none where an update holds none."""
        payload = await self._store.io(lambda: self._store.blobs.read(row.new.sha256))
        return await self._store.io(lambda: decode_update(payload, self._spec).head)

    async def head_shapes(self, row: UpdateRow) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of a shared head by name, without its values."""
        payload = await self._store.io(lambda: self._store.blobs.read(row.new.sha256))
        head = await self._store.io(lambda: check_update(payload, self._spec).head)
        return {name: tuple(tensor.shape) for name, tensor in head.items()}

    async def weights_of(self, task: TaskRow, rows: Sequence[UpdateRow], version: int) -> list[tuple[UpdateRow, float]]:
        """Return the weight in ``version`` of each update that counts, of a task of which ``rows`` are the newest.

        They are those of the cores where cores are averaged. Where they are moved by steps there is no weight of a
        whole contribution, and the same rule is taken: one voice per organisation, less the older it is.
        """
        if not task.sharing.shared:
            return [(row, 1.0) for row in rows]
        merged_in = max(row.version for row in rows)
        text = await self._store.do(lambda journal: policy_in_force(journal, merged_in, version))
        policy = policy_from_text(text)
        said = await self._read(rows) if policy.robust.filters else [Said(row, {}) for row in rows]
        start = await self._start(task.task_id, merged_in - 1, policy)
        return [(one.said.row, one.weight) for one in counted_of(newest_of_each(said), start, merged_in - 1, policy)]

    async def of_task(self, task_id: str, version: int, policy: StepPolicy) -> Adapter | None:
        """Return what the content of a task in ``version`` should be; None where only the version itself knows it."""
        rows = await self._store.do(lambda journal: newest_merged(journal, task_id, version))
        if len(rows) == 1 and not await self.is_shared(task_id):
            return await self.of_update(rows[0])
        if policy.mixing != "mean":
            return None
        merged_in = max(row.version for row in rows)
        return await self._mean(task_id, rows, merged_in - 1, policy)

    async def is_shared(self, task_id: str) -> bool:
        """Return whether several organisations may contribute to a task."""
        task = await self._store.do(lambda journal: find_task(journal, task_id))
        return task is not None and task.sharing.shared

    async def background(self, task_id: str, version: int, policy: StepPolicy) -> Background:
        """Return what a shared task is mixed with and judged by when something is merged after ``version``."""
        task = await self._store.do(lambda journal: find_task(journal, task_id))
        if task is None or not 0 < task.created_version <= version:
            return Background()
        rows = await self._store.do(lambda journal: newest_merged(journal, task_id, version))
        return Background(await self._read(rows), await self._start(task_id, version, policy))

    async def next_of_task(
        self, task_id: str, space: Space, background: Background, fresh: Sequence[Said], policy: StepPolicy
    ) -> Adapter:
        """Return what a task becomes when ``fresh`` updates of it (in ingest order) are merged into ``space``.

        Args:
            task_id: the task.
            space: the version before.
            background: what :meth:`background` gives; not looked at for a private task.
            fresh: updates that may be merged, at least one.
            policy: how they are mixed.
        """
        if not await self.is_shared(task_id):
            return fresh[-1].adapter
        said = newest_of_each([*background.older, *fresh])
        if policy.mixing == "mean":
            return mean_of(said, background.start, space.version, policy, self._spec.rank_limit)
        verdicts = zip(said, verdicts_on(said, background.start, policy), strict=True)
        factors = {one.row.new.update_id: verdict.factor for one, verdict in verdicts}
        fresh = [_cut(one, factors.get(one.row.new.update_id, 1.0)) for one in fresh]
        if task_id not in space.cores:
            fresh, current = fresh[1:], fresh[0].adapter
        else:
            current = task_adapter(space, task_id)
        if policy.mixing == "fedasync":
            for one in fresh:
                a = policy.alpha * policy.rule.weight(space.version - one.row.new.base_version)
                current = mix_adapters([(1 - a, current), (a, one.adapter)], self._spec.rank_limit)
            return current
        return await self._buffered(task_id, current, fresh, space.version, policy)

    async def _buffered(
        self, task_id: str, current: Adapter, fresh: Sequence[Said], version: int, policy: StepPolicy
    ) -> Adapter:
        """FedBuff: ``current + alpha / K sum_i s_i (update_i - what the task was in its base version)``."""
        parts: list[tuple[float, Adapter]] = [(1.0, current)]
        for one in fresh:
            scale = policy.alpha * policy.rule.weight(version - one.row.new.base_version) / len(fresh)
            base = await self._history.space(one.row.new.base_version)
            parts.append((scale, one.adapter))
            if task_id in base.cores:
                parts.append((-scale, task_adapter(base, task_id)))
        return mix_adapters(parts, self._spec.rank_limit)

    async def _mean(self, task_id: str, rows: Sequence[UpdateRow], version: int, policy: StepPolicy) -> Adapter:
        said = newest_of_each(await self._read(rows))
        start = await self._start(task_id, version, policy)
        return mean_of(said, start, version, policy, self._spec.rank_limit)

    async def _start(self, task_id: str, version: int, policy: StepPolicy) -> Adapter | None:
        """Return what a task began with, if it did up to ``version`` and if somebody is judged by it."""
        if not policy.robust.filters:
            return None
        row = await self._store.do(lambda journal: first_merged(journal, task_id, version))
        return None if row is None else await self.of_update(row)

    async def _read(self, rows: Sequence[UpdateRow]) -> list[Said]:
        return [Said(row, await self.of_update(row)) for row in rows]


def _cut(said: Said, factor: float) -> Said:
    if factor == 1:
        return said
    adapter = {site: Factors(factor * factors.out, factors.in_) for site, factors in said.adapter.items()}
    return Said(said.row, adapter)


class Originals(Mapping[str, Adapter]):
    """Contents by task id as the mathematics wants them; use it from any thread but the event loop's own.

    A merge asks for one only if a compaction pushed that task's error bound past the budget, so nothing is read before
    it is asked for. The merge runs on its own thread and asks from there; the event loop fetches.
    """

    def __init__(self, contents: Contents, tasks: frozenset[str], version: int, policy: StepPolicy) -> None:
        self._contents = contents
        self._tasks = tasks
        self._version = version
        self._policy = policy
        self._loop = asyncio.get_running_loop()

    def __getitem__(self, task_id: str) -> Adapter:
        """Return what the content of ``task_id`` should be."""
        if task_id not in self._tasks:
            raise KeyError(task_id)
        work = self._contents.of_task(task_id, self._version, self._policy)
        found = asyncio.run_coroutine_threadsafe(work, self._loop).result()
        assert found is not None  # tasks without an original are left out where this is made
        return found

    def __contains__(self, task_id: object) -> bool:
        """Return whether the task has an original; reads nothing."""
        return task_id in self._tasks

    def __iter__(self) -> Iterator[str]:
        """Iterate over the task ids."""
        return iter(self._tasks)

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self._tasks)
