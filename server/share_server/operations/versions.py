"""Every kept version read from its payloads, and the error ledger measured anew."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from share_core.errors import FedshareError
from share_core.ledger import TaskLedger, measure
from share_core.merge import HubState
from share_core.space import advance, empty_space, task_adapter
from share_core.types import Space, SpaceSpec
from share_core.wire import decode_delta, decode_snapshot, encode_snapshot
from share_server.config import MergeConfig
from share_server.hub.contents import Contents
from share_server.hub.feed import Feed
from share_server.hub.history import History
from share_server.hub.policy import StepPolicy, policy_from_text, policy_from_values, policy_of
from share_server.operations.checks import Rows
from share_server.operations.reading import ReadStore, Told
from share_server.operations.report import Report
from share_server.store.blobs import BlobStore
from share_server.store.records import VersionRow
from share_server.store.recovery import sizes_of

LEDGER_SLACK = 1e-6
"""Share of a task's norm by which a measurement may exceed a bound: what rounding to float32 costs."""


def check_versions(blobs: BlobStore, spec: SpaceSpec, rows: Rows, report: Report, told: Told) -> Space | None:
    """Read every kept version; return the newest, or None if it cannot be read."""
    kept = [row for row in rows.versions if not row.collected]
    space = empty_space(spec) if len(kept) == len(rows.versions) else None
    for done, row in enumerate(kept, start=1):
        before, space = space, None
        with report.noting(f"version {row.version}"):
            space = read_step(blobs, spec, before, row)
            if sizes_of(space) != dict(row.sizes):
                report.problems.append(f"version {row.version} has other sizes than its row says")
            report.problems += list(_snapshot_problems(blobs, spec, before, row))
        told("versions", done, len(kept))
    return space if not rows.versions or space is None or space.version == rows.head else None


def read_step(blobs: BlobStore, spec: SpaceSpec, before: Space | None, row: VersionRow) -> Space:
    """Return one version from its snapshot, or else from the version before and its step.

    Raises:
        StorageError, PayloadError, VersionError: it cannot be read.
    """
    if row.snapshot_sha256 is not None:
        space = decode_snapshot(blobs.read(row.snapshot_sha256), spec)
    elif before is None:
        raise FedshareError("it cannot be read, since the version before cannot")
    else:
        space = advance(before, decode_delta(blobs.read(row.delta_sha256), spec))
    if space.version != row.version:
        raise FedshareError(f"its payload is version {space.version}")
    return space


def _snapshot_problems(blobs: BlobStore, spec: SpaceSpec, before: Space | None, row: VersionRow) -> Iterator[str]:
    """A step that only appends gives the snapshot to the bit; one that rotates gives it up to rounding."""
    if row.snapshot_sha256 is None or before is None or not row.delta_sha256:
        return
    stepped = advance(before, decode_delta(blobs.read(row.delta_sha256), spec))
    if not row.compacts and hashlib.sha256(encode_snapshot(stepped)).hexdigest() != row.snapshot_sha256:
        yield f"the step to version {row.version} does not lead to its snapshot"


def make_contents(store: ReadStore, spec: SpaceSpec, space: Space) -> Contents:
    """Return access to what was submitted, where ``space`` is the newest version."""
    feed = Feed(HubState(space, {}), spec.space_id)
    return Contents(store, spec, History(store, spec, feed))


def recorded_policy(row: VersionRow, rows: Rows, spec: SpaceSpec) -> StepPolicy:
    """Return the policy under which a version was made.

    Versions of format 1 had only the limits of the space, which were written down when they were signed; before that
    they are those in force.
    """
    if row.policy:
        return policy_from_text(row.policy)
    older = rows.policy_of_format_1
    return policy_of(spec, MergeConfig()) if older is None else policy_from_values(older)


async def check_ledger(
    contents: Contents,
    spec: SpaceSpec,
    rows: Rows,
    state: HubState,
    report: Report,
    told: Told,
) -> None:
    """Measure every task of the newest version against what was submitted; its ledger must not promise less error."""
    tasks = sorted(state.space.cores)
    if set(state.ledger) != set(tasks):
        report.problems.append("the error ledger and the newest version do not hold the same tasks")
    merged_in = {update.new.task_id: update.version for update in rows.updates if update.version}
    policies = _last_use(rows, spec)
    for done, task in enumerate(tasks, start=1):
        with report.noting(f"ledger of task {task}"):
            if task in state.ledger:
                # It was measured in its merge or in a later refit, each by the rule of its time.
                since = merged_in.get(task, 0)
                excess = [await _excess(contents, state, task, policy) for policy, last in policies if last >= since]
                if min(excess) > LEDGER_SLACK:
                    report.ledger_violations += 1
                    report.problems.append(
                        f"task {task} is further from what was submitted than its ledger says, by {min(excess):.2e} "
                        "of its norm"
                    )
        told("ledger", done, len(tasks))


def _last_use(rows: Rows, spec: SpaceSpec) -> list[tuple[StepPolicy, int]]:
    """Return every rule by which contents were mixed, with the last version that was made by it."""
    found: dict[str, tuple[StepPolicy, int]] = {}
    for row in rows.versions:
        # What does not mix does not matter here.
        policy = replace(recorded_policy(row, rows, spec), k_max=1, tau=0.0, refits=0)
        found[policy.to_text()] = (policy, row.version)
    return list(found.values())


async def _excess(contents: Contents, state: HubState, task: str, policy: StepPolicy) -> float:
    """Return by how much the measured error exceeds the bound, as a share of the norm; below 0 where all is well."""
    original = await contents.of_task(task, state.space.version, policy)
    if original is None:
        return -1.0  # moved by steps: only the version itself says what it is
    measured = measure(original, task_adapter(state.space, task, torch.float64))
    return excess_of(measured, state.ledger[task])


def excess_of(measured: TaskLedger, ledger: TaskLedger) -> float:
    """Return the largest excess over all sites, as a share of the task's norm."""
    norm = max(measured.norm, 1e-30)
    worst = max((measured.bounds[site] - ledger.bounds.get(site, 0.0) for site in measured.bounds), default=0.0)
    return max(worst, abs(measured.norm - ledger.norm)) / norm
