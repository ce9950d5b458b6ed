"""A stranger gets nowhere, and nobody gets further than their role: every certificate kind against every RPC."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from cryptography import x509
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2

import share_proto.v1
from share_core import identity as ids
from share_core.errors import AccessError, CertificateError, FedshareError, IdentityError
from share_proto.v1 import enrolment_pb2
from share_server.hub import access
from share_server.hub.access import RULES, Gate, Roster
from share_server.local import Holder, LocalHub
from share_server.operator import CHANNEL_OPTIONS, named_error
from share_server.store.members import key_digest
from share_server.store.records import MemberRow

STRANGERS_ONLY = "Enrolment"
"""The one service that asks for no certificate."""


def _methods(package: ModuleType = share_proto.v1) -> dict[str, MethodDescriptor]:
    """Return every method of every file of the contract, and of gRPC's health: a new file counts by being there."""
    names = [info.name for info in pkgutil.iter_modules(package.__path__) if info.name.endswith("_pb2")]
    files = [importlib.import_module(f"{package.__name__}.{name}").DESCRIPTOR for name in names]
    return {
        f"/{service.full_name}/{method.name}": method
        for file in (*files, health_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        if service.name != STRANGERS_ONLY
        for method in service.methods
    }


METHODS = _methods()
NOW = datetime.now(UTC)
LISTENS = "/grpc.health.v1.Health/Check"


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
    assert len(METHODS) >= 24
    assert not _without_rule(RULES)
    assert set(RULES) == set(METHODS)


def test_a_method_without_a_rule_would_be_noticed() -> None:
    assert _without_rule(set(RULES) - {"/share_proto.v1.Hub/Submit"}) == {"/share_proto.v1.Hub/Submit"}


REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}


def _matrix(
    address: str, authority: bytes, kinds: Mapping[str, Any], certificates: Any, folder: Path
) -> dict[str, set[Any]]:
    """Return the status codes with which each kind is refused by all methods; None among them if one admits it."""
    found: dict[str, set[Any]] = {}
    for name, pair in kinds.items():
        with contextlib.ExitStack() as stack:
            if name in certificates.NOT_SHOWN_BY_GRPC or name == "TLS 1.2":
                highest = ssl.TLSVersion.TLSv1_2 if name == "TLS 1.2" else ssl.TLSVersion.TLSv1_3
                line = stack.enter_context(certificates.tls_line(address, folder, pair, highest))
                channel = grpc.insecure_channel(line, CHANNEL_OPTIONS)
            elif name == "plaintext":
                channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
            else:
                shown = (pair.key, pair.certificate) if pair is not None else ()
                channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, *shown), CHANNEL_OPTIONS)
            stack.enter_context(channel)
            errors = [_call(channel, path) for path in METHODS]
            found[name] = {error.code() if isinstance(error, grpc.Call) else None for error in errors}
    return found


def test_every_method_refuses_every_stranger(
    shared_hub: LocalHub, stranger_kinds: Callable[[LocalHub], dict[str, Any]], certificates: Any, tmp_path: Path
) -> None:
    kinds = stranger_kinds(shared_hub)
    kinds |= {"plaintext": None, "TLS 1.2": kinds["good"]}
    good = kinds.pop("good")
    assert len(kinds) >= 30
    authority, address = shared_hub.layout.ca_cert.read_bytes(), shared_hub.config.local_hub_address
    found = _matrix(address, authority, kinds, certificates, tmp_path)
    for name, codes in found.items():
        without_connection = name == "plaintext" or name in certificates.REFUSED_BY_TLS
        assert codes <= ({grpc.StatusCode.UNAVAILABLE} if without_connection else REFUSED), name
    # The lines that strangers were called over let the right ones through, so it is not the line that refused them.
    line = certificates.tls_line(address, tmp_path, good)
    with line as near, grpc.insecure_channel(near, CHANNEL_OPTIONS) as channel:
        assert _call(channel, LISTENS) is None
    assert None in _matrix(address, authority, {"good": good}, certificates, tmp_path)["good"]


