"""Making a space anew: the same tasks in fresh bases, from what was submitted and not from what was left of it."""

from __future__ import annotations

import torch

from share_core.ledger import TaskLedger, charge, measure
from share_core.merge import HubState, empty_state, merge_all, project
from share_core.space import task_adapter
from share_core.types import Adapter, Cores, Space, SpaceSpec
from share_core.wire import decode_snapshot, encode_snapshot
from share_server.hub.contents import Contents
from share_server.hub.policy import StepPolicy
from share_server.hub.stepping import parts_by_rank
from share_server.operations.reading import Told, silent
from share_server.store.store import Store
from share_server.store.updates import newest_merged

_BATCH = 32


async def remake(
    store: Store, contents: Contents, before: HubState, policy: StepPolicy, spec: SpaceSpec, told: Told = silent
) -> HubState:
    """Return the version after ``before``: all its tasks in new bases of at most ``policy.k_max`` vectors.

    First the bases: all tasks are merged into an empty space, in the order in which their contents arrived, many in a
    merge. Then every task is projected on the final bases from its own content, so that its error is measured and no
    earlier compaction counts. Contents are read twice and not kept, since together they may not fit into memory.
    """
    tasks = await _in_ingest_order(store, before.space)
    state = empty_state(spec)
    for start in range(0, len(tasks), _BATCH):
        batch = [
            (task, (await content_of(contents, before, task, policy))[0]) for task in tasks[start : start + _BATCH]
        ]
        for part in parts_by_rank(batch, policy.most_rank):
            state = merge_all(state, dict(part), policy.merge).state
        told("bases", min(start + _BATCH, len(tasks)), len(tasks))
    version, bases = before.space.version + 1, state.space.bases
    cores: dict[str, Cores] = {}
    ledger: dict[str, TaskLedger] = {}
    for done, task in enumerate(tasks, start=1):
        content, known = await content_of(contents, before, task, policy)
        cores[task] = project(bases, content)
        found = measure(content, task_adapter(Space(version, bases, {task: cores[task]}), task, torch.float64))
        ledger[task] = found if known else charge(before.ledger[task], found.bounds)
        told("tasks", done, len(tasks))
    space = decode_snapshot(encode_snapshot(Space(version, bases, cores)), spec)  # what is stored is the authority
    return HubState(space, ledger)


async def content_of(contents: Contents, before: HubState, task: str, policy: StepPolicy) -> tuple[Adapter, bool]:
    """Return what a task says, and whether that comes from what was submitted.

    A task that was moved by steps is only known from the version before.
    """
    content = await contents.of_task(task, before.space.version, policy)
    return (content, True) if content is not None else (task_adapter(before.space, task, torch.float64), False)


async def _in_ingest_order(store: Store, space: Space) -> list[str]:
    """Return the tasks of a version in the order in which the newest update of each arrived."""
    places: dict[str, int] = {}
    for task in space.cores:
        rows = await store.do(lambda journal, task=task: newest_merged(journal, task, space.version))  # type: ignore[misc]
        places[task] = max(row.ingest_seq for row in rows)
    return sorted(places, key=lambda task: places[task])
