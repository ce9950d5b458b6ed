"""Relays as real processes: they pass on what the hub has signed, to those whom the hub admits, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from share_core import identity as ids
from share_core.fingerprint import describe_space
from share_core.types import Factors, SiteUpdate, SpaceSpec, Update
from share_core.wire import decode_snapshot, encode_update
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.cli import app
from share_server.local import Holder, LocalHub, submit_header, submit_messages
from share_server.operator import CHANNEL_OPTIONS
from share_server.provision import free_ports, invite_member

TELL = "import sys; from share_server.cli import main; sys.argv[0] = 'share-server'; main()"

BELIEVES_EVERYTHING = (
    "from share_core.identity import manifest\n"
    "manifest.ManifestVerifier.read = lambda self, signed: manifest.parse_manifest(signed.body)\n" + TELL
)
FORGETS_THE_AGE = (
    "from share_server.relay import service\n"
    "service.RelayGate.recheck = lambda self, caller: super(service.RelayGate, self).recheck(caller)\n" + TELL
)
ASKS_ONCE = (
    "import asyncio\nfrom share_server.relay import upstream\n"
    "real = upstream.Upstream._ask_roster\n"
    "async def once(self, asked):\n"
    "    if not self.roster_members: await real(self, asked)\n"
    "    self._roster_at = asked\n"
    "upstream.Upstream._ask_roster = once\n" + TELL
)

OTHER_KEY = """
import sys
from share_core.identity import Identity, make_authority, make_signer
from share_server.hub import __main__, engine
from datetime import UTC, datetime, timedelta

now = datetime.now(UTC)
_, key = make_signer(*make_authority("other", now), Identity("signer", "server", "hub"), now, 30)
real = engine.Engine.open.__func__

async def forged(cls, root, spec, config, signing_key, *more, **named):
    return await real(cls, root, spec, config, key, *more, **named)

