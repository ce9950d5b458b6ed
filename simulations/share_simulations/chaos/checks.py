"""Did the hub keep its promises? A second process opens what is left, lets it finish, and counts.

What must hold after any crash: the store opens; every acknowledged update is there once with the same bytes; the ingest
order is 1..n; every update is merged exactly once or refused with a reason; versions are 1..head and each holds an
update; every payload that a row refers to is there and whole; a published version is still there, bit for bit; and a
client that sends everything again changes nothing that was acknowledged.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from share_core.errors import FedshareError, RebaseError
from share_server.hub.engine import Engine
from share_server.store.journal import Journal
from share_server.store.records import UpdateRow, UpdateState, VersionRow
from share_server.store.updates import list_updates
from share_server.store.versions import head_version, list_versions
from share_simulations.chaos.ptrace import Ending, run_child
from share_simulations.chaos.scenario import Plan, Promised, after_fork, digest_of, resume, settle

_ROWS = 10**9
_MOST = 40

KINDS = {
    "lost": "an acknowledged update is gone or has other bytes",
    "double": "an update was merged twice, or its retry made a second one",
    "gaps": "ingest numbers or versions have gaps",
    "dangling": "a row refers to a payload that is missing or damaged",
    "unpublished": "a version that subscribers saw is gone or has other content",
    "unmerged": "an accepted update is neither merged nor refused",
    "unopenable": "the store does not open",
    "hung": "the hub hung or died of something other than the planned fault",
    "unnoticed": "the hub went on after its storage had failed",
    "late": "an acknowledgement was given after the storage had failed",
    "silent": "damaged bytes were opened as if nothing had happened",
    "changed": "a call that was refused, or answered before, changed the state",
    "admitted": "a submission that somebody had changed or stolen was taken",
    "unclear": "a damaged store was refused with an error that no operator understands",
}
"""Every way in which a promise can be broken."""


@dataclass(frozen=True)
class Finding:
    """One broken promise."""

    kind: str
    """A key of :data:`KINDS`."""
    text: str
    """What exactly."""


def recovery(
    plan: Plan, promised: Promised, log: Path | None = None, prepare: Callable[[], None] = lambda: None
) -> list[Finding]:
    """Open the store of ``plan`` in a child, let it finish and return every broken promise; ``prepare`` runs first."""

    def main() -> list[dict[str, str]]:
        prepare()
        return [asdict(finding) for finding in asyncio.run(_recover(plan, promised))[:_MOST]]

    answer, ending = ask(main, log)
    if answer is None:
        return [Finding("hung", f"the recovering hub ended with {ending} and without a word")]
    return [Finding(**item) for item in answer]


def ask(main: Callable[[], Any], log: Path | None) -> tuple[Any, Ending]:
    """Run ``main`` in a child; return (what it returned, through JSON, or None if it died first; how it ended)."""
    read, write = os.pipe()

    def child() -> int:
        os.close(read)
        after_fork()
        with os.fdopen(write, "w") as pipe:
            json.dump(main(), pipe)
        return 0

    try:
        ending = run_child(child, log=log)
    finally:
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
    return (json.loads(text) if text and ending.code == 0 else None), ending


async def _recover(plan: Plan, promised: Promised) -> list[Finding]:
    try:
        engine = await Engine.open(plan.store, plan.spec, plan.config, plan.signing_key)
    except Exception as error:  # whatever it is, the operator's hub does not come back
        return [Finding("unopenable", f"the store does not open: {type(error).__name__}: {error}")]
    merging = asyncio.create_task(engine.loop.run())
    try:
        found = await _unpublished(engine, promised)
        engine.loop.wake()
        await settle(engine)
        found += await _send_again(engine, plan, promised)
        engine.loop.wake()
        await settle(engine)
        engine.loop.stop()
        await merging  # it may still be collecting
        rows = await engine.store.do(lambda journal: list_updates(journal, 0, _ROWS))
        head = await engine.store.do(head_version)
        versions = await engine.store.do(lambda journal: list_versions(journal, 0, head))
        entries = await engine.store.do(Journal.verify_chain)
    except FedshareError as error:
        return [Finding("unopenable", f"the hub fails after its start: {type(error).__name__}: {error}")]
    finally:
        engine.loop.stop()
        await asyncio.gather(merging, return_exceptions=True)
        await engine.close()
    merges = [body for kind, body, *_ in entries.values() if kind == "version"]
    return [
        *found,
        *_lost(rows, promised),
        *counted(rows, merges, head),
        *_dangling(plan.store, rows, versions),
    ]


async def _unpublished(engine: Engine, promised: Promised) -> list[Finding]:
    """Compare the recovered version with the one that was seen, before anything new is merged."""
    version = promised.version
    if engine.feed.version < version:
        return [Finding("unpublished", f"version {version} was published, the hub came back at {engine.feed.version}")]
    if not promised.digest:
        return []
    try:
        space = await engine.history.space(version)
    except RebaseError:
        return []  # collected since
    if digest_of(space) != promised.digest:
        return [Finding("unpublished", f"version {version} was published with other content")]
    return []


async def _send_again(engine: Engine, plan: Plan, promised: Promised) -> list[Finding]:
    """Be every client that does not know whether its update arrived, and goes on where it broke off."""
    found = []
    for letter in plan.letters:
        known = await resume(engine, letter)
        if letter.update_id in promised.acks and known is not True:
            found.append(
                Finding("lost", f"update {letter.update_id} was acknowledged; sent again it is not known: {known}")
            )
        elif isinstance(known, FedshareError) and not isinstance(known, RebaseError):
            found.append(Finding("lost", f"update {letter.update_id} is refused when it is sent again: {known}"))
    return found


def _lost(rows: list[UpdateRow], promised: Promised) -> Iterable[Finding]:
    known = {row.new.update_id: row for row in rows}
    for update_id, sha256 in promised.acks.items():
        if update_id not in known:
            yield Finding("lost", f"update {update_id} was acknowledged and is lost")
        elif known[update_id].new.sha256 != sha256:
            yield Finding("lost", f"update {update_id} was acknowledged with other bytes")


def counted(rows: list[UpdateRow], merges: list[dict[str, Any]], head: int) -> Iterable[Finding]:
    """Count in the rows and, independently, in the hash chain's own words."""
    for update_id, times in Counter(row.new.update_id for row in rows).items():
        if times > 1:
            yield Finding("double", f"update {update_id} stands {times} times in the journal")
    merged = Counter(name for body in merges for name in body.get("updates") or [body["update_id"]])
    for name, times in merged.items():
        if times > 1:
            yield Finding("double", f"update {name} was merged {times} times")
    for row in rows:
        name, times = row.new.update_id, merged[row.new.update_id]
        if row.state is UpdateState.ACCEPTED:
            yield Finding("unmerged", f"update {name} is not merged")
        elif (row.version > 0) != (times > 0) or (row.version == 0 and not row.reason):
            yield Finding("unmerged", f"update {name} is {row.state.value} in version {row.version}: {row.reason!r}")
    if [row.ingest_seq for row in rows] != list(range(1, len(rows) + 1)):
        yield Finding("gaps", "the ingest order has gaps")
    if {row.version for row in rows if row.version} != set(range(1, head + 1)):
        yield Finding("gaps", f"versions 1 to {head} do not each hold an update")


def _dangling(store: Path, rows: list[UpdateRow], versions: list[VersionRow]) -> Iterable[Finding]:
    """Read every payload that a row refers to, without the hub's own code."""
    digests = [digest for row in rows for digest in (row.new.sha256, row.original_sha256) if digest]
    for version in versions:
        if version.collected:
            continue
        digests += [digest for digest in (version.delta_sha256, version.snapshot_sha256) if digest]
    for digest in digests:
        path = store / "blobs" / digest[:2] / digest
        if not path.is_file():
            yield Finding("dangling", f"payload {digest} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            yield Finding("dangling", f"payload {digest} is damaged")
