"""A real hub in a process of its own, enrolled clients, and a trainer that takes milliseconds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
import torch

from share_client.backoff import Backoff
from share_client.durable import make_private_directory
from share_client.enrol import enrol, make_node_key
from share_client.link import HubLink
from share_client.member import ClientLayout, load_credentials, load_member
from share_core.durable import write_atomic
from share_core.errors import FedshareError
from share_core.fingerprint import describe_space
from share_core.identity import (
    Identity,
    make_authority,
    make_csr,
    new_private_key_pem,
    sign_csr,
    token_decode,
    token_encode,
)
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2_grpc
from share_server.local import LocalHub

HERE = Path(__file__).parent


def load_beside(name: str) -> ModuleType:
    """Load a module that lies beside this file: test modules cannot import each other."""
    loaded = importlib.util.spec_from_file_location(f"tests_client_{name}", HERE / f"{name}.py")
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    sys.modules[loaded.name] = module
    loaded.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module with the fake trainer."""
    return load_beside("fake_trainer")


@pytest.fixture
def line() -> Iterator[Callable[..., Any]]:
    """Open TCP lines to listeners; all are closed after the test."""
    made: list[Any] = []
    module = load_beside("line")

    def open_line(target: str, port: int = 0) -> Any:
        made.append(module.Line(target, port))
        return made[-1]

    yield open_line
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def spec(fake: ModuleType) -> SpaceSpec:
    return describe_space("fake", fake.site_weights(), k_max=32, tau=0.05)


@pytest.fixture(scope="session")
def signed() -> ModuleType:
    """The module with signed histories."""
    return load_beside("signed")


@pytest.fixture(scope="session")
def signer(signed: Any) -> Any:
    """The federation whose hub signs both histories."""
    return signed.make_signing()


@pytest.fixture(scope="session")
def ours(signed: Any, spec: SpaceSpec, fake: Any, signer: Any) -> list[Any]:
    """The history that is followed."""
    return list(signed.history(spec, fake, signer.key, list(range(1, signed.VERSIONS + 1))))


@pytest.fixture(scope="session")
def theirs(signed: Any, spec: SpaceSpec, fake: Any, signer: Any) -> list[Any]:
    """Another history under the same key: the hub after a restore, or one that shows two faces. It parts after 2."""
    return list(signed.history(spec, fake, signer.key, [1, 2, *range(103, 101 + signed.VERSIONS)]))


class Hub(LocalHub):
    """A real hub that also makes client directories."""

    def token(self, member: str, **changes: Any) -> str:
        """Return a join token for ``organisation/name``; ``changes`` forge its fields under the real key."""
        text = self.invite(member)
        if not changes:
            return text
        token = replace(token_decode(text), **changes)
        return token_encode(
            self.layout.enrol_key.read_bytes(),
            token.address,
            token.ca_sha256,
            token.identity,
            datetime.fromtimestamp(token.expires, UTC),
            token.nonce,
        )

    def client(self, root: Path, member: str) -> ClientLayout:
        """Enrol a new client directory."""
        layout = ClientLayout(root)
        enrol(self.token(member), layout, datetime.now(UTC))
        return layout


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory, spec: SpaceSpec) -> Iterator[Hub]:
    """A hub that all tests of this area share; every test uses an organisation of its own."""
    hub = Hub(tmp_path_factory.mktemp("hub"), spec)
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def own_hub_class() -> type[Hub]:
    """The class of the hubs of this area, for a test that configures one."""
    return Hub


@pytest.fixture
def own_hub(tmp_path: Path, spec: SpaceSpec) -> Iterator[Hub]:
    """A hub for one test, which may kill it."""
    hub = Hub(tmp_path / "server", spec)
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def connect() -> Iterator[Callable[[ClientLayout], HubLink]]:
    """Open links that are closed after the test."""
    links: list[HubLink] = []

    def open_link(layout: ClientLayout) -> HubLink:
        link = HubLink(load_member(layout).hub_address, load_credentials(layout, datetime.now(UTC)))
        links.append(link)
        return link

    yield open_link
    for link in links:
        link.close()


@pytest.fixture
def offline(tmp_path: Path) -> tuple[ClientLayout, bytes, bytes]:
    """An enrolled directory made without a server, and the authority that signed it: certificate and key."""
    now = datetime.now(UTC)
    authority, authority_key = make_authority("test", now)
    layout = ClientLayout(tmp_path / "client")
    make_private_directory(layout.identity)
    key = new_private_key_pem()
    certificate = sign_csr(authority, authority_key, make_csr(key), Identity("trainer", "org", "one"), now, 1)
    private, public = make_node_key()
    for path, data in (
        (layout.key, key),
        (layout.certificate, certificate),
        (layout.authority, authority),
        (layout.node_key, private),
        (layout.node_public_key, public),
    ):
        write_atomic(path, data)
    return layout, authority, authority_key


@pytest.fixture
def serving(offline: tuple[ClientLayout, bytes, bytes]) -> Iterator[Callable[..., HubLink]]:
    """Serve objects of a test as the Hub service on real listeners with mutual TLS; return a link to each.

    Calls that an object does not have are answered with UNIMPLEMENTED.
    """
    layout, authority, authority_key = offline
    now = datetime.now(UTC)
    key = new_private_key_pem()
    identity = Identity("hub", "org", "hub")
    certificate = sign_csr(authority, authority_key, make_csr(key), identity, now, 1, server_names=["127.0.0.1"])
    credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
    open_ones: list[tuple[grpc.Server, HubLink]] = []

    def serve(servicer: Any) -> HubLink:
        servicer.__class__ = type("Served", (servicer.__class__, hub_pb2_grpc.HubServicer), {})
        server = grpc.server(ThreadPoolExecutor(8))
        hub_pb2_grpc.add_HubServicer_to_server(servicer, server)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        link = HubLink(f"127.0.0.1:{port}", load_credentials(layout, now))
        open_ones.append((server, link))
        return link

    yield serve
    for server, link in open_ones:
        link.close()
        server.stop(None).wait()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[FedshareError | None]:
    """What every wait was for; none of them takes any time."""
    reasons: list[FedshareError | None] = []

    def record(backoff: Backoff, reason: FedshareError | None = None) -> float:
        reasons.append(reason)
        return 0.0

    monkeypatch.setattr(Backoff, "next_wait", record)
    return reasons


@pytest.fixture
def later() -> datetime:
    """A moment when every certificate of a test has expired."""
    return datetime.now(UTC) + timedelta(days=3650)


@pytest.fixture
def run_script(run_program: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., dict[str, Any]]:
    """Run a script that lies beside this file; return the JSON object it prints as its last line.

    ``small`` is for a script that imports little and forks often: forks of a process that has everything are slow.
    """

    def run(name: str, *arguments: str, small: bool = False) -> dict[str, Any]:
        script = str(HERE / name)
        if small:
            path = os.pathsep.join(p for p in sys.path if p)
            command = [sys.executable, script, *arguments]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
                env={**os.environ, "PYTHONPATH": path},
            )
        else:
            done = run_program(f"import runpy\nrunpy.run_path({script!r}, run_name='__main__')\n", *arguments)
        assert done.returncode == 0, done.stderr + done.stdout
        answer = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(answer, dict)
        return answer

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