engine.Engine.open = classmethod(forged)
sys.exit(__main__.main(sys.argv[1:]))
"""


class Relay:
    """One relay directory and its process."""

    def __init__(self, root: Path, hub: LocalHub) -> None:
        self.root = root
        self.hub = hub
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self.log = root.with_suffix(".log")
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str, roster_s: float = 0.3, program: str = TELL) -> None:
        """Launch the command without waiting until it serves."""
        self.close()
        options = ["--dir", str(self.root), "--listen", self.address, "--roster-seconds", str(roster_s), "--json"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, "relay", *arguments, *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def serving(self) -> dict[str, object]:
        """Wait for the line that says that it serves."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        return dict(json.loads(line))

    def enrol(self, name: str = "acme/relay", **options: object) -> dict[str, object]:
        """Start with a fresh token and wait until it serves."""
        self.start(_token(self.hub, name), **options)  # type: ignore[arg-type]  # options of start
        return self.serving()

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        """End what still runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    @contextmanager
    def channel(self, holder: Holder) -> Iterator[grpc.Channel]:
        authority = self.hub.layout.ca_cert.read_bytes()
        credentials = grpc.ssl_channel_credentials(authority, holder.key, holder.certificate)
        with grpc.secure_channel(self.address, credentials, CHANNEL_OPTIONS) as channel:
            yield channel

    @contextmanager
    def stub(self, holder: Holder) -> Iterator[hub_pb2_grpc.HubStub]:
        with self.channel(holder) as channel:
            yield hub_pb2_grpc.HubStub(channel)


def _now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def new_relay(tmp_path: Path) -> Iterator[Callable[[LocalHub], Relay]]:
    made: list[Relay] = []

    def make(hub: LocalHub) -> Relay:
        made.append(Relay(tmp_path / f"relay{len(made)}", hub))
        return made[-1]

    yield make
    for relay in made:
        relay.close()


def _publish(hub: LocalHub, holder: Holder, payload: bytes, task: str = "acme/task") -> int:
    """Submit one update and return the version that holds it."""
    header = submit_header(hub.spec, task, payload)
    with hub.hub(holder) as stub:
        stub.Submit(submit_messages(header, payload), timeout=60)
        while True:
            record = stub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=header.update_id), timeout=30).update
            if record.state == hub_pb2.UPDATE_STATE_MERGED:
                return int(record.version)
            assert record.state == hub_pb2.UPDATE_STATE_ACCEPTED, record.reason


def _steps(stub: hub_pb2_grpc.HubStub, spec: SpaceSpec, upto: int, since: int = 0) -> list[tuple[bytes, bytes]]:
    """Return (manifest body, payload) of every step after ``since``, waiting for version ``upto``."""
    stream = stub.FollowVersions(hub_pb2.FollowVersionsRequest(space_id=spec.space_id, since_version=since), timeout=60)
    found: list[tuple[bytes, bytes]] = []
    header, payload = None, b""
    for message in stream:
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


def _wait_for(relay: Relay, holder: Holder, version: int) -> None:
    end = time.monotonic() + 60
    with relay.stub(holder) as stub:
        while True:
            try:
                if stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=10).version >= version:
                    return
            except grpc.RpcError:
                pass
            assert time.monotonic() < end, relay.log.read_text()[-3000:]
            time.sleep(0.05)


def _refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    assert isinstance(error, grpc.Call)
    return error.code(), error.details() or ""


def test_two_levels_pass_on_the_same_bytes_and_the_hub_sends_once(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Relay],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
) -> None:
    hub = new_hub()
    hub.start()
    alice = hub.enrol("acme/alice")
    _publish(hub, alice, make_payload(1))
    first, second = new_relay(hub), new_relay(hub)
    told = first.enrol("acme/first")
    assert (told["member"], told["upstream"]) == ("acme/first", hub.config.hub_address)
    token = _token(hub, "acme/second")
    second.start(token, "--follow", first.address)
    assert second.serving()["upstream"] == first.address
    newest = _publish(hub, alice, make_payload(2))
    with hub.hub(alice) as stub:
        original = _steps(stub, toy_spec, newest)
        described = stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=10)
    for relay in (first, second):
        for _ in range(3):
            with relay.stub(alice) as stub:
                assert _steps(stub, toy_spec, newest) == original
        with relay.stub(alice) as stub:
            assert stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=10) == described
            whole = list(stub.FetchSnapshot(hub_pb2.FetchSnapshotRequest(space_id=toy_spec.space_id), timeout=30))
            assert whole[0].header.version == newest
            assert whole[0].header.manifest.body
    with hub.hub(hub.own("operator")) as stub:
        end = time.monotonic() + 40
        while (status := stub.GetStatus(hub_pb2.GetStatusRequest(), timeout=10)).subscribers != 1:
            assert time.monotonic() < end, "a stream that was cancelled is still counted"
            time.sleep(0.05)  # our own stream is being closed
    sent = {row.member: row.down_deltas for row in status.traffic}
    assert sent["acme/first"] == sum(len(payload) for _, payload in original)
    assert sent.get("acme/second", 0) == 0
    assert [first.stop(), second.stop()] == [0, 0]


def _token(hub: LocalHub, name: str, hosts: tuple[str, ...] = ("127.0.0.1",)) -> str:
    organisation, _, own = name.partition("/")
    identity = ids.Identity("relay", organisation, own)
    return invite_member(hub.layout, hub.config, identity, 1.0, _now(), hosts)


def test_it_serves_versions_only_and_only_to_those_the_hub_admits(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Relay],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
) -> None:
    hub = new_hub()
    hub.start()
    relay = new_relay(hub)
    relay.enrol()
    early = hub.enrol("acme/alice")
    _wait_for(relay, early, 0)  # enrolled after the relay: known within one look at the roster
    payload = make_payload(1)
    with relay.stub(early) as stub:
        header = submit_header(toy_spec, "acme/task", payload)
        code, sentence = _refusal(lambda: stub.Submit(submit_messages(header, payload), timeout=20))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        assert "call Submit at the hub" in sentence
        assert hub.config.hub_address in sentence
        assert _refusal(lambda: stub.GetStatus(hub_pb2.GetStatusRequest(), timeout=20))[0] is (
            grpc.StatusCode.UNIMPLEMENTED
        )
        code, sentence = _refusal(lambda: stub.GetRoster(hub_pb2.GetRosterRequest(), timeout=20))
        assert code is grpc.StatusCode.PERMISSION_DENIED
    key = ids.new_private_key_pem()
    ghost = ids.sign_csr(
        hub.layout.ca_cert.read_bytes(),
        hub.layout.ca_key.read_bytes(),
        ids.make_csr(key),
        ids.Identity("trainer", "ghost", "ghost"),
        _now(),
        30,
    )
    with relay.stub(Holder(key, ghost)) as stub:
        code, sentence = _refusal(lambda: stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=20))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "not enrolled" in sentence
    assert _replaced_is_refused(hub, relay, early)


def _replaced_is_refused(hub: LocalHub, relay: Relay, old: Holder) -> bool:
    """Enrol alice again and return whether the relay turns her old key away soon."""
    hub.enrol("acme/alice")
    for _ in range(40):
        with relay.stub(old) as stub:
            try:
                stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=20)
            except grpc.RpcError as error:
                assert isinstance(error, grpc.Call)
                return error.code() is grpc.StatusCode.UNAUTHENTICATED
        time.sleep(0.1)
    return False


def test_a_relay_that_never_asks_again_is_noticed(
    new_hub: Callable[..., LocalHub], new_relay: Callable[[LocalHub], Relay]
) -> None:
    hub = new_hub()
    hub.start()
    alice = hub.enrol("acme/alice")
    relay = new_relay(hub)
    relay.enrol(program=ASKS_ONCE)
    assert not _replaced_is_refused(hub, relay, alice)


@pytest.mark.parametrize(
    ("program", "passes_on"), [(TELL, False), (BELIEVES_EVERYTHING, True)], ids=["real", "planted"]
)
def test_what_the_hub_has_not_signed_goes_no_further(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Relay],
    make_payload: Callable[..., bytes],
    tmp_path: Path,
    program: str,
    passes_on: bool,
) -> None:
    """The second case is a planted bug: a relay that does not look at signatures is seen to pass on a forgery."""
    script = tmp_path / "forger.py"
    script.write_text(OTHER_KEY)
    hub = new_hub(script=script)
    hub.start()
    alice = hub.enrol("acme/alice")
    _publish(hub, alice, make_payload(1))
    relay = new_relay(hub)
    relay.enrol(program=program)
    end = time.monotonic() + 30
    with relay.stub(alice) as stub:
        while True:
            version = stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=10).version
            if version or "signature is not the hub's" in relay.log.read_text():
                break
            assert time.monotonic() < end
            time.sleep(0.05)
    assert bool(version) is passes_on


def test_upstream_away_it_serves_what_it_has_and_comes_back(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Relay],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
) -> None:
    hub = new_hub()
    hub.start()
    alice = hub.enrol("acme/alice")
    for number in range(3):
        _publish(hub, alice, make_payload(number))
    relay = new_relay(hub)
    relay.enrol(roster_s=15)
    _wait_for(relay, alice, 3)
    hub.kill()
    with relay.stub(alice) as stub:
        before = _steps(stub, toy_spec, 3)
    hub.start()
    assert _publish(hub, alice, make_payload(9)) == 4
    with relay.stub(alice) as stub:
        after = _steps(stub, toy_spec, 4)
    assert after[:3] == before


@pytest.mark.parametrize(("program", "goes_on"), [(TELL, False), (FORGETS_THE_AGE, True)], ids=["real", "planted"])
def test_with_an_old_roster_nobody_is_served(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Relay],
    program: str,
    goes_on: bool,
) -> None:
    """The second case is a planted bug: a relay that ignores the age goes on for ever."""
    hub = new_hub()
    hub.start()
    alice = hub.enrol("acme/alice")
    relay = new_relay(hub)
    relay.enrol(program=program)
    _wait_for(relay, alice, 0)
    hub.kill()
    end = time.monotonic() + 15
    with relay.channel(alice) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while "not serving" not in relay.log.read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
        try:
            health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            served = True
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            served = False
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "has not heard from the hub" in (error.details() or "")
    assert served is goes_on


def test_it_starts_from_its_disk_and_drops_what_is_damaged(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Relay],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
) -> None:
    hub = new_hub()
    hub.start()
    alice = hub.enrol("acme/alice")
    for number in range(4):
        _publish(hub, alice, make_payload(number))
    relay = new_relay(hub)
    relay.enrol()
    _wait_for(relay, alice, 4)
    with relay.stub(alice) as stub:
        before = _steps(stub, toy_spec, 4)
    assert relay.stop() == 0
    relay.start()
    assert relay.serving()["version"] == 4
    assert relay.stop() == 0
    path = relay.root / "versions" / "3.step"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    relay.start()
    relay.serving()
    with relay.stub(alice) as stub:
        assert _steps(stub, toy_spec, 4) == before
    assert '"dropped from disk", "file": "3.step"' in relay.log.read_text()


def test_a_second_relay_on_one_directory_or_port_is_refused(
    new_hub: Callable[..., LocalHub], new_relay: Callable[[LocalHub], Relay]
) -> None:
    hub = new_hub()
    hub.start()
    relay = new_relay(hub)
    relay.enrol()
    again = CliRunner().invoke(app, ["relay", "--dir", str(relay.root)])
    assert again.exit_code == 1
    assert "another relay works on" in again.stderr
    other = new_relay(hub)
    other.address = relay.address
    other.start(_token(hub, "acme/other"))
    assert other.process is not None
    assert other.process.wait(60) == 1
    assert "is another server using the port?" in other.log.read_text()


@pytest.fixture(scope="module")
def wide_spec() -> SpaceSpec:
    """One site whose bases are a few megabytes: a chain of steps soon is larger than a whole version."""
    return describe_space("wide", {"w": torch.zeros(40_000, 8)}, k_max=8, rank_limit=8)


def _wide_payload(spec: SpaceSpec, seed: int) -> bytes:
    draw = torch.Generator().manual_seed(seed)
    site = spec.sites["w"]
    factors = Factors(torch.randn(site.d_out, 8, generator=draw), torch.randn(site.d_in, 8, generator=draw))
    return encode_update(Update(0, {"w": SiteUpdate(residual=factors)}))


def test_late_readers_begin_with_a_whole_version(
    tmp_path: Path, new_relay: Callable[[LocalHub], Relay], wide_spec: SpaceSpec
) -> None:
    hub = LocalHub(tmp_path / "wide", wide_spec)
    hub.start()
    try:
        alice = hub.enrol("acme/alice")
        newest = [_publish(hub, alice, _wide_payload(wide_spec, seed)) for seed in range(2)][-1]
        relay = new_relay(hub)
        relay.enrol()  # it is late itself: the hub sends it a whole version
        _wait_for(relay, alice, newest)
        last = [_publish(hub, alice, _wide_payload(wide_spec, seed)) for seed in range(2, 5)][-1]
        _wait_for(relay, alice, last)
        request = hub_pb2.FollowVersionsRequest(space_id=wide_spec.space_id)
        with relay.stub(alice) as stub:
            answers = list(stub.FollowVersions(request, timeout=60))
            assert [answer.WhichOneof("part") for answer in answers] == ["snapshot_required"]
            whole = list(stub.FetchSnapshot(hub_pb2.FetchSnapshotRequest(space_id=wide_spec.space_id), timeout=60))
            header, payload = whole[0].header, b"".join(message.chunk for message in whole[1:])
            assert hashlib.sha256(payload).hexdigest() == header.payload_sha256
            assert decode_snapshot(payload, wide_spec).version == header.version
            assert newest <= header.version <= last
            if header.version < last:
                assert len(_steps(stub, wide_spec, last, header.version)) == last - header.version
        assert hub.stop() == 0
    finally:
        if hub.running:
            hub.kill()


IMPATIENT = (
    "import dataclasses\nfrom share_server.relay import process\nreal = process._build\n"
    "process._build = lambda home, state, limits, pace: real(\n"
    "    home, state, dataclasses.replace(limits, write_timeout_s=1.0), pace)\n" + TELL
)


def test_a_reader_that_takes_nothing_is_cut(
    tmp_path: Path, new_relay: Callable[[LocalHub], Relay], wide_spec: SpaceSpec
) -> None:
    hub = LocalHub(tmp_path / "wide", wide_spec)
    hub.start()
    try:
        alice = hub.enrol("acme/alice")
        for seed in range(3):
            newest = _publish(hub, alice, _wide_payload(wide_spec, seed))
        relay = new_relay(hub)
        relay.enrol(program=IMPATIENT)
        _wait_for(relay, alice, newest)
        asyncio.run(_stall(relay, alice))
        with relay.stub(alice) as stub:  # the others go on
            whole = list(stub.FetchSnapshot(hub_pb2.FetchSnapshotRequest(space_id=wide_spec.space_id), timeout=60))
            assert sum(len(message.chunk) for message in whole) == whole[0].header.payload_size
    finally:
        hub.kill()


async def _stall(relay: Relay, holder: Holder) -> None:
    """Ask for a whole version, take one message, and nothing more until the relay ends it."""
    authority = relay.hub.layout.ca_cert.read_bytes()
    credentials = grpc.ssl_channel_credentials(authority, holder.key, holder.certificate)
    window = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with aio.secure_channel(relay.address, credentials, [*CHANNEL_OPTIONS, *window]) as channel:
        request = hub_pb2.FetchSnapshotRequest(space_id=relay.hub.spec.space_id)
        stream = hub_pb2_grpc.HubStub(channel).FetchSnapshot(request, timeout=120)
        first: Any = await stream.read()
        assert first.header.payload_size > 1_000_000
        end = time.monotonic() + 60
        while "nothing was read" not in relay.log.read_text():
            assert time.monotonic() < end, "the reader was never cut"
            await asyncio.sleep(0.05)
