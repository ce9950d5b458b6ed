"""Making every kept version anew from its updates, and comparing it with what is stored.

With the same build, one thread and the recorded policy the bytes are equal. Another build may round otherwise: then the
subspaces and the merged tasks must be as near as rounding leaves them, and the replay goes on from the stored version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from share_core.errors import RebaseError
from share_core.ledger import TaskLedger, measure
from share_core.linalg import thin_qr
from share_core.merge import HubState
from share_core.space import empty_space, task_adapter
from share_core.types import Space, SpaceSpec
from share_core.wire import encode_snapshot
from share_server.hub.contents import Contents
from share_server.hub.stepping import Stepper
from share_server.operations.checks import Rows
from share_server.operations.reading import ReadStore, Told
from share_server.operations.remaining import forgetting_versions, replay_remaining
from share_server.operations.remaking import remake
from share_server.operations.report import Report
from share_server.operations.versions import make_contents, read_step, recorded_policy
from share_server.store.records import UpdateRow, VersionRow

NEAR = 1e-6
"""Largest distance of a version that another build made of the same updates."""

_NEVER = 2**62


@dataclass
class _Replay:
    """What every step of one replay needs."""

    store: ReadStore
    spec: SpaceSpec
    rows: Rows
    contents: Contents
    stepper: Stepper
    report: Report
    updates: dict[str, UpdateRow]


async def replay_versions(
    store: ReadStore,
    spec: SpaceSpec,
    rows: Rows,
    newest: HubState,
    report: Report,
    told: Told,
) -> None:
    """Replay every kept version; the store must have passed the other checks."""
    torch.set_num_threads(1)
    contents = make_contents(store, spec, newest.space)
    updates = {row.new.update_id: row for row in rows.updates}
    run = _Replay(store, spec, rows, contents, Stepper(contents, spec), report, updates)
    kept = [row for row in rows.versions if not row.collected]
    whole = len(kept) == len(rows.versions)
    try:
        if whole:
            state = HubState(empty_space(spec), {})
        elif kept[0].version in forgetting_versions(rows):
            state, whole = await _without_the_forgotten(run, kept.pop(0), told)
        else:
            state = await _begin(run, kept.pop(0))
            report.notes.append(f"replayed from version {state.space.version}: older ones are collected")
        for done, row in enumerate(kept, start=1):
            state = await _replay_one(run, state, row)
            told("replay", done, len(kept))
    finally:
        run.stepper.close()
    if whole and report.bit_equal == report.replayed:
        differ = [task for task in {**state.ledger, **newest.ledger} if not _alike(state.ledger, newest.ledger, task)]
        if differ:
            report.problems.append(f"the error ledger is not what a replay gives, for {', '.join(sorted(differ))}")


def _alike(made: Mapping[str, TaskLedger], stored: Mapping[str, TaskLedger], task: str) -> bool:
    if task not in made or task not in stored or made[task].measured != stored[task].measured:
        return False
    a, b = made[task], stored[task]
    pairs = [(a.norms, b.norms), (a.bounds, b.bounds)]
    return all(
        one.keys() == two.keys() and all(abs(one[s] - two[s]) <= NEAR * b.norm for s in one) for one, two in pairs
    )


async def _begin(run: _Replay, row: VersionRow) -> HubState:
    """Return the oldest kept version with a ledger that is measured, since the one in force then is not kept."""
    space = read_step(run.store.blobs, run.spec, None, row)
    ledger: dict[str, TaskLedger] = {}
    for task in space.cores:
        stored = task_adapter(space, task, torch.float64)
        original = await run.contents.of_task(task, row.version, recorded_policy(row, run.rows, run.spec))
        ledger[task] = measure(original or stored, stored)
    return HubState(space, ledger)


async def _without_the_forgotten(run: _Replay, row: VersionRow, told: Told) -> tuple[HubState, bool]:
    """Make the version of a forgetting anew from what remains, as :func:`_replay_one`; return whether that could be."""
    try:
        made = await replay_remaining(run.store, run.contents, run.stepper, run.spec, run.rows, row.version, told)
    except RebaseError as error:
        run.report.notes.append(f"version {row.version}, of a forgetting, cannot be made anew: {error}")
        return await _begin(run, row), False
    stored = read_step(run.store.blobs, run.spec, None, row)
    run.report.replayed += 1
    _compare(run.report, row, made.space, stored, "", encode_snapshot(made.space), stored.cores)
    if made.space.cores.keys() != stored.cores.keys():
        run.report.problems.append(f"version {row.version} holds other tasks than what remains of the updates gives")
    return HubState(stored, made.ledger), True


async def _replay_one(run: _Replay, before: HubState, row: VersionRow) -> HubState:
    """Make one version anew and compare it; return the stored version with the ledger of the replay."""
    stored = read_step(run.store.blobs, run.spec, before.space, row)
    run.report.replayed += 1
    policy = recorded_policy(row, run.rows, run.spec)
    if not row.updates:
        made = await remake(run.store, run.contents, before, policy, run.spec)
        _compare(run.report, row, made.space, stored, "", encode_snapshot(made.space), before.space.cores)
        return HubState(stored, made.ledger)
    own = [run.updates[name] for name in row.updates]
    every = 1 if row.snapshot_sha256 is not None else _NEVER
    tried = await run.stepper.step(before, own, policy, every, again=True)
    step = tried.step
    if step is None or tuple(one.update_id for one in step.merged) != row.updates:
        reasons = "; ".join(f"{name}: {error}" for name, error in tried.refused.items()) or "too large together"
        run.report.problems.append(f"version {row.version} cannot be made of its updates again: {reasons}")
        return HubState(stored, before.ledger)
    tasks = {one.task_id for one in step.merged}
    delta = hashlib.sha256(step.delta).hexdigest()
    equal = _compare(run.report, row, step.state.space, stored, delta, step.snapshot, tasks)
    for one in step.merged:
        if equal and abs(one.relative_error - run.updates[one.update_id].relative_error) > NEAR:
            run.report.problems.append(f"update {one.update_id} was merged with another error than its row says")
    return HubState(stored, step.state.ledger)


def _compare(
    report: Report,
    row: VersionRow,
    made: Space,
    stored: Space,
    delta_sha256: str,
    snapshot: bytes | None,
    tasks: Collection[str],
) -> bool:
    """Return whether the bytes are equal; where they are not, measure how far apart the versions are."""
    snapshot_sha256 = None if snapshot is None else hashlib.sha256(snapshot).hexdigest()
    if (delta_sha256, snapshot_sha256) == (row.delta_sha256, row.snapshot_sha256):
        report.bit_equal += 1
        return True
    distance = max(subspace_distance(made, stored), max((_task_distance(made, stored, t) for t in tasks), default=0.0))
    report.largest_distance = max(report.largest_distance, distance)
    if distance > NEAR:
        report.problems.append(f"version {row.version} is not what its updates give: they are {distance:.2e} apart")
    return False


def subspace_distance(a: Space, b: Space) -> float:
    """Return the sine of the largest angle between the bases of two versions; 1 where their sizes differ."""
    worst = 0.0
    for site, one in a.bases.items():
        other = b.bases[site]
        for left, right in ((one.left, other.left), (one.right, other.right)):
            if left.shape != right.shape:
                return 1.0
            if left.shape[1]:
                p, q = thin_qr(left.double())[0], thin_qr(right.double())[0]
                worst = max(worst, float(torch.linalg.matrix_norm(q - p @ (p.mT @ q), 2)))
    return worst


def _task_distance(a: Space, b: Space, task: str) -> float:
    """Return ``||dW_a - dW_b|| / ||dW_b||`` of one task; 1 where only one version holds it."""
    if task not in a.cores or task not in b.cores:
        return 1.0
    return measure(task_adapter(b, task, torch.float64), task_adapter(a, task, torch.float64)).bound
