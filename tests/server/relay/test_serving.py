"""What relays pass on and to whom: what the hub has signed, to those whom the hub admits, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from share_core import identity as ids
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.local import Holder, LocalHub, submit_header, submit_messages

FORGING_HUB = Path(__file__).parents[2] / "forging_hub.py"

BELIEVES_EVERYTHING = (
    "from share_core.identity import manifest\n"
    "manifest.ManifestVerifier.read = lambda self, signed: manifest.parse_manifest(signed.body)\n"
)
FORGETS_THE_AGE = (
    "from share_server.relay import service\n"
    "service.RelayGate.recheck = lambda self, caller: super(service.RelayGate, self).recheck(caller)\n"
)
ASKS_ONCE = (
    "import asyncio\nfrom share_server.relay import upstream\n"
    "real = upstream.Upstream._ask_roster\n"
    "async def once(self, asked):\n"
    "    if not self.roster_members: await real(self, asked)\n"
    "    self._roster_at = asked\n"
    "upstream.Upstream._ask_roster = once\n"
)


def _refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    assert isinstance(error, grpc.Call)
    return error.code(), error.details() or ""


def test_two_levels_pass_on_the_same_bytes_and_the_hub_sends_once(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Any],
    relay_token: Callable[..., str],
    publish: Callable[..., int],
    read_steps: Callable[..., list[tuple[bytes, bytes]]],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
) -> None:
    hub = new_hub()
    hub.start()
    alice = hub.enrol("acme/alice")
    publish(hub, alice, make_payload(1))
    first, second = new_relay(hub), new_relay(hub)
    told = first.enrol("acme/first")
    assert (told["member"], told["upstream"]) == ("acme/first", hub.config.hub_address)
    second.start(relay_token(hub, "acme/second"), "--follow", first.address)
    assert second.serving()["upstream"] == first.address
    newest = publish(hub, alice, make_payload(2))
    with hub.hub(alice) as stub:
        original = read_steps(stub, toy_spec, newest)
        described = stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=10)
    for relay in (first, second):
        for _ in range(3):
            with relay.stub(alice) as stub:
                assert read_steps(stub, toy_spec, newest) == original
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


def test_it_serves_versions_only_and_only_to_those_the_hub_admits(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Any],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
) -> None:
    hub = new_hub()
    hub.start()
    relay = new_relay(hub)
    relay.enrol(roster_s=0.3)
    early = hub.enrol("acme/alice")
    relay.wait_for(early, 0)  # enrolled after the relay: known within one look at the roster
    payload = make_payload(1)
    with relay.stub(early) as stub:
        header = submit_header(toy_spec, "acme/task", payload)
        code, sentence = _refusal(lambda: stub.Submit(submit_messages(header, payload), timeout=20))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        assert "call Submit at the hub" in sentence
        assert hub.config.hub_address in sentence
        code, _ = _refusal(lambda: stub.GetStatus(hub_pb2.GetStatusRequest(), timeout=20))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        code, _ = _refusal(lambda: stub.GetRoster(hub_pb2.GetRosterRequest(), timeout=20))
        assert code is grpc.StatusCode.PERMISSION_DENIED
    key = ids.new_private_key_pem()
    ghost = ids.sign_csr(
        hub.layout.ca_cert.read_bytes(),
        hub.layout.ca_key.read_bytes(),
        ids.make_csr(key),
        ids.Identity("trainer", "ghost", "ghost"),
        datetime.now(UTC),
        30,
    )
    with relay.stub(Holder(key, ghost)) as stub:
        code, sentence = _refusal(lambda: stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=20))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "not enrolled" in sentence
    assert _replaced_is_refused(hub, relay, early)


def _replaced_is_refused(hub: LocalHub, relay: Any, old: Holder) -> bool:
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


def test_a_relay_that_never_asks_again_is_noticed(new_stand: Callable[..., Any]) -> None:
    stand = new_stand(roster_s=0.3, planted=ASKS_ONCE)
    assert not _replaced_is_refused(stand.hub, stand.relay, stand.alice)
    stand.relay.wait_for(stand.alice, 0)  # not because it serves nobody


@pytest.mark.parametrize(("planted", "passes_on"), [("", False), (BELIEVES_EVERYTHING, True)], ids=["real", "planted"])
def test_what_the_hub_has_not_signed_goes_no_further(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Any],
    publish: Callable[..., int],
    make_payload: Callable[..., bytes],
    planted: str,
    passes_on: bool,
) -> None:
    """The second case is a planted bug: a relay that does not look at signatures is seen to pass on a forgery."""
    hub = new_hub(script=FORGING_HUB)
    hub.start()
    alice = hub.enrol("acme/alice")
    publish(hub, alice, make_payload(1))
    relay = new_relay(hub)
    relay.enrol(planted=planted)
    end = time.monotonic() + 30
    with relay.stub(alice) as stub:
        while True:
            version = stub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=10).version
            if version or "signature is not the hub's" in relay.said():
                break
            assert time.monotonic() < end
            time.sleep(0.05)
    assert bool(version) is passes_on


@pytest.mark.parametrize(("planted", "goes_on"), [("", False), (FORGETS_THE_AGE, True)], ids=["real", "planted"])
def test_with_an_old_roster_nobody_is_served(new_stand: Callable[..., Any], planted: str, goes_on: bool) -> None:
    """The second case is a planted bug: a relay that ignores the age goes on for ever."""
    stand = new_stand(roster_s=0.3, planted=planted)
    stand.hub.kill()
    stand.relay.wait_until_it_says('"not serving"', timeout_s=15.0)
    with stand.relay.channel(stand.alice) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            served = True
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            served = False
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "has not heard from the hub" in (error.details() or "")
    assert served is goes_on
