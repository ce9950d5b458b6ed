"""Backups of a serving hub: complete or not there, while uploads, merges and collection go on; and their way back."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from share_core.errors import ConfigError
from share_core.spec_file import read_spec
from share_proto.v1 import hub_pb2
from share_server.config import RetentionConfig, ServerConfig, read_config
from share_server.hub.engine import Engine
from share_server.layout import Layout
from share_server.local import LocalHub
from share_server.operations.backup import MARKER, backup_running, backup_stopped
from share_server.operations.restore import restore
from share_server.operations.verify import verify


def _backup(hub: LocalHub, target: Path) -> list[hub_pb2.BackupProgress]:
    with hub.hub(hub.own("operator")) as stub:
        return list(stub.Backup(hub_pb2.BackupRequest(directory=str(target)), timeout=120.0))


def test_a_backup_of_a_serving_hub_is_a_complete_server(
    server: Path,
    tmp_path: Path,
    reopen: Callable[..., LocalHub],
    live: Callable[[LocalHub], Any],
    make_payload: Callable[..., bytes],
) -> None:
    hub = reopen(server)
    hub.start()
    life = live(hub)
    life.submit("acme/alice", "acme/t0", make_payload(60))
    before = life.listed()
    over = threading.Event()

    def go_on() -> None:
        number = 0
        while not over.is_set():
            life.submit("acme/alice", f"acme/during{number % 3}", make_payload(100 + number), wait=False)
            number += 1

    client = threading.Thread(target=go_on)
    client.start()
    try:
        steps = [_backup(hub, tmp_path / f"backup{number}") for number in range(3)]
    finally:
        over.set()
        client.join()
    for number, told in enumerate(steps):
        last = told[-1]
        assert last.finished and last.done == last.total > 20 and not any(one.finished for one in told[:-1])
        assert [one.done for one in told] == sorted(one.done for one in told)
        copy = Layout(tmp_path / f"backup{number}")
        report = verify(copy, replay=True)
        assert report.problems == [] and report.versions == last.version >= 12 and report.orphans == []
        assert not (tmp_path / f"backup{number}.partial").exists()
    for name in ("ca/ca.key", "tls/server.key", "tls/operator.key", "enrol.key", "signing.key"):
        mode = stat.S_IMODE((tmp_path / "backup0" / name).stat().st_mode)
        assert mode == 0o600, name
        assert (tmp_path / "backup0" / name).read_bytes() == (server / name).read_bytes()
    assert set(life.acknowledged) <= set(life.listed())  # the hub took no harm
    assert hub.stop() == 0
    assert verify(Layout(server), replay=True).problems == []
    version = restore(tmp_path / "backup2", tmp_path / "again")
    assert version == steps[2][-1].version and not (tmp_path / "again" / MARKER).exists()
    revived = reopen(tmp_path / "again")
    revived.start()
    listed = live(revived).listed()
    assert before.items() <= listed.items()
    assert revived.stop() == 0


def test_the_commands_do_the_same(
    server: Path,
    tmp_path: Path,
    reopen: Callable[..., LocalHub],
    run_command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    hub = reopen(server)
    hub.start()
    done = run_command("backup", str(server), str(tmp_path / "one"), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["version"] == 11, done.stderr
    assert hub.stop() == 0
    done = run_command("backup", str(server), str(tmp_path / "two"))
    assert done.returncode == 0 and "backup of version 11" in done.stdout, done.stderr
    done = run_command("backup", str(server), str(tmp_path / "two"))
    assert done.returncode == 1 and "exists already" in done.stderr
    for name in ("one", "two"):
        done = run_command("restore", str(tmp_path / name), str(tmp_path / f"{name}-again"), "--json")
        assert done.returncode == 0 and "refuse this hub" in json.loads(done.stdout)["warning"], done.stderr
        assert verify(Layout(tmp_path / f"{name}-again"), replay=True).problems == []
    done = run_command("restore", str(server), str(tmp_path / "three"))
    assert done.returncode == 1 and "no complete backup" in done.stderr


async def _backup_under_collection(root: Path, target: Path, hold: bool) -> int:
    """Back up while everything that may go is collected; ``hold`` is what the hub does and a planted bug leaves out."""
    layout = Layout(root)
    config = ServerConfig(retention=RetentionConfig(horizon_versions=1, snapshot_every=1))
    engine = await Engine.open(layout.store, read_spec(layout.space), config, layout.signing_key.read_bytes())
    try:
        async with AsyncExitStack() as stack:
            if hold:
                await stack.enter_async_context(engine.collector.held)
            steps = await stack.enter_async_context(aclosing(backup_running(engine.store, target)))
            await anext(steps)  # the journal is copied
            collected = await (engine.collector.collect() if hold else engine.collector.collect_now())
            version = [step[2] async for step in steps][-1]
            assert collected == 0
        assert await engine.collector.collect() > 0  # held, not forgotten
        return version
    finally:
        await engine.close()


def test_collection_takes_nothing_from_a_backup(server: Path, tmp_path: Path) -> None:
    version = asyncio.run(_backup_under_collection(server, tmp_path / "backup", hold=True))
    assert version == 11
    report = verify(Layout(tmp_path / "backup"), replay=True)
    assert report.problems == [] and report.replayed == 11
    assert verify(Layout(server), replay=True).problems == []


def test_a_collection_in_between_would_be_found(server: Path, tmp_path: Path) -> None:
    """A planted bug: the backup does not hold the collector. It fails, and leaves nothing that looks complete."""
    with pytest.raises(ConfigError, match="nothing is left"):
        asyncio.run(_backup_under_collection(server, tmp_path / "backup", hold=False))
    assert [path.name for path in tmp_path.iterdir()] == ["server"]


SLOW = """
import sys, time
from share_server.hub import __main__
from share_server.operations import backup

