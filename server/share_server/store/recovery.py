"""Coming back: from what lies on disk to the state the hub had when it last committed.

A version whose step only appends is kept as its delta alone: replaying it is concatenation and zero padding,
exact to the bit. A step that rotates a basis multiplies matrices, whose last bits depend on the machine and
its thread count; such a version is kept whole, and so is every :data:`SNAPSHOT_EVERY`-th, which bounds the
replay. The stored bytes are the authority: a running hub continues from what it stored, not from what it computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from share_core.errors import ManifestError, StorageError
from share_core.identity.manifest import GENESIS, VERSION, parse_manifest
from share_core.merge import HubState
from share_core.space import advance, empty_space
from share_core.types import Space, SpaceSpec
from share_core.wire import decode_delta, decode_snapshot
from share_server.store.blobs import BlobStore
from share_server.store.journal import Journal
from share_server.store.records import UpdateRow, UpdateState, VersionRow
from share_server.store.updates import list_updates, update_entry
from share_server.store.versions import (
    head_version,
    list_versions,
    nearest_snapshot,
    read_ledger,
    read_version,
    version_entry,
)

SNAPSHOT_EVERY = 64
"""A full snapshot is stored at least this often, in versions."""

_PAGE = 1000

_VERIFYING = 4
"""Payloads read and hashed side by side."""

Entries = Mapping[int, tuple[str, dict[str, Any], str]]
"""(kind, body, hexadecimal hash) of every entry of the hash chain by number."""

Verified = Callable[[int, int], None]
"""Is told how far a verification is: (bytes of payloads that were found whole, bytes of all). May raise to end it."""


def tell_nobody(done: int, total: int) -> None:
    """For who does not wait."""


@dataclass(frozen=True)
class ReplayPlan:
    """Which payloads give one version."""

    version: int
    """The version they give."""
    snapshot: VersionRow | None
    """Start from its snapshot; None: from version 0."""
    deltas: tuple[VersionRow, ...]
    """Then apply these, in order."""


def plan_replay(journal: Journal, version: int) -> ReplayPlan:
    """Return how to rebuild a version: the nearest snapshot, then the deltas after it.

    Raises:
        VersionError: there is no such version; RebaseError: it is no longer kept.
    """
    if version:
        read_version(journal, version)
    start = nearest_snapshot(journal, version)
    first = start.version if start else 0
    deltas = list_versions(journal, first, version)
    if [row.version for row in deltas if not row.collected] != list(range(first + 1, version + 1)):
        raise StorageError(f"versions between {first} and {version} are missing: the store is damaged")
    return ReplayPlan(version, start, tuple(deltas))


def replay(blobs: BlobStore, spec: SpaceSpec, plan: ReplayPlan) -> Space:
    """Rebuild one version from stored payloads, bit for bit."""
    space = empty_space(spec)
    if plan.snapshot is not None and plan.snapshot.snapshot_sha256 is not None:
        space = decode_snapshot(blobs.read(plan.snapshot.snapshot_sha256), spec)
    for row in plan.deltas:
        space = advance(space, decode_delta(blobs.read(row.delta_sha256), spec))
    if space.version != plan.version:
        raise StorageError(f"replay ended at version {space.version}, expected {plan.version}: the store is damaged")
    return space


def recover(journal: Journal, blobs: BlobStore, spec: SpaceSpec, verified: Verified = tell_nobody) -> HubState:
    """Verify the whole store and return the newest committed state; ``verified`` is told how far it is.

    Checked, in order: the hash chain; that every update and version says what its chained entry says; that the versions
    are 1 to head without a gap and their manifests link; that every payload they need is there and has its digest.
    Updates that were accepted and not merged need nothing: the merge loop takes them in ingest order.

    Raises:
        StorageError: any of it does not hold.
    """
    if journal.rows("PRAGMA foreign_key_check"):
        raise StorageError("rows of the journal refer to rows that are gone: the store is damaged")
    entries = journal.verify_chain()
    head = head_version(journal)
    versions = list_versions(journal, 0, head)
    updates = all_updates(journal)
    for problem in row_problems(entries, updates, versions, head):
        raise StorageError(f"{problem}: the store is damaged")
    _verify_payloads(blobs, needed_payloads(updates, versions), verified)
    space = replay(blobs, spec, plan_replay(journal, head))
    return HubState(space=space, ledger=read_ledger(journal))


def _verify_payloads(blobs: BlobStore, sizes: Mapping[str, int], verified: Verified) -> None:
    """Read every payload again; raises StorageError for the first that is not whole."""
    done, total = 0, sum(sizes.values())
    with ThreadPoolExecutor(_VERIFYING, "verifying") as threads:
        for size, _ in zip(sizes.values(), threads.map(blobs.verify, sizes, sizes.values()), strict=True):
            done += size
            verified(done, total)


def needed_payloads(updates: Sequence[UpdateRow], versions: Sequence[VersionRow]) -> dict[str, int]:
    """Return the size of every payload that these rows need, by digest."""
    sizes: dict[str, int] = {}
    for update in updates:
        if update.state is not UpdateState.FORGOTTEN:
            sizes[update.new.sha256] = update.new.size
        if update.original_sha256 is not None:
            sizes[update.original_sha256] = update.original_size
    for version in versions:
        if version.collected:
            continue
        if version.delta_sha256:
            sizes[version.delta_sha256] = version.delta_size
        if version.snapshot_sha256 is not None:
            sizes[version.snapshot_sha256] = version.snapshot_size
    return sizes


def sizes_of(space: Space) -> dict[str, tuple[int, int]]:
    """Return (k_out, k_in) of every site."""
    return {site: (basis.k_out, basis.k_in) for site, basis in space.bases.items()}


def all_updates(journal: Journal) -> list[UpdateRow]:
    """Return every update in ingest order."""
    found: list[UpdateRow] = []
    while page := list_updates(journal, found[-1].ingest_seq if found else 0, _PAGE):
        found.extend(page)
    return found


def row_problems(
    entries: Entries,
    updates: list[UpdateRow],
    versions: list[VersionRow],
    head: int,
) -> Iterator[str]:
    """Compare the rows with the entries that were chained when they were written; yield what does not agree."""
    kinds = ("update", "refused", "version", "quarantined", "released")
    chained: dict[str, dict[Any, tuple[dict[str, Any], str]]] = {kind: {} for kind in kinds}
    for kind, body, digest in entries.values():
        if kind in chained:
            chained[kind][body["version" if kind == "version" else "update_id"]] = (body, digest)
    if len(chained["update"]) != len(updates) or len(chained["version"]) != len(versions):
        yield "the journal's rows and its hash chain differ in number"
    forgotten = forgotten_in(entries)
    merged = {name: row.version for row in versions for name in row.updates}
    for update in updates:
        name = update.new.update_id
        body, digest = chained["update"].get(name, ({}, ""))
        if body != update_entry(update.new, update.ingest_seq, update.received_ms) or digest != update.entry_hash:
            yield f"update {name} does not say what was chained"
        refused, released = name in chained["refused"], name in chained["released"]
        aside = name in chained["quarantined"] and not refused and not released
        as_before = (
            update.version == merged.get(name, 0)
            and (update.state is UpdateState.REFUSED) == refused
            and (update.state is UpdateState.QUARANTINED) == aside
        )
        gone = update.state is UpdateState.FORGOTTEN
        if gone != (name in forgotten) or not (gone or as_before):
            yield f"update {name} is {update.state.value}, which was not chained"
        if update.released != released:
            yield f"update {name} is {'' if update.released else 'not '}released, which was not chained"
    for version in versions:
        body, _ = chained["version"].get(version.version, ({}, ""))
        if _without(body, forgotten) != version_entry(version):
            yield f"version {version.version} does not say what was chained"
    yield from _manifest_problems(versions)
    if [row.version for row in versions] != list(range(1, head + 1)):
        yield f"the journal's head is {head} but its versions do not lead there without a gap"


def forgotten_in(entries: Entries) -> dict[str, int]:
    """Return the version in which each forgotten update was taken out, by id; 0 where that made no version."""
    said = [body for kind, body, _ in entries.values() if kind == "forgotten"]
    return {name: body["version"] for body in said for name in body["updates"]}


def _without(body: dict[str, Any], forgotten: Collection[str]) -> dict[str, Any]:
    """Return what was chained of a version, without the updates that were forgotten since."""
    if "updates" in body:
        return {**body, "updates": [name for name in body["updates"] if name not in forgotten]}
    return {key: value for key, value in body.items() if key != "update_id" or value not in forgotten}


def _manifest_problems(versions: list[VersionRow]) -> Iterator[str]:
    """Compare every version with its manifest, and every manifest with the one before it."""
    previous = GENESIS
    for version in versions:
        if not version.manifest.body:
            continue
        try:
            says = parse_manifest(version.manifest.body)
        except ManifestError as error:
            yield f"version {version.version}: {error}"
            continue
        expected = (VERSION, version.version, previous, version.delta_sha256, version.delta_size)
        if (says.kind, says.version, says.previous, says.payload_sha256, says.payload_size) != expected:
            yield f"the manifest of version {version.version} is of something else"
        previous = version.manifest.sha256
