"""A stranger gets nowhere, and nobody gets further than their role: every certificate kind against every RPC."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2

from share_core import identity as ids
from share_core.errors import AccessError, CertificateError, FedshareError, IdentityError
from share_proto.v1 import enrolment_pb2, fleet_pb2, hub_pb2
from share_server.hub.access import RULES, Gate, Roster
from share_server.local import Holder, LocalHub
from share_server.operator import CHANNEL_OPTIONS, named_error
from share_server.store.members import key_digest
from share_server.store.records import MemberRow

FILES = (hub_pb2.DESCRIPTOR, fleet_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
}
NOW = datetime.now(UTC)


def _without_rule(rules: Iterable[str]) -> set[str]:
    return set(METHODS) - set(rules)


def _call(channel: grpc.Channel, path: str) -> grpc.RpcError | None:
    """Call a method with an empty request; return its error, or None if it answered."""
    method = METHODS[path]
    wire: Any = channel  # without codecs requests and answers are plain bytes
    try:
        if method.client_streaming:
            wire.stream_unary(path)(iter([]), timeout=20)
        elif method.server_streaming:
            stream = wire.unary_stream(path)(b"", timeout=20)
            next(stream, None)
            stream.cancel()
        else:
            wire.unary_unary(path)(b"", timeout=20)
    except grpc.RpcError as error:
        return error
    return None


def test_every_method_has_a_rule_and_every_rule_a_method() -> None:
    assert len(METHODS) == 21
    assert not _without_rule(RULES)
    assert set(RULES) == set(METHODS)


def test_a_method_without_a_rule_would_be_noticed() -> None:
    assert _without_rule(set(RULES) - {"/share_proto.v1.Hub/Submit"}) == {"/share_proto.v1.Hub/Submit"}


@pytest.fixture(scope="module")
def strangers(shared_hub: LocalHub) -> dict[str, grpc.ChannelCredentials | None]:
    authority = shared_hub.layout.ca_cert.read_bytes()
    authority_key = shared_hub.layout.ca_key.read_bytes()
    alice = ids.Identity("trainer", "acme", "alice")
    key = ids.new_private_key_pem()
    csr = ids.make_csr(key)
    other_ca, other_key = ids.make_authority("fedshare authority", NOW)
    foreign = ids.sign_csr(other_ca, other_key, csr, alice, NOW, 30)
    long_ago = NOW - timedelta(days=60)
    expired = ids.sign_csr(authority, authority_key, csr, alice, long_ago, 30)
    never_enrolled = ids.sign_csr(authority, authority_key, csr, ids.Identity("trainer", "ghost", "ghost"), NOW, 30)
    replaced = ids.sign_csr(authority, authority_key, csr, alice, NOW, 30)
    shared_hub.enrol("acme/alice")
    own_server = shared_hub.own("server")
    self_signed, self_key = ids.make_authority("operator", NOW)

    def shows(certificate: bytes, with_key: bytes = key) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(authority, with_key, certificate)

    return {
        "plaintext": None,
        "no certificate": grpc.ssl_channel_credentials(authority),
        "self-signed": shows(self_signed, self_key),
        "other authority": shows(foreign),
        "expired": shows(expired),
        "never enrolled": shows(never_enrolled),
        "other key": shows(replaced),
        "the listener's own": shows(own_server.certificate, own_server.key),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "plaintext",
        "no certificate",
        "self-signed",
        "other authority",
        "expired",
        "never enrolled",
        "other key",
        "the listener's own",
    ],
)
def test_a_stranger_is_refused_by_every_method(
    shared_hub: LocalHub, strangers: dict[str, grpc.ChannelCredentials | None], kind: str
) -> None:
    credentials = strangers[kind]
    address = shared_hub.config.local_hub_address
    channel = (
        grpc.insecure_channel(address, CHANNEL_OPTIONS)
        if credentials is None
        else grpc.secure_channel(address, credentials, CHANNEL_OPTIONS)
    )
    expected = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED}
    with channel:
        for path in METHODS:
            error = _call(channel, path)
            assert isinstance(error, grpc.Call), f"{kind} was served by {path}"
            assert error.code() in expected, path
    assert shared_hub.running


@pytest.fixture(scope="module")
def holders(shared_hub: LocalHub) -> dict[str, Holder]:
    return {
        "trainer": shared_hub.enrol("roles/trainer", "trainer"),
        "contributor": shared_hub.enrol("roles/contributor", "contributor"),
        "reader": shared_hub.enrol("roles/reader", "reader"),
        "operator": shared_hub.own("operator"),
        "fleet": shared_hub.own("fleet"),
    }


@pytest.mark.parametrize("role", ["trainer", "contributor", "reader", "operator", "fleet"])
def test_a_role_reaches_exactly_its_methods(shared_hub: LocalHub, holders: dict[str, Holder], role: str) -> None:
    refused: set[str] = set()
    served: set[str] = set()
    with shared_hub.channel(holders[role]) as channel:
        for path in METHODS:
            error = _call(channel, path)
            named = named_error(error, "hub") if error is not None else None
            (refused if isinstance(named, AccessError | IdentityError) else served).add(path)
    assert served == {path for path, roles in RULES.items() if role in roles}
    assert refused


def test_the_enrolment_listener_offers_nothing_else(shared_hub: LocalHub, holders: dict[str, Holder]) -> None:
    roots = grpc.ssl_channel_credentials(shared_hub.layout.ca_cert.read_bytes())
    with grpc.secure_channel(shared_hub.config.enrol_address, roots, CHANNEL_OPTIONS) as channel:
        for path in METHODS:
            error = _call(channel, path)
            assert isinstance(error, grpc.Call), path
            assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    services = enrolment_pb2.DESCRIPTOR.services_by_name
    assert [method.name for method in services["Enrolment"].methods] == ["GetAuthority", "Enrol"]


AUTHORITY, AUTHORITY_KEY = ids.make_authority("gate", NOW)


def _peer(identity: ids.Identity, version: str = "TLSv1.3") -> tuple[dict[str, list[bytes]], bytes]:
    key = ids.new_private_key_pem()
    certificate = ids.sign_csr(AUTHORITY, AUTHORITY_KEY, ids.make_csr(key), identity, NOW, 30)
    return {"x509_pem_cert": [certificate], "ssl_tls_version": [version.encode()]}, certificate


def _gate(rows: list[MemberRow], clock: Callable[[], datetime] = lambda: NOW) -> Gate:
    return Gate(Roster(rows), clock)


def _row(certificate: bytes, identity: ids.Identity, revoked: bool = False) -> MemberRow:
    digest = key_digest(ids.public_key_pem_of_certificate(certificate))
    return MemberRow(identity.member, identity.role, digest, certificate, revoked)


def _cases() -> Iterator[tuple[str, Callable[[], object], type[FedshareError]]]:
    alice = ids.Identity("trainer", "acme", "alice")
    peer, certificate = _peer(alice)
    row = _row(certificate, alice)
    method = "/share_proto.v1.Hub/Submit"
    yield "no rule", lambda: _gate([row]).admit("/share_proto.v1.Hub/Brand_new", peer), AccessError
    old = {**peer, "ssl_tls_version": [b"TLSv1.2"]}
    yield "TLS 1.2", lambda: _gate([row]).admit(method, old), IdentityError
    yield "no TLS", lambda: _gate([row]).admit(method, {}), IdentityError
    two = {**peer, "x509_pem_cert": [certificate, certificate]}
    yield "two certificates", lambda: _gate([row]).admit(method, two), IdentityError
    late = _gate([row], lambda: NOW + timedelta(days=31))
    yield "expired on an open connection", lambda: late.admit(method, peer), CertificateError
    yield "not enrolled", lambda: _gate([]).admit(method, peer), CertificateError
    shut = _row(certificate, alice, revoked=True)
    yield "shut out", lambda: _gate([shut]).admit(method, peer), AccessError
    other = ids.Identity("reader", "acme", "alice")
    yield "role changed", lambda: _gate([_row(certificate, other)]).admit(method, peer), CertificateError
    hub, _ = _peer(ids.Identity("hub", "server", "hub"))
    yield "the hub's own role", lambda: _gate([]).admit(method, hub), AccessError


@pytest.mark.parametrize("case", list(_cases()), ids=lambda case: case[0])
def test_the_gate_refuses(case: tuple[str, Callable[[], object], type[FedshareError]]) -> None:
    with pytest.raises(case[2]):
        case[1]()


def test_the_gate_admits_an_enrolled_member() -> None:
    alice = ids.Identity("trainer", "acme", "alice")
    peer, certificate = _peer(alice)
    caller = _gate([_row(certificate, alice)]).admit("/share_proto.v1.Hub/Submit", peer)
    assert (caller.member, caller.organisation) == ("acme/alice", "acme")
