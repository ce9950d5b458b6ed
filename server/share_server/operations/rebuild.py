"""``share-server rebuild``: the space of a stopped server made anew at another size, as its next version.

Order, so that a kill at any point is harmless: snapshot durable -> the new limits durable in ``space.toml.next`` ->
version committed -> ``space.toml.next`` takes the place of ``space.toml``. Whether the limits hold is decided by the
version: the next start finds ``space.toml.next`` and puts it in place if the newest version was rebuilt with these
limits, and else removes it (:func:`settle`).
"""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass

import torch

from share_core.durable import PUBLIC, flush_directory, write_atomic
from share_core.errors import ConfigError
from share_core.ledger import measure
from share_core.merge import HubState
from share_core.space import task_adapter
from share_core.spec_file import read_spec, spec_to_toml
from share_core.types import SpaceSpec
from share_core.wire import encode_snapshot
from share_server.config import ServerConfig, read_config
from share_server.hub.clock import now_ms
from share_server.hub.contents import Contents
from share_server.hub.engine import Engine
from share_server.hub.policy import StepPolicy, policy_from_text, policy_of
from share_server.hub.signing import sign_version
from share_server.layout import Layout
from share_server.operations.reading import Told, silent
from share_server.operations.remaking import content_of, remake
from share_server.store.journal import Journal
from share_server.store.records import VersionCommit, VersionRow
from share_server.store.recovery import sizes_of
from share_server.store.store import Store
from share_server.store.versions import commit_version, head_version, list_versions, read_manifest


@dataclass(frozen=True)
class TaskErrors:
    """Relative error of one task against what was submitted."""

    task_id: str
    """The task."""
    before: float
    """In the version before; a bound where only that version knows the task."""
    after: float
    """In the rebuilt version."""


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild has made."""

    version: int
    """The new version; that of before where there was nothing to rebuild."""
    k_max: int
    """Limits now in force: basis vectors per site and side."""
    tau: float
    """Share of a task's norm that a merge may leave out."""
    tasks: tuple[TaskErrors, ...]
    """Every task, sorted."""


def rebuild(layout: Layout, k_max: int, tau: float | None = None, told: Told = silent) -> Rebuilt:
    """Make the space of a stopped server anew.

    Args:
        layout: the server directory.
        k_max: largest number of basis vectors per site and side, 1 to 4096.
        tau: share of a task's norm that a merge may leave out, in [0, 1); None leaves it as it is.
        told: told how far it is.

    Raises:
        ConfigError: the limits make no sense, a hub runs, or the directory cannot be used.
        StorageError: the store is damaged or the disk refused.
    """
    return asyncio.run(_rebuild(layout, k_max, tau, told))


async def settle(layout: Layout, spec: SpaceSpec) -> SpaceSpec:
    """Finish a rebuild that was cut short between its version and its limits, or forget one that has no version.

    Returns the limits in force. Raises as :meth:`share_server.store.store.Store.open`.
    """
    following = layout.space_next
    if not following.exists():
        return spec
    wanted = read_spec(following)
    store, _ = await Store.open(layout.store, spec, read_config(layout.config).retention.upload_hours * 3600)
    try:
        if await store.do(lambda journal: _was_rebuilt_with(journal, wanted)):
            _put_in_place(layout)
            return wanted
        following.unlink()
        flush_directory(following.parent)
        return spec
    finally:
        await store.close()


async def _rebuild(layout: Layout, k_max: int, tau: float | None, told: Told) -> Rebuilt:
    torch.set_num_threads(1)
    config = read_config(layout.config)
    spec = await settle(layout, read_spec(layout.space))
    wanted = dataclasses.replace(spec, k_max=k_max, tau=spec.tau if tau is None else tau)
    if not (1 <= wanted.k_max <= 4096 and 0 <= wanted.tau < 1):
        raise ConfigError(f"expected 1 <= k_max <= 4096 and 0 <= tau < 1, got {wanted.k_max} and {wanted.tau:g}")
    engine = await Engine.open(layout.store, spec, config, layout.signing_key.read_bytes())
    try:
        return await _make(layout, config, wanted, engine, told)
    finally:
        await engine.close()


async def _make(layout: Layout, config: ServerConfig, wanted: SpaceSpec, engine: Engine, told: Told) -> Rebuilt:
    before, store = engine.feed.state, engine.store
    policy = policy_of(wanted, config.merge, config.robust.policy)
    if not before.space.cores:
        write_atomic(layout.space, spec_to_toml(wanted).encode(), PUBLIC)
        return Rebuilt(before.space.version, wanted.k_max, wanted.tau, ())
    contents = Contents(store, wanted, engine.history)
    after = await remake(store, contents, before, policy, wanted, told)
    errors = await _errors(contents, before, after, policy)
    snapshot = encode_snapshot(after.space)
    digest = await store.io(lambda: store.blobs.put(snapshot))
    write_atomic(layout.space_next, spec_to_toml(wanted).encode(), PUBLIC)
    key = layout.signing_key.read_bytes()

    def commit(journal: Journal) -> None:
        version = after.space.version
        previous = read_manifest(journal, version - 1)
        row = VersionRow(
            version=version,
            updates=(),
            delta_sha256="",
            delta_size=0,
            snapshot_sha256=digest,
            snapshot_size=len(snapshot),
            compacts=True,
            sizes=sizes_of(after.space),
            policy=policy.to_text(),
            manifest=sign_version(key, wanted.space_id, version, ("", 0), previous),
        )
        commit_version(journal, VersionCommit(row, (), after.ledger), now_ms())

    await store.do(commit)
    _put_in_place(layout)
    return Rebuilt(after.space.version, wanted.k_max, wanted.tau, errors)


async def _errors(contents: Contents, before: HubState, after: HubState, policy: StepPolicy) -> tuple[TaskErrors, ...]:
    found = []
    for task in sorted(after.space.cores):
        content, known = await content_of(contents, before, task, policy)
        stored = task_adapter(before.space, task, torch.float64)
        was = measure(content, stored).bound if known else before.ledger[task].bound
        found.append(TaskErrors(task, was, after.ledger[task].bound))
    return tuple(found)


def _put_in_place(layout: Layout) -> None:
    layout.space_next.rename(layout.space)
    flush_directory(layout.root)


def _was_rebuilt_with(journal: Journal, wanted: SpaceSpec) -> bool:
    head = head_version(journal)
    row = next(iter(list_versions(journal, head - 1, head)), None)
    if row is None or row.updates or not row.policy:
        return False
    policy = policy_from_text(row.policy)
    return (policy.k_max, policy.tau) == (wanted.k_max, wanted.tau)
