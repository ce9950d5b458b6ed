"""Stores that an older release wrote: today's hub takes them over with everything that was acknowledged.

``tests/golden/store-1.tar.xz`` was written by commit 4b9cc58 (format 1): eight versions, a compaction, and an update
that waits, its hub killed. ``store-1-first-life.tar.xz``: the hub was killed in its first life, so that its whole
journal is still in the log and the header of the file tells nothing. ``store-2.tar.xz`` was written by commit ad99a78
(format 2): eleven updates in ten versions, two of them of a task of two organisations, of
which a third waits in the buffer.
"""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from share_core.errors import ConfigError, StorageError
from share_core.spec_file import read_spec
from share_proto.v1 import hub_pb2
from share_server.config import ServerConfig
from share_server.hub import engine
from share_server.hub.engine import Engine
from share_server.layout import Layout
from share_server.local import LocalHub
from share_server.operations.rebuild import rebuild
from share_server.operations.verify import verify
from share_server.store import journal as journal_module
from share_server.store.journal import Journal
from share_server.store.pages import PageSums
from share_server.store.recovery import all_updates
from share_server.store.versions import read_manifest

STORES = {"store-1": (8, 8, 1), "store-1-first-life": (8, 8, 0), "store-2": (10, 11, 1)}
"""Versions, merged and waiting updates of each."""


def _acknowledged(root: Path) -> list[tuple[Any, ...]]:
    """Return an older format's updates and the chain; read from a copy so that its log stays as it is."""
    copy = root.parent / "before"
    copy.mkdir()
    for path in (root / "store").glob("journal.db*"):
        (copy / path.name).write_bytes(path.read_bytes())
    with sqlite3.connect(copy / "journal.db") as database:
        rows = database.execute(
            "SELECT u.update_id, u.sha256, hex(e.hash) FROM updates u JOIN entries e ON e.seq = u.entry_seq "
            "ORDER BY ingest_seq"
        ).fetchall()
    database.close()
    return rows


def _kept(root: Path) -> list[tuple[Any, ...]]:
    store = root / "store"
    journal = Journal(store / "journal.db", read_spec(root / "space.toml").space_id)
    try:
        journal.verify_chain()
        return [(row.new.update_id, row.new.sha256, row.entry_hash.upper()) for row in all_updates(journal)]
    finally:
        journal.close()


@pytest.mark.parametrize("name", STORES)
def test_a_store_of_an_older_format_is_taken_over(
    name: str,
    older_server: Callable[[str], Path],
    reopen: Callable[..., LocalHub],
    live: Callable[[LocalHub], Any],
    make_payload: Callable[..., bytes],
) -> None:
    root = older_server(name)
    versions, merged, waiting = STORES[name]
    promised = _acknowledged(root)
    assert len(promised) == merged + waiting
    hub = reopen(root)
    life = live(hub)
    hub.start()
    with hub.hub(hub.own("operator")) as stub:
        while (status := stub.GetStatus(hub_pb2.GetStatusRequest())).accepted:
            time.sleep(0.02)
    assert (status.version, status.merged, status.refused) == (versions + waiting, merged + waiting, 0)
    assert life.listed() == {row[0]: row[1] for row in promised}
    life.submit("acme/alice", "acme/new", make_payload(90, life.fetch("acme/alice")))
    assert hub.stop() == 0
    assert _kept(root)[: len(promised)] == promised
    for _ in range(2):  # once more: page sums and anchor hold for what the migration did not touch, too
        report = verify(Layout(root), replay=True)
        assert report.problems == [] and report.replayed == report.bit_equal == versions + waiting + 1
        hub.start()
        assert hub.stop() == 0


@pytest.mark.parametrize("name", STORES)
def test_members_can_follow_it_from_the_start(
    name: str, older_server: Callable[[str], Path], reopen: Callable[..., LocalHub], live: Callable[[LocalHub], Any]
) -> None:
    """Versions of format 1 carry no manifests; the first start signs them, since no client takes an unsigned one."""
    hub = reopen(older_server(name))
    hub.start()
    life, versions = live(hub), STORES[name][0]
    request = hub_pb2.FollowVersionsRequest(space_id=hub.spec.space_id, since_version=0)
    seen = []
    with hub.hub(life.holder("acme/alice")) as stub:
        for message in stub.FollowVersions(request, timeout=30.0):
            if message.WhichOneof("part") == "delta":
                assert message.delta.manifest.body and message.delta.manifest.signature
                seen.append(message.delta.version)
                if len(seen) == versions:
                    break
    assert seen == list(range(1, versions + 1))
    assert hub.stop() == 0
    assert verify(hub.layout).problems == []