honest = backup._run

def slow(steps):
    time.sleep(0.5)
    honest(steps)

backup._run, backup._GROUP = slow, 4
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("end", ["killed", "caller gone"])
def test_a_backup_that_is_cut_short_is_no_backup(
    end: str, server: Path, tmp_path: Path, reopen: Callable[..., LocalHub]
) -> None:
    (tmp_path / "hub.py").write_text(SLOW)
    hub = reopen(server, tmp_path / "hub.py")
    hub.start()
    with hub.hub(hub.own("operator")) as stub:
        steps = stub.Backup(hub_pb2.BackupRequest(directory=str(tmp_path / "backup")), timeout=120.0)
        assert next(steps).finished is False and next(steps).done == 4
        if end == "killed":
            hub.kill()
        else:
            steps.cancel()
        with pytest.raises(grpc.RpcError):
            list(steps)
    assert not (tmp_path / "backup").exists()
    with pytest.raises(ConfigError, match="no complete backup"):
        restore(tmp_path / "backup.partial", tmp_path / "again")
    if end == "caller gone":
        assert hub.running and hub.stop() == 0
        assert not (tmp_path / "backup.partial").exists()
    assert verify(Layout(server)).problems == []


def test_a_hub_that_is_stopped_ends_the_backup_first(
    server: Path, tmp_path: Path, reopen: Callable[..., LocalHub]
) -> None:
    (tmp_path / "hub.py").write_text(SLOW)
    hub = reopen(server, tmp_path / "hub.py")
    hub.start()
    with hub.hub(hub.own("operator")) as stub:
        steps = stub.Backup(hub_pb2.BackupRequest(directory=str(tmp_path / "backup")), timeout=120.0)
        next(steps)
        assert hub.stop() == 0
        assert list(steps)[-1].finished
    assert verify(Layout(tmp_path / "backup")).problems == []


