"""One step: from a version and some updates to the bytes of the next version.

The merge loop makes versions with it and a replay of the journal makes them again: with the same build, one thread and
the recorded policy the bytes are equal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from share_core.errors import FedshareError, StorageError
from share_core.merge import HubState, Merged, merge_all
from share_core.robust.past import Harm, harm_of
from share_core.space import advance
from share_core.types import Adapter, SpaceSpec
from share_core.wire import decode_delta, decode_snapshot, encode_delta, encode_snapshot
from share_server.hub.contents import Contents, Originals
from share_server.hub.judging import Background, Said, to_set_aside
from share_server.hub.policy import StepPolicy
from share_server.store.records import Merging, UpdateRow

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """A version that is not stored yet."""

    state: HubState
    """The next state, made from the bytes below: what is stored is the authority, not what was computed."""
    delta: bytes
    """The step as published."""
    snapshot: bytes | None
    """The whole version, where it must be kept."""
    compacts: bool
    """Whether it rotates a basis."""
    merged: tuple[Merging, ...]
    """The updates in it, in ingest order."""
    harm: Harm | None
    """What it would cost somebody else more than the limit."""


@dataclass(frozen=True)
class Tried:
    """What became of a batch."""

    step: Step | None
    """The version, if at least one update could be merged."""
    refused: Mapping[str, FedshareError]
    """Updates that cannot be read in their base version, by id."""
    aside: Mapping[str, str]
    """Updates that the others outvote, by id, with the reason."""


class Stepper:
    """Makes versions. Close it when done."""

    def __init__(self, contents: Contents, spec: SpaceSpec) -> None:
        self._contents = contents
        self._spec = spec
        self._thread = ThreadPoolExecutor(1, "merge")

    async def step(
        self,
        state: HubState,
        rows: Sequence[UpdateRow],
        policy: StepPolicy,
        snapshot_every: int,
        *,
        again: bool = False,
    ) -> Tried:
        """Merge ``rows``, given in ingest order, into ``state``.

        Of many large updates only the first ones are taken, so that a version stays of bounded size; the others wait.
        With ``again`` they were merged before: none is set aside, also where others have been forgotten since; one that
        is outvoted has no weight.

        Raises:
            StorageError: the store failed. What else the mathematics raises concerns the rows together.
        """
        refused: dict[str, FedshareError] = {}
        said: list[Said] = []
        for row in rows:
            try:
                said.append(Said(row, await self._contents.of_update(row)))
            except StorageError:
                raise
            except FedshareError as error:
                refused[row.new.update_id] = error
        if not said:
            return Tried(None, refused, {})
        said = [one for one, _ in parts_by_rank([(one, one.adapter) for one in said], policy.most_rank)[0]]
        groups: dict[str, list[Said]] = {}
        for one in said:
            groups.setdefault(one.row.new.task_id, []).append(one)
        aside: dict[str, str] = {}
        behind: dict[str, Background] = {}
        for task, fresh in groups.items():
            behind[task] = await self._background(task, state.space.version, policy)
            if not again and await self._contents.is_shared(task):
                aside.update(await asyncio.to_thread(to_set_aside, behind[task], fresh, policy))
        said = [one for one in said if one.row.new.update_id not in aside]
        groups = {task: [one for one in own if one in said] for task, own in groups.items()}
        adapters = {
            task: await self._contents.next_of_task(task, state.space, behind[task], fresh, policy)
            for task, fresh in groups.items()
            if fresh
        }
        if not adapters:
            return Tried(None, refused, aside)
        originals = await self._originals(state, adapters, policy)
        loop = asyncio.get_running_loop()
        taken = [one.row for one in said]
        work = loop.run_in_executor(
            self._thread, self._compute, state, taken, adapters, policy, originals, snapshot_every
        )
        try:
            return Tried(await asyncio.shield(work), refused, aside)
        except asyncio.CancelledError:
            await asyncio.wait([work])  # it asks this event loop for originals: without it, it would never end
            raise

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True)

    async def _background(self, task_id: str, version: int, policy: StepPolicy) -> Background:
        """Return what a shared task is mixed with and judged by; nothing is read where neither is done."""
        needed = policy.mixing == "mean" or policy.robust.filters
        if not (needed and await self._contents.is_shared(task_id)):
            return Background()
        return await self._contents.background(task_id, version, policy)

    async def _originals(self, state: HubState, adapters: Mapping[str, Adapter], policy: StepPolicy) -> Originals:
        others = [task for task in state.space.cores if task not in adapters]
        if policy.mixing != "mean":
            others = [task for task in others if not await self._contents.is_shared(task)]
        return Originals(self._contents, frozenset(others), state.space.version, policy)

    def _compute(
        self,
        state: HubState,
        rows: Sequence[UpdateRow],
        adapters: Mapping[str, Adapter],
        policy: StepPolicy,
        originals: Mapping[str, Adapter],
        snapshot_every: int,
    ) -> Step:
        """Merge and encode; runs on the merge thread."""
        merged = merge_all(state, adapters, policy.merge, originals)
        delta = encode_delta(merged.delta)
        space = advance(state.space, decode_delta(delta, self._spec))
        snapshot = None
        if merged.delta.compacts or space.version % snapshot_every == 0:
            snapshot = encode_snapshot(space)
            space = decode_snapshot(snapshot, self._spec)
        return Step(
            state=HubState(space=space, ledger=merged.state.ledger),
            delta=delta,
            snapshot=snapshot,
            compacts=merged.delta.compacts,
            merged=_mergings(rows, merged),
            harm=harm_of(
                state.ledger,
                merged.state.ledger,
                adapters.keys(),
                {row.new.organisation for row in rows},
                policy.robust.past,
            ),
        )


def parts_by_rank(said: Iterable[tuple[T, Adapter]], most: int) -> list[list[tuple[T, Adapter]]]:
    """Cut a sequence into parts, in order, so that the ranks of each add up to at most ``most``, or it is one alone."""
    parts: list[list[tuple[T, Adapter]]] = []
    total = 0
    for one in said:
        rank = max((factors.rank for factors in one[1].values()), default=0)
        if not parts or total + rank > most:
            parts.append([])
            total = 0
        parts[-1].append(one)
        total += rank
    return parts


def _mergings(rows: Sequence[UpdateRow], merged: Merged) -> tuple[Merging, ...]:
    return tuple(Merging(row.new.update_id, row.new.task_id, merged.relative_errors[row.new.task_id]) for row in rows)
