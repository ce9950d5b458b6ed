"""A real hub in a process of its own, enrolled clients, and a trainer that takes milliseconds."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from share_client.enrol import enrol
from share_client.link import HubLink
from share_client.member import ClientLayout, load_credentials, load_member
from share_core.fingerprint import describe_space
from share_core.identity import Identity, token_decode, token_encode
from share_core.types import SpaceSpec
from share_server.config import ServerConfig
from share_server.layout import Layout
from share_server.provision import create_server, free_ports, invite_member

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


@pytest.fixture(scope="session")
def spec(fake: ModuleType) -> SpaceSpec:
    return describe_space("fake", fake.site_weights(), k_max=32, tau=0.05)


class Hub:
    """One server directory and its hub process."""

    def __init__(self, root: Path, spec: SpaceSpec) -> None:
        ports = free_ports(3)
        self.config = ServerConfig(hub_port=ports[0], enrol_port=ports[1], gateway_port=ports[2])
        self.layout = Layout(root)
        create_server(self.layout, self.config, spec, datetime.now(UTC))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.layout.root / "hub.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "share_server.hub", str(self.layout.root)], stdout=log, stderr=log
            )
        for port in (self.config.hub_port, self.config.enrol_port):
            self._wait_for(port)

    def kill(self) -> None:
        """End the hub as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)

    def token(self, member: str, **changes: Any) -> str:
        """Return a join token for ``organisation/name``; ``changes`` forge its fields under the real key."""
        organisation, _, name = member.partition("/")
        text = invite_member(self.layout, self.config, Identity("trainer", organisation, name), 1.0, datetime.now(UTC))
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

    def _wait_for(self, port: int) -> None:
        assert self.process is not None
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.layout.root / "hub.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise AssertionError(f"the hub does not listen on {port}")


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory, spec: SpaceSpec) -> Iterator[Hub]:
    """A hub that all tests of this area share; every test uses an organisation of its own."""
    hub = Hub(tmp_path_factory.mktemp("hub"), spec)
    hub.start()
    yield hub
    hub.stop()


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
def later() -> datetime:
    """A moment when every certificate of a test has expired."""
    return datetime.now(UTC) + timedelta(days=3650)


@pytest.fixture
def run_script() -> Callable[..., dict[str, Any]]:
    """Run a script that lies beside this file; return the JSON object it prints as its last line."""

    def run(name: str, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, str(HERE / name), *arguments],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert done.returncode == 0, done.stderr + done.stdout
        answer = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(answer, dict)
        return answer

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
