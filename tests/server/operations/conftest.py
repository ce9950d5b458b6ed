"""Server directories with a history, made by real hubs, and copies of them to damage."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from share_core.spec_file import read_spec
from share_core.types import Space, SpaceSpec
from share_core.wire import decode_snapshot
from share_proto.v1 import hub_pb2
from share_server.config import ServerConfig, read_config
from share_server.layout import Layout
from share_server.local import Holder, LocalHub, submit_header, submit_messages
from share_server.provision import create_server, free_ports, renew_certificates
from share_server.store.pages import PageSums

GOLDEN = Path(__file__).parents[2] / "golden"


class Reopened(LocalHub):
    """A hub on a directory that is there already."""

    def __init__(self, root: Path, script: Path | None = None) -> None:
        self.layout = Layout(root)
        self.config = read_config(self.layout.config)
        self.spec = read_spec(self.layout.space)
        self.script = script
        self._process = None


class Life:
    """A hub, its members, and what was acknowledged to them."""

    def __init__(self, hub: LocalHub) -> None:
        self.hub = hub
        self.acknowledged: dict[str, str] = {}
        self.holders: dict[str, Holder] = {}

    def holder(self, member: str) -> Holder:
        """Enrol a member once."""
        if member not in self.holders:
            self.holders[member] = self.hub.enrol(member)
        return self.holders[member]

    def submit(self, member: str, task: str, payload: bytes, *, wait: bool = True) -> str:
        """Submit one update, wait for its version unless told otherwise, and return its id.

        A task called ``shared`` is open to everybody.
        """
        header = submit_header(self.hub.spec, task, payload)
        if task.endswith("/shared"):
            header.schema_sha256 = "5c" * 32
            header.sharing.open = True
        with self.hub.hub(self.holder(member)) as stub:
            update_id = stub.Submit(submit_messages(header, payload), timeout=30.0).update_id
            self.acknowledged[update_id] = hashlib.sha256(payload).hexdigest()
            while wait and self.state(stub, update_id) == hub_pb2.UPDATE_STATE_ACCEPTED:
                time.sleep(0.02)
        return str(update_id)

    @staticmethod
    def state(stub: object, update_id: str) -> int:
        """Return how far an update came."""
        return int(stub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=update_id)).update.state)  # type: ignore[attr-defined]

    def fetch(self, member: str, version: int = 0) -> Space:
        """Fetch one version."""
        request = hub_pb2.FetchSnapshotRequest(space_id=self.hub.spec.space_id, version=version)
        with self.hub.hub(self.holder(member)) as stub:
            payload = b"".join(part.chunk for part in stub.FetchSnapshot(request, timeout=30.0))
        return decode_snapshot(payload, self.hub.spec)

    def listed(self) -> dict[str, str]:
        """Return digest by id of every update that the hub lists."""
        with self.hub.hub(self.hub.own("operator")) as stub:
            answer = stub.ListUpdates(hub_pb2.ListUpdatesRequest(), timeout=30.0)
        return {one.update_id: one.payload_sha256 for one in answer.updates}


@pytest.fixture(scope="session")
def live() -> Callable[[LocalHub], Life]:
    """Return what wraps a hub in a :class:`Life`."""
    return Life


@pytest.fixture(scope="session")
def history(
    tmp_path_factory: pytest.TempPathFactory, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> tuple[Path, dict[str, str]]:
    """One stopped server: eleven versions, compactions, updates in older bases, a shared task; what it acknowledged."""
    life = Life(LocalHub(tmp_path_factory.mktemp("history") / "server", toy_spec))
    life.hub.start()
    for number in range(7):
        life.submit("acme/alice", f"acme/t{number % 6}", make_payload(number))
    older = life.fetch("acme/alice", 3)
    life.submit("acme/alice", "acme/t1", make_payload(20, older))
    life.submit("acme/alice", "acme/shared", make_payload(21))
    life.submit("bolt/bob", "acme/shared", make_payload(22, life.fetch("bolt/bob")))
    life.submit("bolt/bob", "bolt/own", make_payload(23))
    assert life.hub.stop() == 0
    return life.hub.layout.root, life.acknowledged


@pytest.fixture
def server(history: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    """A copy of that server, to damage."""
    root = tmp_path / "server"
    shutil.copytree(history[0], root)
    return root


@pytest.fixture
def reopen() -> Iterator[Callable[..., LocalHub]]:
    """Return a function (directory, script=None) -> hub on it; whatever still runs at the end is killed."""
    made: list[LocalHub] = []

    def make(root: Path, script: Path | None = None) -> LocalHub:
        made.append(Reopened(root, script))
        return made[-1]

    yield make
    for hub in made:
        if hub.running:
            hub.kill()


@pytest.fixture(scope="session")
def run_command(
    run_program: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs ``share-server`` with its arguments."""
    return lambda *arguments: run_program("from share_server.cli import main\nmain()\n", *arguments)


@pytest.fixture
def older_server(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function (name) -> server directory around a store that an older release has written."""

    def unpack(name: str) -> Path:
        with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian 12 has a Python without filters
            archive.extractall(tmp_path / "golden")
        golden, root, ports = tmp_path / "golden" / name, tmp_path / name, free_ports(3)
        config = ServerConfig(hub_port=ports[0], enrol_port=ports[1], gateway_port=ports[2])
        create_server(Layout(root), config, read_spec(golden / "space.toml"), datetime.now(UTC))
        if (golden / "ca").exists():  # its versions are signed: the authority and the key go with them
            for path in (root / "tls").glob("*.pem"):
                path.unlink()
            shutil.copytree(golden, root, dirs_exist_ok=True)
            renew_certificates(Layout(root), config, datetime.now(UTC))
        else:
            shutil.copytree(golden / "store", root / "store")
        return root

    return unpack


@pytest.fixture(scope="session")
def fingerprint() -> Callable[[Path], dict[str, tuple[str, int, int]]]:
    """Return a function (directory) -> (digest, mode, time of change) of every file below it."""

    def look(root: Path) -> dict[str, tuple[str, int, int]]:
        return {
            str(path.relative_to(root)): (
                hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
                path.stat().st_mode,
                path.stat().st_mtime_ns,
            )
            for path in root.rglob("*")
        }

    return look


@pytest.fixture(scope="session")
def rewrite() -> Callable[[Path, str], None]:
    """Return a function that changes rows of a stopped server with care: page sums agree, only the meaning is wrong."""

    def change(root: Path, statement: str) -> None:
        with sqlite3.connect(root / "store" / "journal.db") as other:
            assert other.execute(statement).rowcount != 0
        other.close()
        PageSums(root / "store" / "journal.db").recount()

    return change
