"""Enrolment: from a join token to a certificate, without trusting the first contact.

1. fetch the listener's own certificate, unverified;
2. over a channel that trusts just that certificate, ask for the authority: nothing secret is sent;
3. compare the authority's SHA-256 with the fingerprint in the token, which came by another way;
4. open a new channel with that authority as only root and full verification, and only now send the token.

Keys are made here and never leave. ``member.json`` is written last, so a directory that has it is enrolled.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from share_client.channel import error_from_rpc, open_pinned_channel
from share_client.durable import make_private_directory
from share_client.egress import EgressLog
from share_client.member import ClientLayout, Member, check_node_key, load_member, save_member
from share_core.durable import PUBLIC, write_atomic
from share_core.errors import CertificateError, ConfigError, TokenError, UnavailableError
from share_core.identity import (
    JoinToken,
    certificate_fingerprint,
    identity_of,
    make_csr,
    new_private_key_pem,
    public_key_pem,
    public_key_pem_of_certificate,
    token_decode,
)
from share_proto.v1 import enrolment_pb2, enrolment_pb2_grpc

_DEADLINE = 20.0
"""Seconds for one call of enrolment."""


def enrol(token_text: str, layout: ClientLayout, now: datetime) -> Member:
    """Enrol the directory with a join token and return the new member.

    Raises:
        TokenError: the token is damaged, expired, used, or not made by this server.
        CertificateError: the server's authority is not the one named in the token.
        ConfigError: the directory belongs to another member.
        UnavailableError: nobody answers at the token's address.
    """
    token = token_decode(token_text)
    if now.timestamp() > token.expires:
        moment = datetime.fromtimestamp(token.expires, tz=now.tzinfo)
        raise TokenError(
            f"join token for {token.organisation}/{token.name} expired at {moment:%Y-%m-%d %H:%M %Z}: "
            "ask the operator for a new one"
        )
    before = load_member(layout) if layout.member.exists() else None
    if before is not None and before.member != token.identity.member:
        raise ConfigError(
            f"{layout.root} belongs to {before.member}, the token is for {token.identity.member}: use another --dir"
        )
    authority = fetch_authority(token, EgressLog(layout.egress))
    _make_keys(layout)
    answer = _ask_certificate(token_text.strip(), token, authority, layout)
    _check_answer(answer, token, authority, layout)
    write_atomic(layout.authority, authority, PUBLIC)
    write_atomic(layout.certificate, answer.certificate_pem, PUBLIC)
    member = Member(
        member=answer.member,
        hub_address=answer.hub_address,
        gateway_address=answer.gateway_address,
        space_id=answer.space_id,
        node_id=before.node_id if before is not None else 0,
        follow_address=before.follow_address if before is not None else "",
    )
    save_member(layout, member)
    return member


def fetch_authority(token: JoinToken, egress: EgressLog | None = None) -> bytes:
    """Return the authority (PEM) of the server behind ``token`` after comparing it with the token's fingerprint.

    What is sent is written into ``egress`` first.

    Raises:
        CertificateError: it is another authority; the message names both fingerprints.
        UnavailableError: nobody answers.
    """
    leaf = _fetch_leaf(token.address)
    with open_pinned_channel(token.address, leaf, egress) as channel:
        try:
            answer = enrolment_pb2_grpc.EnrolmentStub(channel).GetAuthority(
                enrolment_pb2.GetAuthorityRequest(), timeout=_DEADLINE
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, f"asking {token.address} for its certificate authority") from error
    found = certificate_fingerprint(answer.ca_pem)
    if found != token.ca_sha256:
        raise CertificateError(
            f"the server at {token.address} is not the one the token was made for: expected the authority "
            f"{token.ca_sha256}, got {found}; do not continue before the operator has explained this"
        )
    return bytes(answer.ca_pem)


def make_node_key() -> tuple[bytes, bytes]:
    """Return (private key in OpenSSH format, public key PEM) on EC P-384, as Flower's SuperNode wants them."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private, public


def _fetch_leaf(address: str) -> bytes:
    """Return the certificate (PEM) the listener shows, whoever it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what is fetched here is compared with the token's fingerprint later
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        with (
            socket.create_connection((host, int(port)), timeout=_DEADLINE) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            leaf = tls.getpeercert(binary_form=True)
    except (OSError, ValueError, OverflowError) as error:
        raise UnavailableError(
            f"no fedshare server answers at {address} ({error}): is it running, and is the address in the token "
            "reachable from here?"
        ) from error
    if not leaf:
        raise UnavailableError(f"the listener at {address} shows no certificate: it is no fedshare server")
    return ssl.DER_cert_to_PEM_cert(leaf).encode()


def _make_keys(layout: ClientLayout) -> None:
    """Make the two keys unless an earlier attempt has left them. Damaged ones are set aside and made anew."""
    make_private_directory(layout.root)
    make_private_directory(layout.identity)
    if not _whole(lambda: public_key_pem(layout.key.read_bytes()), layout.key):
        write_atomic(layout.key, new_private_key_pem())
    if not _whole(lambda: check_node_key(layout), layout.node_key, layout.node_public_key):
        private, public = make_node_key()
        write_atomic(layout.node_key, private)
        write_atomic(layout.node_public_key, public, PUBLIC)


def _whole(read: Callable[[], object], *paths: Path) -> bool:
    """Return whether the files of one key can be used; what cannot is kept beside, under ``.damaged``."""
    try:
        read()
    except Exception:  # parsers meet damaged bytes with errors of many kinds
        for path in paths:
            if path.exists():
                path.replace(path.with_name(f"{path.name}.damaged"))
        return False
    return True


def _ask_certificate(
    token_text: str, token: JoinToken, authority: bytes, layout: ClientLayout
) -> enrolment_pb2.EnrolResponse:
    request = enrolment_pb2.EnrolRequest(
        token=token_text,
        csr_pem=make_csr(layout.key.read_bytes()),
        node_public_key_pem=layout.node_public_key.read_bytes() if token.role == "trainer" else b"",
    )
    with open_pinned_channel(token.address, authority, EgressLog(layout.egress)) as channel:
        try:
            return enrolment_pb2_grpc.EnrolmentStub(channel).Enrol(request, timeout=_DEADLINE)
        except grpc.RpcError as error:
            raise error_from_rpc(error, f"enrolling at {token.address}") from error


def _check_answer(
    answer: enrolment_pb2.EnrolResponse, token: JoinToken, authority: bytes, layout: ClientLayout
) -> None:
    """Refuse an answer that is not what was asked for, before anything is kept."""
    identity = identity_of(answer.certificate_pem)
    if identity != token.identity or answer.member != identity.member:
        raise CertificateError(
            f"the server signed a certificate for {identity.uri}, expected {token.identity.uri}: nothing was kept"
        )
    if public_key_pem_of_certificate(answer.certificate_pem) != public_key_pem(layout.key.read_bytes()):
        raise CertificateError("the server signed another key than ours: nothing was kept")
    if certificate_fingerprint(answer.ca_pem) != certificate_fingerprint(authority):
        raise CertificateError("the server changed its authority while enrolling: nothing was kept")