FULL = """
import errno, sys
from share_server.hub import __main__
from share_server.operations import backup

def full(*rest):
    raise OSError(errno.ENOSPC, "No space left on device")

if "journal" in sys.argv[1]:
    from share_server.store import pages
    pages.PageSums.recount = full
else:
    backup.copy_flushed = full
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("what", ["journal", "files"])
def test_a_full_target_is_refused_and_the_hub_goes_on(
    what: str,
    server: Path,
    tmp_path: Path,
    reopen: Callable[..., LocalHub],
    live: Callable[[LocalHub], Any],
    make_payload: Callable[..., bytes],
) -> None:
    root = tmp_path / what
    server.rename(root)
    (tmp_path / "hub.py").write_text(FULL)
    hub = reopen(root, tmp_path / "hub.py")
    hub.start()
    with pytest.raises(grpc.RpcError) as caught:
        _backup(hub, tmp_path / "backup")
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "No space left on device" in str(caught.value.details())
    assert not (tmp_path / "backup").exists() and not (tmp_path / "backup.partial").exists()
    life = live(hub)
    life.submit("acme/alice", "acme/after", make_payload(70))  # not taken for a failure of the store
    assert hub.stop() == 0


def test_a_stopped_store_of_format_1_is_copied_as_it_is(
    older_server: Callable[[str], Path], tmp_path: Path, fingerprint: Callable[[Path], Mapping[str, object]]
) -> None:
    root = older_server("store-1")
    before = fingerprint(root)
    assert backup_stopped(Layout(root), tmp_path / "backup") == 8
    assert fingerprint(root) == before
    assert restore(tmp_path / "backup", tmp_path / "again") == 8
    report = verify(Layout(tmp_path / "again"), replay=True)
    assert report.problems == [] and report.format == 1 and report.updates == 9


def test_without_hard_links_payloads_are_copied_and_proved(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*rest: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    backup_stopped(Layout(server), tmp_path / "one")
    assert verify(Layout(tmp_path / "one"), replay=True).problems == []
    payload = next((server / "store" / "blobs").glob("*/*"))
    payload.write_bytes(payload.read_bytes() + b"!")
    with pytest.raises(ConfigError, match="is damaged"):
        backup_stopped(Layout(server), tmp_path / "two")
    assert not (tmp_path / "two").exists() and not (tmp_path / "two.partial").exists()


def test_a_damaged_backup_is_not_restored(server: Path, tmp_path: Path) -> None:
    backup_stopped(Layout(server), tmp_path / "backup")
    assert MARKER == "backup.json"  # backups that were made before must stay restorable
    shutil.copytree(tmp_path / "backup", tmp_path / "other")
    payload = next((tmp_path / "other" / "store" / "blobs").glob("*/*"))
    payload.unlink()
    with pytest.raises(ConfigError, match="nothing was restored"):
        restore(tmp_path / "other", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    # A store that is sound in itself, but not the one that was backed up.
    said = json.loads((tmp_path / "backup" / MARKER).read_text())
    (tmp_path / "backup" / MARKER).write_text(json.dumps({**said, "hash": "0" * 64}))
    with pytest.raises(ConfigError, match="another hash chain"):
        restore(tmp_path / "backup", tmp_path / "again")
    with pytest.raises(ConfigError, match="exists already"):
        restore(tmp_path / "backup", server)


def test_places_that_cannot_be_are_refused(server: Path, tmp_path: Path, reopen: Callable[..., LocalHub]) -> None:
    hub = reopen(server)
    hub.start()
    (tmp_path / "left.partial").mkdir()
    wrong = {
        "relative": "absolute path",
        str(server): "exists already",
        str(tmp_path / "missing" / "backup"): "is no directory",
        str(server / "store" / "backup"): "inside the store",
        str(tmp_path / "left"): "did not end",
    }
    for place, expected in wrong.items():
        with pytest.raises(grpc.RpcError) as caught:
            _backup(hub, Path(place))
        assert expected in str(caught.value.details()), place
    with pytest.raises(ConfigError, match="stop it first"):
        backup_stopped(Layout(server), tmp_path / "backup")
    assert hub.running
    assert read_config(Layout(server).config) == hub.config
