"""A relay's door is the hub's: every kind of certificate against every method, revocation, and renewal of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from share_core import identity as ids
from share_core.durable import write_atomic
from share_core.errors import CertificateError
from share_proto.v1 import fleet_pb2, hub_pb2
from share_server.local import LocalHub
from share_server.operations.revoke import revoke
from share_server.operator import CHANNEL_OPTIONS
from share_server.relay.home import RelayHome, load_state
from share_server.relay.renewal import renew_relay

NOW = datetime.now(UTC)
HUB = hub_pb2.DESCRIPTOR.services_by_name["Hub"]
FLEET = fleet_pb2.DESCRIPTOR.services_by_name["Fleet"]
ASKS_NOBODY = "from share_server.hub import access\naccess.Roster.check = lambda self, identity, key_sha256: None\n"
LOOKS_OFTEN = (
    "from share_server.relay import process, upstream\n"
    "process.RECHECK_S = 0.2\nprocess.RENEWAL_LOOK_S = 0.2\nupstream._LOOK_S = 0.1\n"
)


def _codes(address: str, authority: bytes, pair: Any) -> dict[str, grpc.StatusCode | None]:
    """Return how each method answers; None if it served."""
    shown = (pair.key, pair.certificate) if pair is not None else ()
    found: dict[str, grpc.StatusCode | None] = {}
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, *shown), CHANNEL_OPTIONS) as channel:
        wire: Any = channel
        for method in (*HUB.methods, *FLEET.methods):
            path = f"/{method.containing_service.full_name}/{method.name}"
            try:
                if method.server_streaming:
                    stream = wire.unary_stream(path)(b"", timeout=20)
                    next(stream, None)
                    stream.cancel()
                elif method.client_streaming:
                    wire.stream_unary(path)(iter([]), timeout=20)
                else:
                    wire.unary_unary(path)(b"", timeout=20)
                found[method.name] = None
            except grpc.RpcError as error:
                assert isinstance(error, grpc.Call)
                found[method.name] = error.code()
    return found


def _admitted(
    hub: LocalHub, relay: Any, kinds: dict[str, Any], certificates: Any
) -> dict[str, set[grpc.StatusCode | None]]:
    """Return what strangers got beside refusals, by kind."""
    closed = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}
    authority, found = hub.layout.ca_cert.read_bytes(), {}
    for name, pair in kinds.items():
        if name in certificates.NOT_SHOWN_BY_GRPC:
            continue
        codes = _codes(relay.address, authority, pair)
        # The Fleet service is none of a relay's: nobody gets an answer there, whoever asks.
        got = {codes[method.name] for method in HUB.methods} - closed
        if got:
            found[name] = got
        if name not in certificates.REFUSED_BY_TLS:
            assert {codes[method.name] for method in FLEET.methods} == {grpc.StatusCode.UNIMPLEMENTED}
    return found


@pytest.mark.parametrize("planted", ["", ASKS_NOBODY], ids=["real", "planted"])
def test_every_stranger_is_refused_by_every_method(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Any],
    stranger_kinds: Callable[[LocalHub], dict[str, Any]],
    certificates: Any,
    planted: str,
) -> None:
    """The second case is a planted bug: a relay that does not ask the roster is seen to serve those who are not in it.

    Also: whoever is shut out while a stream of the relay is open is cut off.
    """
    hub = new_hub()
    hub.start()
    kinds = stranger_kinds(hub)
    good = kinds.pop("good")
    relay = new_relay(hub)
    relay.enrol(planted=LOOKS_OFTEN + planted, roster_s=0.3)
    relay.wait_for(good, 0)
    found = _admitted(hub, relay, kinds, certificates)
    if planted:
        assert {"replaced", "revoked", "never enrolled"} <= set(found)
        return
    assert found == {}
    assert len(kinds) >= 28
    codes = _codes(relay.address, hub.layout.ca_cert.read_bytes(), good)
    assert codes["DescribeSpace"] is None
    assert codes["Renew"] is grpc.StatusCode.UNIMPLEMENTED, "only the hub can sign"
    assert codes["Revoke"] is grpc.StatusCode.PERMISSION_DENIED
    with relay.stub(good) as stub:
        stream = stub.FollowVersions(hub_pb2.FollowVersionsRequest(space_id=hub.spec.space_id), timeout=60)
        revoke(hub.layout, "acme/alice")
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def _aged(hub: LocalHub, home: RelayHome, days: float, hosts: tuple[str, ...] = ()) -> bytes:
    """Return a certificate of the relay that was issued ``days`` ago."""
    layout, identity = hub.layout, ids.Identity("relay", "acme", "relay")
    csr, issued = ids.make_csr(home.key.read_bytes()), datetime.now(UTC) - timedelta(days=days)
    return ids.sign_csr(layout.ca_cert.read_bytes(), layout.ca_key.read_bytes(), csr, identity, issued, 7, hosts)


def _waited(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_a_relay_renews_both_certificates_and_goes_on(
    new_hub: Callable[..., LocalHub],
    new_relay: Callable[[LocalHub], Any],
    publish: Callable[..., int],
    make_payload: Callable[..., bytes],
) -> None:
    hub = new_hub()
    hub.start()
    alice = hub.enrol("acme/alice")
    relay = new_relay(hub)
    relay.enrol(planted=LOOKS_OFTEN)
    relay.wait_for(alice, 0)
    home = RelayHome(relay.root)
    issued = home.caller.read_bytes()
    write_atomic(home.caller, _aged(hub, home, 5))
    write_atomic(home.serving, _aged(hub, home, 5, ("127.0.0.1",)))
    assert _waited(lambda: home.caller.read_bytes() == issued)  # the hub's newest one; not due in its own eyes
    assert _waited(lambda: NOW + timedelta(days=6) < ids.not_after(home.serving.read_bytes()))
    relay.wait_until_it_says("certificates renewed")
    version = publish(hub, alice, make_payload(1))
    relay.wait_for(alice, version)
    assert relay.stop() == 0


def test_a_relay_keeps_nothing_that_is_not_its_own(
    new_hub: Callable[..., LocalHub], relay_token: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from share_server.relay import renewal
    from share_server.relay.enrol import enrol_relay

    hub = new_hub()
    hub.start()
    home = RelayHome(tmp_path / "relay")
    home.root.mkdir()
    enrol_relay(relay_token(hub, "acme/relay"), home, "127.0.0.1:1")
    state = load_state(home)
    assert renew_relay(home, state, datetime.now(UTC)) == []
    later = datetime.now(UTC) + timedelta(days=4)
    files = home.caller.read_bytes(), home.serving.read_bytes()
    for answer, sentence in (
        (hub_pb2.RenewResponse(certificate_pem=hub.enrol("acme/alice").certificate), "another name"),
        (hub_pb2.RenewResponse(certificate_pem=hub.enrol("acme/relay", "relay").certificate), "another key"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(renewal, "ask", lambda method, request, address, answer=answer: answer)
            with pytest.raises(CertificateError, match=sentence):
                renew_relay(home, state, later)
        assert (home.caller.read_bytes(), home.serving.read_bytes()) == files
