"""One real SuperLink, gateway, SuperNode and ClientApp, in one story told in order: leases, kills, strangers, the end.

The member has one tiny task and does not linger, so each lease ends at once: the road is tested, not training. Its data
bear marks, and all that it sends is recorded before TLS: in the end nothing of the data is found anywhere but there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from share_core.identity import Identity
from share_core.lifeline import children
from share_core.spec_file import builtin_spec
from share_server.config import LeaseConfig, ServerConfig
from share_server.fleet.superlink import SERVER_DIRECTORY
from share_server.layout import Layout
from share_server.provision import create_server, free_ports, invite_member

pytestmark = [pytest.mark.federation]

BIN = Path(sys.executable).parent

MARKS = tuple(f"qzcanary{what}" for what in ("folder", "file", "comment", "variable"))
"""Names of the member's folder and file, a comment in its tasks file, and the value of a variable."""

RECORD_CALLS = """
import os
import grpc

def note(details, message):
    with open(os.path.join({wire!r}, f"calls-{{os.getpid()}}"), "ab") as file:
        file.write(str((details.method, details.metadata)).encode() + message.SerializeToString())
    return message

class Recorder(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor):
    def intercept_unary_unary(self, go_on, details, request):
        return go_on(details, note(details, request))

    intercept_unary_stream = intercept_unary_unary

    def intercept_stream_unary(self, go_on, details, requests):
        return go_on(details, (note(details, request) for request in requests))

honest = grpc.secure_channel
grpc.secure_channel = lambda *rest, **named: grpc.intercept_channel(honest(*rest, **named), Recorder())
"""

RECORD_FLEET = """
import os
from share_client.cli import main
from share_client.fleet import forwarder

honest = forwarder._copy

class Recorded:
    def __init__(self, reader):
        self.reader = reader

    async def read(self, most):
        piece = await self.reader.read(most)
        with open(os.path.join({wire!r}, "fleet"), "ab") as file:
            file.write(piece)
        return piece

forwarder._copy = lambda reader, *rest: honest(Recorded(reader), *rest)
main()
"""