ASKS_NOBODY = """
import sys
from share_server.hub import __main__, access
access.Roster.check = lambda self, identity, key_sha256: None
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_hub_that_does_not_ask_who_has_enrolled_is_noticed(
    new_hub: Callable[..., LocalHub],
    stranger_kinds: Callable[[LocalHub], dict[str, Any]],
    certificates: Any,
    tmp_path: Path,
) -> None:
    script = tmp_path / "planted.py"
    script.write_text(ASKS_NOBODY)
    hub = new_hub(script=script)
    hub.start()
    authority, address = hub.layout.ca_cert.read_bytes(), hub.config.local_hub_address
    kinds = {name: pair for name, pair in stranger_kinds(hub).items() if name in {"replaced", "revoked", "no purpose"}}
    found = _matrix(address, authority, kinds, certificates, tmp_path)
    assert {name for name, codes in found.items() if not codes <= REFUSED} == {"replaced", "revoked"}


@pytest.fixture(scope="module")
def holders(shared_hub: LocalHub) -> dict[str, Holder]:
    return {
        "trainer": shared_hub.enrol("roles/trainer", "trainer"),
        "contributor": shared_hub.enrol("roles/contributor", "contributor"),
        "reader": shared_hub.enrol("roles/reader", "reader"),
        "relay": shared_hub.enrol("roles/relay", "relay"),
        "operator": shared_hub.own("operator"),
        "fleet": shared_hub.own("fleet"),
    }


@pytest.mark.parametrize("role", ["trainer", "contributor", "reader", "relay", "operator", "fleet"])
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
    assert [method.name for method in services[STRANGERS_ONLY].methods] == ["GetAuthority", "Enrol"]


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


def _admitted(gate: Gate, kinds: Mapping[str, Any], version: bytes = b"TLSv1.3") -> set[tuple[str, str]]:
    """Return (kind, method) of everything that the gate lets in, as if TLS had let everybody through."""
    found = set()
    for name, pair in kinds.items():
        shown = [pair.certificate] if pair is not None else []
        for method in METHODS:
            with contextlib.suppress(FedshareError):
                gate.admit(method, {"x509_pem_cert": shown, "ssl_tls_version": [version]})
                found.add((name, method))
    return found


@pytest.fixture(scope="module")
def paper(certificates: Any) -> tuple[Gate, dict[str, Any]]:
    """A gate of its own, and what strangers show to it."""
    key, (certificate, authority_key) = ids.new_private_key_pem(), (AUTHORITY, AUTHORITY_KEY)
    hub = ids.Identity("hub", "server", "hub")
    own = ids.sign_csr(certificate, authority_key, ids.make_csr(key), hub, NOW, 1, ["localhost"])
    signer = ids.make_signer(certificate, authority_key, ids.Identity("signer", "server", "hub"), NOW, 1)
    federation = certificates.make_federation(
        certificates.Pair(authority_key, certificate), certificates.Pair(key, own), certificates.Pair(*reversed(signer))
    )
    rows = [
        _row(federation.enrolled.certificate, federation.member),
        _row(federation.revoked.certificate, ids.Identity("trainer", "acme", "gone"), revoked=True),
    ]
    kinds = {"good": federation.enrolled, **certificates.stranger_kinds(federation)}
    for chained in ("self-signed", "other authority", "issued by a member"):
        del kinds[chained]  # only TLS sees who has signed
    return Gate(Roster(rows)), kinds


TRAINERS = {("good", path) for path, roles in RULES.items() if "trainer" in roles}


def test_the_gate_lets_the_right_one_in_and_nobody_else(paper: tuple[Gate, dict[str, Any]]) -> None:
    assert _admitted(*paper) == TRAINERS
    assert _admitted(*paper, version=b"TLSv1.2") == set()


def _first_name(certificate: bytes) -> ids.Identity:
    """Read a certificate as carelessly as possible."""
    for extension in x509.load_pem_x509_certificate(certificate).extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            for uri in extension.value.get_values_for_type(x509.UniformResourceIdentifier):
                return ids.parse_identity_uri(uri)
    raise CertificateError("nobody")


EVERY_ROLE = dict.fromkeys(METHODS, ids.ROLES)

PLANTED: dict[str, tuple[str, object, set[str]]] = {
    "no rules": ("RULES", EVERY_ROLE, {"good", "would-be hub"}),
    "no clock": ("check_validity", lambda certificate, now: None, {"expired", "not yet valid"}),
    "no roster": (
        "check_standing",
        lambda row, identity, key: row,
        {"never enrolled", "same name, own key", "replaced", "revoked", "other member role", "p384 key"},
    ),
    "any name of its own": (
        "OWN_CERTIFICATES",
        {
            role: ids.Identity(role, *member.split("/"))
            for role, member in (("operator", "acme/alice"), ("fleet", "acme/alice"))
        },
        {"would-be operator", "would-be fleet"},
    ),
    "careless reading": (
        "identity_of",
        _first_name,
        {"no purpose", "two names", "authority with a name", "server's purpose"},
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_check_of_the_gate_is_the_one_that_bites(
    paper: tuple[Gate, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    attribute, replacement, let_in = PLANTED[name]
    access._read.cache_clear()
    monkeypatch.setattr(access, attribute, replacement)
    try:
        assert {kind for kind, _ in _admitted(*paper) - TRAINERS} == let_in
    finally:
        access._read.cache_clear()


def test_a_gate_that_takes_any_protocol_is_noticed(
    paper: tuple[Gate, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "require_tls13", lambda peer: None)
    assert _admitted(*paper, version=b"TLSv1.2") == TRAINERS
