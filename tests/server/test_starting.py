"""A start that takes long: it says how far it is, ends when asked, and finds damage although it reads side by side."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from share_core.errors import StorageError
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.local import LocalHub, submit_header, submit_messages
from share_server.store.store import Store

UPDATES = 6

GATED = """
import sys, time
from pathlib import Path
from share_server.hub import __main__, process
from share_server.store.blobs import BlobStore
process.VERIFYING_LINE_S = 0.0
honest = BlobStore.verify

def verify(self, digest, size):
    while digest != Path(sys.argv[1], "first").read_text() and not Path(sys.argv[1], "go").exists():
        time.sleep(0.01)
    honest(self, digest, size)

BlobStore.verify = verify
"""

DEAF = """
process._Verification.__call__ = lambda self, done, total: process.log.info("verifying", bytes=done, of=total)
"""

CARELESS = """
import sys
from share_server.hub import __main__
from share_server.store.blobs import BlobStore
BlobStore.verify = lambda self, digest, size: None
"""

MAIN = "sys.exit(__main__.main(sys.argv[1:]))\n"


def _fill(hub: LocalHub, spec: SpaceSpec, make_payload: Callable[..., bytes]) -> str:
    """Send a few updates and kill the hub, so that the journal has a log; return the digest of the first payload."""
    hub.start()
    digests = []
    with hub.hub(hub.enrol("acme/alice")) as stub:
        for number in range(UPDATES):
            payload = make_payload(number)
            header = submit_header(spec, f"acme/t{number}", payload)
            stub.Submit(submit_messages(header, payload), timeout=30)
            digests.append(header.payload_sha256)
        while stub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30).merged < UPDATES:
            time.sleep(0.01)  # a kill in the middle of a merge may leave a payload that no row needs
    hub.kill()
    assert (hub.layout.store / "journal.db-wal").stat().st_size > 0
    return digests[0]


def _said(hub: LocalHub, since: int, word: str) -> bool:
    return f'"event": "{word}"' in hub.log_file.read_bytes()[since:].decode()


@pytest.mark.parametrize("deaf", [False, True])
def test_a_start_that_verifies_says_so_and_ends_when_it_is_asked(
    new_hub: Callable[..., LocalHub],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
    tmp_path: Path,
    deaf: bool,
) -> None:
    hub = new_hub()
    (hub.layout.root / "first").write_text(_fill(hub, toy_spec, make_payload))
    hub.script = tmp_path / "gated.py"
    hub.script.write_text(GATED + DEAF * deaf + MAIN)
    before = hub.log_file.stat().st_size
    process = hub.launch()
    assert process.pid is not None
    while process.is_alive() and not _said(hub, before, "verifying"):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    (hub.layout.root / "go").touch()
    process.join(60)
    assert process.exitcode == 0
    assert _said(hub, before, "recovered") == deaf  # the deaf one reads everything before it listens
    hub.script = None
    hub.start()
    with hub.hub(hub.own("operator")) as stub:
        assert len(stub.ListUpdates(hub_pb2.ListUpdatesRequest(), timeout=30).updates) == UPDATES
    assert hub.stop() == 0


def test_damage_is_found_wherever_it_is(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes], tmp_path: Path
) -> None:
    hub = new_hub()
    merged = _fill(hub, toy_spec, make_payload)
    payloads = sorted((hub.layout.store / "blobs").glob("*/*"))
    assert len(payloads) > UPDATES  # updates and steps
    for path in payloads:
        before = hub.log_file.stat().st_size
        with _flipped(path):
            process = hub.launch()
            process.join(60)
        assert process.exitcode == 1
        assert f"payload {path.name} is damaged" in hub.log_file.read_bytes()[before:].decode()
    hub.script = tmp_path / "careless.py"
    hub.script.write_text(CARELESS + MAIN)
    with _flipped(hub.layout.store / "blobs" / merged[:2] / merged):
        hub.start()
        assert hub.stop() == 0


def test_a_verification_tells_of_every_byte(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    hub = new_hub()
    _fill(hub, toy_spec, make_payload)
    sizes = [path.stat().st_size for path in (hub.layout.store / "blobs").glob("*/*")]
    heard: list[tuple[int, int]] = []

    async def start() -> None:
        store, _ = await Store.open(hub.layout.store, toy_spec, verified=lambda done, of: heard.append((done, of)))
        await store.close()

    asyncio.run(start())
    assert heard[-1] == (sum(sizes), sum(sizes))
    assert [done for done, _ in heard] == sorted({done for done, _ in heard})
    assert len(heard) == len(sizes)


def test_a_start_that_fails_leaves_the_journal_as_it_lay(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    """SQLite would copy its log into the file when the connection goes, and the page sums would not follow."""
    hub = new_hub()
    first = _fill(hub, toy_spec, make_payload)
    with _flipped(hub.layout.store / "blobs" / first[:2] / first):
        with pytest.raises(StorageError, match=first) as held:
            asyncio.run(Store.open(hub.layout.store, toy_spec))
        left = {path.name: path.read_bytes() for path in hub.layout.store.iterdir() if path.is_file()}
        del held
        gc.collect()
        after = {path.name: path.read_bytes() for path in hub.layout.store.iterdir() if path.is_file()}
        assert sorted(after) == sorted(left)
        assert after == left


@contextmanager
def _flipped(path: Path) -> Iterator[None]:
    """The file, its last bit flipped for a while."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        yield
    finally:
        path.write_bytes(content)