@dataclass
class Federation:
    """A server directory and what runs on it."""

    layout: Layout
    config: ServerConfig
    folder: Path
    server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.server = subprocess.Popen(
            [BIN / "share-server", "run", self.layout.root], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        self.wait(self.layout.run_file.exists)

    def state(self) -> dict[str, Any]:
        return dict(json.loads(self.layout.run_file.read_text()))

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.layout.logs / "hub.log").read_text().splitlines()
        return [event for line in lines if line.startswith("{") and (event := json.loads(line))["event"] == name]

    def wait(self, condition: Callable[[], Any], seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            logs = {path.name: path.read_text(errors="replace")[-1500:] for path in self.folder.rglob("*.log")}
            assert time.monotonic() < end, json.dumps(logs, indent=1)
            assert self.server is None or self.server.poll() is None, json.dumps(logs, indent=1)
            time.sleep(0.1)

    def next_lease(self) -> None:
        """Wait until a lease that did not exist yet has been worked and closed by the ClientApp."""
        known = {event["lease_id"] for event in self.events("lease granted")}
        self.wait(lambda: {event["lease_id"] for event in self.events("lease closed")} - known)

    def processes(self) -> set[int]:
        """Return every living process that works on the server directory."""
        found = set()
        mark = os.fsencode(str(self.layout.root))
        variable = os.fsencode(f"{SERVER_DIRECTORY}={self.layout.root}")
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if mark in told.split(b"\0") or variable in told.split(b"\0") or mark + b"/fleet" in told:
                found.add(int(entry.name))
        return found


def below(pid: int) -> set[int]:
    """Return the living descendants of a process."""
    return {found for child in children(pid) for found in ({child} | below(child))}


def _pixels() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(5).random((20, 8, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    hub, enrol, gateway = free_ports(3)
    config = ServerConfig(
        hub_port=hub, enrol_port=enrol, gateway_port=gateway, lease=LeaseConfig(minutes=2.0, idle_retry_s=1.0)
    )
    made = Federation(Layout(folder / "server"), config, folder)
    create_server(made.layout, config, builtin_spec("digits-vit"), datetime.now(UTC))
    made.start()
    token = invite_member(made.layout, config, Identity("trainer", "acme", "ann"), 1.0, datetime.now(UTC))
    private, wire = folder / MARKS[0], folder / "wire"
    for made_now in (private, wire, wire / "python"):
        made_now.mkdir()
    np.savez(private / f"{MARKS[1]}.npz", x=_pixels(), y=np.arange(20) % 10)
    tasks = private / "tasks.toml"
    data = f'train = "{MARKS[1]}.npz"\ntest = "{MARKS[1]}.npz"\n'
    tasks.write_text(
        f'# {MARKS[2]}\nbackbone = "digits-vit"\n[[task]]\nname = "t"\nkind = "image-classification"\n{data}'
    )
    (wire / "python" / "sitecustomize.py").write_text(RECORD_CALLS.format(wire=str(wire)))
    (wire / "join.py").write_text(RECORD_FLEET.format(wire=str(wire)))
    path = os.pathsep.join([str(wire / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"FEDSHARE_LINGER_S": "0.2", "OMP_NUM_THREADS": "1", "FEDSHARE_NOTE": MARKS[3], "PYTHONPATH": path}
    with (folder / "client.log").open("wb") as log:
        client = subprocess.Popen(
            [sys.executable, wire / "join.py", "join", "-", "--tasks", tasks, "--dir", folder / "client"],
            env={**os.environ, **own},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    assert client.stdin is not None
    client.stdin.write(token.encode())
    client.stdin.close()
    try:
        yield made
    finally:
        client.terminate()
        if made.server is not None:
            made.server.terminate()
            made.server.wait(60)
        client.wait(60)


def test_a_lease_reaches_the_client_app(federation: Federation) -> None:
    federation.next_lease()
    assert federation.events("lease closed")[0]["member"] == "acme/ann"


def test_a_run_cannot_be_submitted_through_the_public_port(federation: Federation, tmp_path: Path) -> None:
    """The stranger holds the authority's certificate and even a shim, but no certificate of his own."""
    address = f"127.0.0.1:{federation.config.gateway_port}"
    (tmp_path / "config.toml").write_text(
        f'[superlink]\ndefault = "x"\n[superlink.x]\naddress = "{address}"\n'
        f'root-certificates = "{federation.layout.ca_cert}"\n'
    )
    shim = federation.layout.fleet / "shim"

    def submit(home: Path) -> dict[str, Any]:
        environment = {"PATH": f"{BIN}:/usr/bin:/bin", "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
        done = subprocess.run(
            [BIN / "flwr", "run", shim, "--format", "json"],
            env={**environment, "FLWR_DISABLE_UPDATE_CHECK": "1", "HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return dict(json.loads(done.stdout[done.stdout.find("{") : done.stdout.rfind("}") + 1] or "{}"))

    federation.wait(lambda: federation.state()["run_id"])
    before = federation.state()
    assert submit(tmp_path).get("success") is not True
    assert federation.state() == before
    # The same call at the SuperLink's own port is taken: it is the gateway that stands between.
    assert submit(federation.layout.fleet / "home").get("success") is True


def test_a_killed_superlink_comes_back_and_the_same_node_works_on(federation: Federation) -> None:
    federation.wait(lambda: federation.state()["run_id"])
    before = federation.state()
    left, of_the_hub = federation.processes(), below(before["processes"]["hub"])
    os.kill(before["processes"]["superlink"], signal.SIGKILL)
    federation.wait(lambda: federation.state()["run_id"] not in {None, before["run_id"]})
    federation.next_lease()
    assert federation.state()["processes"]["hub"] == before["processes"]["hub"]
    assert len(federation.events("node bound")) == 1
    workers = left - set(before["processes"].values()) - {before["pid"]} - of_the_hub
    assert workers
    assert not workers & federation.processes()


def test_a_killed_server_app_is_replaced(federation: Federation) -> None:
    federation.wait(lambda: federation.state()["run_id"])
    before = federation.state()
    words = (federation.layout.fleet / "serverapp.lock").read_text().split()
    assert words[0] == before["run_id"]
    os.kill(int(words[1]), signal.SIGKILL)
    federation.wait(lambda: federation.state()["run_id"] not in {None, before["run_id"]})
    known = len(federation.events("lease granted"))
    federation.wait(lambda: len(federation.events("lease granted")) > known)


def test_a_killed_supervisor_leaves_nothing_and_the_next_one_carries_on(federation: Federation) -> None:
    assert federation.server is not None
    assert len(federation.processes()) >= 5
    federation.server.kill()
    federation.server.wait()
    federation.server = None
    federation.wait(lambda: not federation.processes(), 30.0)
    federation.layout.run_file.unlink()
    federation.start()
    federation.next_lease()
    assert len(federation.events("node bound")) == 1


def test_a_stopped_server_leaves_nothing(federation: Federation) -> None:
    assert federation.server is not None
    federation.server.terminate()
    assert federation.server.wait(60) == 0
    federation.server = None
    assert not federation.processes()
    assert not federation.layout.run_file.exists()


def test_nothing_of_the_members_data_has_left(federation: Federation) -> None:
    sent = {path: path.read_bytes() for path in (federation.folder / "wire").iterdir() if path.is_file()}
    calls = b"".join(data for path, data in sent.items() if path.name.startswith("calls"))
    assert b"Hub/Submit" in calls and b"acme/t" in calls and b"Fleet/CloseLease" in calls  # it does see what leaves
    assert b"/v1/fleet/" in sent[federation.folder / "wire" / "fleet"]
    sent.pop(federation.folder / "wire" / "join.py")
    server = {path: path.read_bytes() for path in federation.layout.root.rglob("*") if path.is_file()}
    assert any(b"acme/t" in data for path, data in server.items() if "store" in path.parts)
    rows = [row.astype(kind).tobytes() for row in _pixels() for kind in (np.float16, np.float32, np.float64)]
    marks = [mark.encode(coding) for mark in MARKS for coding in ("utf-8", "utf-16-le")]
    logs = {path: path.read_bytes() for path in (federation.folder / "client" / "logs").rglob("*") if path.is_file()}
    logs[federation.folder / "client.log"] = (federation.folder / "client.log").read_bytes()
    for where, data in {**sent, **server}.items():
        assert not [mark for mark in [*marks, *rows] if mark in data], where
    for where, data in logs.items():
        assert not [row for row in rows if row in data], where
