"""Relays as real processes, the hubs they follow, and those who ask them."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path

import grpc
import pytest

from share_core.identity import Identity
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.local import Holder, LocalHub, submit_header, submit_messages
from share_server.operator import CHANNEL_OPTIONS
from share_server.provision import free_ports, invite_member

COMMAND = """
import os, sys
for number, path in ((1, {output!r}), (2, {log!r})):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, number)
    os.close(file)
{planted}
from share_server.cli import main
sys.argv = {words!r}
main()
"""

# As with LocalHub: forked from a server that has imported everything, because importing takes longer than the rest.
WARM = multiprocessing.get_context("forkserver")


def token_for(hub: LocalHub, name: str, hosts: tuple[str, ...] = ("127.0.0.1",)) -> str:
    """Return a join token of a relay ``organisation/name``."""
    organisation, _, own = name.partition("/")
    return invite_member(hub.layout, hub.config, Identity("relay", organisation, own), 1.0, datetime.now(UTC), hosts)


class Relay:
    """One relay directory and its process."""

    def __init__(self, root: Path, hub: LocalHub) -> None:
        self.root = root
        self.hub = hub
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self.log = root.with_suffix(".log")
        self.output = root.with_suffix(".out")
        self.process: BaseProcess | None = None

    def start(self, *arguments: str, roster_s: float = 1.0, planted: str = "") -> None:
        """Launch the command without waiting until it serves.

        Args:
            arguments: of the command, before its options.
            roster_s: how often it asks whom it may serve; it serves nobody once its knowledge is four times as old.
            planted: Python that breaks the program before it runs.
        """
        self.close()
        self.output.unlink(missing_ok=True)
        options = ["--dir", str(self.root), "--listen", self.address, "--roster-seconds", str(roster_s), "--json"]
        words = ["share-server", "relay", *arguments, *options]
        script = self.root.with_suffix(".py")
        script.write_text(COMMAND.format(output=str(self.output), log=str(self.log), planted=planted, words=words))
        self.process = WARM.Process(
            target=runpy.run_path, args=(str(script),), kwargs={"run_name": "__main__"}, daemon=True
        )
        self.process.start()

    def serving(self) -> dict[str, object]:
        """Wait for the line that says that it serves, and return it."""
        assert self.process is not None
        end = time.monotonic() + 60
        while not (self.output.exists() and self.output.read_text().endswith("\n")):
            assert self.process.is_alive(), self.said()[-3000:]
            assert time.monotonic() < end, self.said()[-3000:]
            time.sleep(0.02)
        return dict(json.loads(self.output.read_text()))

    def enrol(self, name: str = "acme/relay", *, roster_s: float = 1.0, planted: str = "") -> dict[str, object]:
        """Start with a fresh token and wait until it serves."""
        self.start(token_for(self.hub, name), roster_s=roster_s, planted=planted)
        return self.serving()

    def stop(self) -> int:
        """Ask it to stop and return its exit code."""
        assert self.process is not None
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait until it has ended by itself and return its exit code."""
        assert self.process is not None
        self.process.join(60)
        assert self.process.exitcode is not None, "it still runs"
        return self.process.exitcode

    def close(self) -> None:
        """End what still runs."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def said(self) -> str:
        """Return its log, over all its lives."""
        return self.log.read_text() if self.log.exists() else ""

    def wait_until_it_says(self, words: str, timeout_s: float = 60.0) -> None:
        """Wait for ``words`` in its log."""
        end = time.monotonic() + timeout_s
        while words not in self.said():
            assert time.monotonic() < end, self.said()[-3000:]
            time.sleep(0.05)

    def wait_for(self, holder: Holder, version: int) -> None:
        """Wait until it serves ``holder`` and has ``version``."""
        end = time.monotonic() + 60
        with self.stub(holder) as stub:
            while True:
                try:
                    if stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=10).version >= version:
                        return
                except grpc.RpcError:
                    pass
                assert time.monotonic() < end, self.said()[-3000:]
                time.sleep(0.05)

    @contextmanager
    def channel(self, holder: Holder) -> Iterator[grpc.Channel]:
        """Open a channel to it as ``holder``."""
        authority = self.hub.layout.ca_cert.read_bytes()
        credentials = grpc.ssl_channel_credentials(authority, holder.key, holder.certificate)
        with grpc.secure_channel(self.address, credentials, CHANNEL_OPTIONS) as channel:
            yield channel

    @contextmanager
    def stub(self, holder: Holder) -> Iterator[hub_pb2_grpc.HubStub]:
        """Open its Hub service as ``holder``."""
        with self.channel(holder) as channel:
            yield hub_pb2_grpc.HubStub(channel)


@dataclass(frozen=True)
class Stand:
    """A hub, one of its members, and a relay that serves this member."""

    hub: LocalHub
    alice: Holder
    relay: Relay
    version: int
    """The newest version when the relay was started; it has it."""


@pytest.fixture
def new_relay(tmp_path: Path) -> Iterator[Callable[[LocalHub], Relay]]:
    """Return a function that makes a relay directory; whatever still runs at the end is killed."""
    made: list[Relay] = []

    def make(hub: LocalHub) -> Relay:
        made.append(Relay(tmp_path / f"relay{len(made)}", hub))
        return made[-1]

    yield make
    for relay in made:
        relay.close()


@pytest.fixture(scope="session")
def relay_token() -> Callable[..., str]:
    """Return a function (hub, "organisation/name", hosts) -> join token of a relay."""
    return token_for


@pytest.fixture(scope="session")
def publish() -> Callable[[LocalHub, Holder, bytes], int]:
    """Return a function that submits one update and returns the version that holds it."""

    def run(hub: LocalHub, holder: Holder, payload: bytes) -> int:
        header = submit_header(hub.spec, "acme/task", payload)
        with hub.hub(holder) as stub:
            stub.Submit(submit_messages(header, payload), timeout=60)
            while True:
                record = stub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=header.update_id), timeout=30).update
                if record.state == hub_pb2.UPDATE_STATE_MERGED:
                    return int(record.version)
                assert record.state == hub_pb2.UPDATE_STATE_ACCEPTED, record.reason
                time.sleep(0.01)

    return run


@pytest.fixture
def new_stand(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Relay],
    publish: Callable[[LocalHub, Holder, bytes], int],
) -> Callable[..., Stand]:
    """Return a function (payloads, spec=None, options of the relay) -> a stand with a version of every payload."""

    def make(payloads: Sequence[bytes] = (), spec: SpaceSpec | None = None, **options: str | float) -> Stand:
        hub = new_hub(spec=spec)
        hub.start()
        alice = hub.enrol("acme/alice")
        version = 0
        for payload in payloads:
            version = publish(hub, alice, payload)
        relay = new_relay(hub)
        relay.enrol(**options)  # type: ignore[arg-type]
        relay.wait_for(alice, version)
        return Stand(hub, alice, relay, version)

    return make


Steps = list[tuple[bytes, bytes]]


@pytest.fixture(scope="session")
def read_steps() -> Callable[..., Steps]:
    """Return a function (stub, spec, upto, since=0) -> (manifest body, payload) of every step after ``since``."""

    def read(stub: hub_pb2_grpc.HubStub, spec: SpaceSpec, upto: int, since: int = 0) -> Steps:
        request = hub_pb2.FollowVersionsRequest(space_id=spec.space_id, since_version=since)
        stream = stub.FollowVersions(request, timeout=60)
        found: Steps = []
        header, payload = None, b""
        for message in stream:
            if message.WhichOneof("part") == "heartbeat":
                continue
            if message.WhichOneof("part") == "delta":
                header, payload = message.delta, message.delta.data
            else:
                payload += message.chunk
            assert header is not None
            if len(payload) == header.payload_size:
                found.append((header.manifest.body, payload))
                if header.version == upto:
                    stream.cancel()
                    return found
        raise AssertionError("the stream ended")

    return read