def test_its_limits_are_written_down_before_they_change(older_server: Callable[[str], Path]) -> None:
    """Versions of format 1 do not say by which limits they were made: a rebuild must not make that forgotten."""
    layout = Layout(older_server("store-1"))
    assert rebuild(layout, 24).version == 9
    report = verify(layout, replay=True)
    assert report.problems == [] and report.replayed == report.bit_equal == 9


def test_a_store_that_is_only_opened_stays_whole(older_server: Callable[[str], Path]) -> None:
    """Opened and closed without a change, again and again: nothing may take the journal for one without promises."""
    root = older_server("store-1-first-life")
    promised = _acknowledged(root)
    for _ in range(3):
        assert _kept(root) == promised


KILL = """
import os, signal, sys
from pathlib import Path
from share_server.store import journal
from share_server.store.anchor import Anchor
from share_server.store.pages import PageSums

where, path, space_id = sys.argv[1:]

def die(*rest):
    os.kill(os.getpid(), signal.SIGKILL)

honest = journal.migrate

def half(database, version):
    honest(database, version)
    die()

if where == "inside the migration":
    journal.migrate = half
elif where == "before the sums":
    PageSums.recount = die
elif where == "before the first count":
    journal.Journal.transaction = die
elif where == "before the anchor":
    Anchor.write = die
elif where == "before the checkpoint":
    journal.Journal.checkpoint = die
journal.Journal(Path(path), space_id)
"""


WITHOUT_SUMS = ("before the sums", "before the first count", "before the anchor")
"""Places that only the migration of format 1 passes, which has neither page sums nor an anchor."""


@pytest.mark.parametrize(
    ("name", "where"),
    [
        (name, where)
        for name in STORES
        for where in ("inside the migration", *WITHOUT_SUMS, "before the checkpoint")
        if not (name == "store-2" and where in WITHOUT_SUMS)
    ],
)
def test_a_migration_that_is_killed_loses_nothing(
    where: str,
    name: str,
    older_server: Callable[[str], Path],
    run_program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    root = older_server(name)
    promised = _acknowledged(root)
    arguments = [where, str(root / "store" / "journal.db"), read_spec(root / "space.toml").space_id]
    for _ in range(2):  # and once more, while it is being brought back
        assert run_program(KILL, *arguments).returncode == -9
    assert _kept(root) == promised
    assert _kept(root) == promised


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the header decides whether a journal is kept": lambda patch: patch.setattr(
        journal_module, "_is_whole", lambda path: path.read_bytes()[60:64] == b"\0\0\0\1"
    ),
    "no sums for untouched pages": lambda patch: patch.setattr(PageSums, "recount", lambda self: None),
    "versions stay unsigned": lambda patch: patch.setattr(engine, "sign_unsigned", lambda *rest: 0),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(bug: str, older_server: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = older_server("store-1-first-life")
    promised = _acknowledged(root)

    async def holds() -> bool:
        for _ in range(2):
            layout = Layout(root)
            running = await Engine.open(
                layout.store, read_spec(layout.space), ServerConfig(), layout.signing_key.read_bytes()
            )
            try:
                updates = await running.store.do(all_updates)
                first = await running.store.do(lambda journal: read_manifest(journal, 1))
                if len(updates) != len(promised) or first is None:
                    return False
            finally:
                await running.close()
        return True

    PLANTED[bug](monkeypatch)
    try:
        assert not asyncio.run(holds())
    except StorageError as error:
        assert "damaged" in str(error)


def test_a_newer_format_is_refused_and_not_a_byte_is_changed(
    server: Path,
    reopen: Callable[..., LocalHub],
    fingerprint: Callable[[Path], Mapping[str, object]],
    rewrite: Callable[[Path, str], None],
) -> None:
    rewrite(server, "PRAGMA user_version = 5")
    (server / "store" / "staging" / "t-0123").write_bytes(b"an upload of the newer release")
    before = fingerprint(server / "store")
    process = reopen(server).launch()
    process.join(60)
    assert process.exitcode == 1
    said = (server / "logs" / "hub.log").read_text()
    assert "the store has format 5 and this release of fedshare writes format 4" in said
    assert fingerprint(server / "store") == before
    with pytest.raises(ConfigError, match="format 5"):
        verify(Layout(server))
    assert fingerprint(server / "store") == before
