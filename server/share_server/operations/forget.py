"""``share-server forget``: a stopped server without what one contributor has given.

The space is made anew from the updates that remain (:mod:`share_server.operations.remaining`) and published whole as
the next version. Versions before it hold directions of the forgotten contributor, so their payloads go; updates of
others that were expressed in such versions are written out in ambient factors first. See
:mod:`share_server.store.forgetting` for what a kill leaves.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from share_core.errors import ConfigError, RebaseError
from share_core.ledger import measure
from share_core.merge import HubState
from share_core.names import check_name
from share_core.space import task_adapter
from share_core.spec_file import read_spec
from share_core.types import SpaceSpec
from share_core.wire import encode_snapshot
from share_server.config import read_config
from share_server.hub.clock import now_ms
from share_server.hub.engine import Engine
from share_server.hub.policy import policy_of
from share_server.hub.signing import sign_version
from share_server.hub.stepping import Stepper
from share_server.hub.uploads import key_prefix
from share_server.layout import Layout
from share_server.operations.checks import Rows
from share_server.operations.reading import ReadJournal, ReadStore, Told, copied, held, reading, silent
from share_server.operations.rebuild import settle
from share_server.operations.remaining import replay_remaining
from share_server.operations.versions import make_contents
from share_server.store.forgetting import Forgetting, announce_sweep, commit_forgotten, sweep, take_out
from share_server.store.journal import Journal
from share_server.store.records import UpdateRow, UpdateState, VersionRow
from share_server.store.recovery import all_updates, needed_payloads, plan_replay, replay, sizes_of
from share_server.store.versions import head_version, list_versions, read_ledger, read_manifest

_ORIGINALS = 32
"""Updates written out in ambient factors per transaction."""


@dataclass(frozen=True)
class TaskCost:
    """What forgetting costs one task of others."""

    task_id: str
    """The task."""
    before: float
    """Bound on its relative error before."""
    after: float
    """The same in the version without the forgotten contributor."""
    change: float
    """How far what the space holds of it moves, relative to what it held."""


@dataclass(frozen=True)
class Forgotten:
    """What was forgotten, or would be."""

    name: str
    """``organisation/name`` or ``organisation``."""
    version: int
    """The newest version afterwards; that of before where no version held anything of it."""
    updates: int
    """Updates that go; 0 if there was nothing left to forget."""
    vanished: tuple[str, ...]
    """Tasks that go with them, since nobody else has contributed."""
    tasks: tuple[TaskCost, ...]
    """Every task that stays, sorted."""
    payload_bytes: int
    """Bytes of the payloads that go: its own, and those of all versions before."""
    dry_run: bool
    """Whether nothing was changed."""
    notes: tuple[str, ...]
    """What forgetting cannot do, and what to do next."""


@dataclass(frozen=True)
class _Plan:
    """What a forgetting will write."""

    head: int
    own: Sequence[UpdateRow]
    after: HubState | None
    """None where no version holds any of them."""
    said: Forgotten


def forget(layout: Layout, name: str, *, dry_run: bool = False, told: Told = silent) -> Forgotten:
    """Take everything that a member or an organisation has contributed out of a stopped server.

    Args:
        layout: the server directory.
        name: ``organisation/name``, or ``organisation`` for all of its members.
        dry_run: say what would happen, and change nothing.
        told: told how far it is.

    Raises:
        ConfigError: nobody of that name has contributed, a hub runs, the directory cannot be used, or what the space
            was made of is no longer kept.
        StorageError: the store is damaged or the disk refused.
    """
    for part in name.split("/", 1):
        check_name(part, "organisation or member")
    torch.set_num_threads(1)
    if dry_run:
        with held(layout), copied(layout) as folder:
            return asyncio.run(_look(folder, read_spec(layout.space), name, told))
    return asyncio.run(_forget(layout, name, told))


async def _look(folder: Path, spec: SpaceSpec, name: str, told: Told) -> Forgotten:
    if not (folder / "journal.db").exists():
        raise _nobody(name, ())
    async with reading(folder) as store:
        return (await _plan(store, spec, name, True, told)).said


async def _forget(layout: Layout, name: str, told: Told) -> Forgotten:
    config = read_config(layout.config)
    spec = await settle(layout, read_spec(layout.space))
    key = layout.signing_key.read_bytes()
    engine = await Engine.open(layout.store, spec, config, key)
    try:
        store = engine.store
        own, others = await store.do(lambda journal: _split(journal, name))
        if own:
            await store.do(announce_sweep)
            if any(row.version for row in own):
                await _keep_originals(engine, others, told)
        with tempfile.TemporaryDirectory(prefix="fedshare-") as temporary:
            folder = Path(temporary)
            await store.do(lambda journal: journal.copy_to(folder / "journal.db"))
            (folder / "blobs").symlink_to((layout.store / "blobs").resolve())
            async with reading(folder) as copy:
                plan = await _plan(copy, spec, name, False, told)
        if own:
            policy = policy_of(spec, config.merge, config.robust.policy).to_text()
            await _write(engine, plan, key, spec, policy)
            await sweep(store)
        return plan.said
    finally:
        await engine.close()


async def _keep_originals(engine: Engine, others: Sequence[UpdateRow], told: Told) -> None:
    """Free what remains of the versions that it was expressed in."""
    settled = (UpdateState.REFUSED, UpdateState.FORGOTTEN)
    bound = [row for row in others if row.new.base_version and not row.original_sha256 and row.state not in settled]
    for start in range(0, len(bound), _ORIGINALS):
        try:
            await engine.collector.keep_originals(bound[start : start + _ORIGINALS])
        except RebaseError as error:
            raise _no_longer_kept(error) from error
        told("originals", min(start + _ORIGINALS, len(bound)), len(bound))


async def _plan(store: ReadStore, spec: SpaceSpec, name: str, dry_run: bool, told: Told) -> _Plan:
    """Forget in a copy of the journal, and make the space anew from what remains there."""
    own, others = await store.look(lambda journal: _split(journal, name))
    head = await store.do(head_version)
    if not own:
        known = sorted({row.new.member for row in others})
        if not any(row.state is UpdateState.FORGOTTEN and _is_of(row, name) for row in others):
            raise _nobody(name, known)
        return _Plan(head, (), None, Forgotten(name, head, 0, (), (), 0, dry_run, ()))
    ids = [row.new.update_id for row in own]
    merged = any(row.version for row in own)
    version = head + 1 if merged else head
    space = replay(store.blobs, spec, await store.do(lambda journal: plan_replay(journal, head)))
    before = HubState(space, await store.do(read_ledger))
    versions = await store.do(lambda journal: list_versions(journal, 0, head))
    goes = (
        needed_payloads([*own, *others], versions).items() - needed_payloads(others, () if merged else versions).items()
    )
    await store.look(lambda journal: journal.suppose(lambda: take_out(journal, ids, version)))
    after = before
    if merged:
        rows = await store.look(lambda journal: _rows(journal, head))
        contents = make_contents(store, spec, space)
        stepper = Stepper(contents, spec)
        try:
            after = await replay_remaining(store, contents, stepper, spec, rows, version, told)
        except RebaseError as error:
            raise _no_longer_kept(error) from error
        finally:
            stepper.close()
    said = Forgotten(
        name=name,
        version=version,
        updates=len(own),
        vanished=tuple(sorted({row.new.task_id for row in own} - {row.new.task_id for row in others if _stays(row)})),
        tasks=_costs(before, after),
        payload_bytes=sum(size for _, size in goes),
        dry_run=dry_run,
        notes=_notes(name, merged),
    )
    return _Plan(head, own, after if merged else None, said)


async def _write(engine: Engine, plan: _Plan, key: bytes, spec: SpaceSpec, policy: str) -> None:
    """Make the version durable, then everything else in one transaction."""
    store, after, name = engine.store, plan.after, plan.said.name
    snapshot = b"" if after is None else encode_snapshot(after.space)
    digest = "" if after is None else await store.io(lambda: store.blobs.put(snapshot))

    def commit(journal: Journal) -> None:
        row = None
        if after is not None:
            version = after.space.version
            row = VersionRow(
                version=version,
                updates=(),
                delta_sha256="",
                delta_size=0,
                snapshot_sha256=digest,
                snapshot_size=len(snapshot),
                compacts=True,
                sizes=sizes_of(after.space),
                policy=policy,
                manifest=sign_version(key, spec.space_id, version, ("", 0), read_manifest(journal, version - 1)),
            )
        ids = tuple(one.new.update_id for one in plan.own)
        ledgers = {} if after is None else after.ledger
        commit_forgotten(journal, Forgetting(name, ids, row, ledgers, (key_prefix(name),)), now_ms())

    await store.do(commit)


def _split(journal: Journal, name: str) -> tuple[list[UpdateRow], list[UpdateRow]]:
    """Return (the updates of ``name`` that are not forgotten yet, all others), in ingest order."""
    own: list[UpdateRow] = []
    others: list[UpdateRow] = []
    for row in all_updates(journal):
        gone = row.state is UpdateState.FORGOTTEN
        (own if _is_of(row, name) and not gone else others).append(row)
    return own, others


def _is_of(row: UpdateRow, name: str) -> bool:
    return name in (row.new.member, row.new.organisation)


def _stays(row: UpdateRow) -> bool:
    """Return whether an update of somebody else keeps its task alive."""
    return row.state not in (UpdateState.REFUSED, UpdateState.FORGOTTEN)


def _rows(journal: ReadJournal, head: int) -> Rows:
    return Rows(journal.verify_chain(), all_updates(journal), list_versions(journal, 0, head), head)


def _costs(before: HubState, after: HubState) -> tuple[TaskCost, ...]:
    found = []
    for task in sorted(after.space.cores):
        was, now = (task_adapter(one.space, task, torch.float64) for one in (before, after))
        found.append(TaskCost(task, before.ledger[task].bound, after.ledger[task].bound, measure(was, now).bound))
    return tuple(found)


def _notes(name: str, merged: bool) -> tuple[str, ...]:
    notes = [
        f"{name} may contribute again until 'share-server revoke' shuts its members out",
        f"backups made before still hold what {name} sent: remove them",
    ]
    if merged:
        notes += [
            f"others may have trained in bases that {name} helped to shape: what they sent is kept as they meant it, "
            "so what they learned from these bases stays until they train anew",
            "members and relays that fetched earlier versions still have those: they fetch the new one whole, and "
            "what they train on older ones is refused with the advice to rebase",
        ]
    return tuple(notes)


def _nobody(name: str, known: Sequence[str]) -> ConfigError:
    listed = ", ".join(known) or "nobody"
    return ConfigError(f"{name} has contributed nothing here: expected a member or an organisation of {listed}")


def _no_longer_kept(error: RebaseError) -> ConfigError:
    return ConfigError(
        f"the space cannot be made anew without it, since something that it was made of is no longer kept ({error}): "
        "nothing was forgotten"
    )
