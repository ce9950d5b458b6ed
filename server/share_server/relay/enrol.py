"""Enrolment of a relay: one key made here, two certificates, without trusting the first contact.

As for members: the listener's certificate is fetched unverified, the authority is asked for over a channel that trusts
only that, compared with the fingerprint in the token, and only then is the token sent.
"""

from __future__ import annotations

import socket
import ssl

import grpc

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
from share_server.operator import CHANNEL_OPTIONS, named_error
from share_server.relay.home import RelayHome, RelayState, load_state, save_state, split_address

_DEADLINE_S = 20.0


def enrol_relay(text: str, home: RelayHome, listen: str, upstream: str = "") -> RelayState:
    """Enrol the directory with a join token and return what it is now.

    Args:
        text: the token.
        home: the directory; another enrolment of the same relay is replaced, its key stays.
        listen: ``host:port`` to listen on.
        upstream: ``host:port`` of another relay to follow; empty for the hub.

    Raises:
        TokenError: the token is damaged, used, expired, not for a relay, or not made by this server.
        CertificateError: the server is not the one the token was made for.
        ConfigError: the directory belongs to another relay.
        UnavailableError: nobody answers.
    """
    token = token_decode(text)
    if token.role != "relay" or not token.hosts:
        raise TokenError(
            f"the token is for a {token.role} that serves nobody: make one with 'share-server invite DIR "
            "ORGANISATION/NAME --role relay --host NAME'"
        )
    member = token.identity.member
    if home.state.exists() and (before := load_state(home)).member != member:
        raise ConfigError(f"{home.root} belongs to {before.member}, the token is for {member}: use another --dir")
    authority = _fetch_authority(token)
    if not home.key.exists():
        write_atomic(home.key, new_private_key_pem())
    answer = _enrol(text.strip(), token, authority, home.key.read_bytes())
    write_atomic(home.authority, authority, PUBLIC)
    write_atomic(home.caller, answer.certificate_pem, PUBLIC)
    write_atomic(home.serving, answer.serving_certificate_pem, PUBLIC)
    state = RelayState(member, answer.space_id, answer.hub_address, upstream or answer.hub_address, listen)
    save_state(home, state)
    return state


def _fetch_authority(token: JoinToken) -> bytes:
    """Return the authority (PEM) behind ``token`` after comparing it with the token's fingerprint."""
    with _channel(token.address, _fetch_leaf(token.address)) as channel:
        try:
            answer = enrolment_pb2_grpc.EnrolmentStub(channel).GetAuthority(
                enrolment_pb2.GetAuthorityRequest(), timeout=_DEADLINE_S
            )
        except grpc.RpcError as error:
            raise named_error(error, token.address) from error
    found = certificate_fingerprint(answer.ca_pem)
    if found != token.ca_sha256:
        raise CertificateError(
            f"the server at {token.address} is not the one the token was made for: expected the authority "
            f"{token.ca_sha256}, got {found}"
        )
    return bytes(answer.ca_pem)


def _enrol(text: str, token: JoinToken, authority: bytes, key: bytes) -> enrolment_pb2.EnrolResponse:
    """Send the token; refuse an answer that is not what was asked for."""
    with _channel(token.address, authority) as channel:
        try:
            answer = enrolment_pb2_grpc.EnrolmentStub(channel).Enrol(
                enrolment_pb2.EnrolRequest(token=text, csr_pem=make_csr(key)), timeout=_DEADLINE_S
            )
        except grpc.RpcError as error:
            raise named_error(error, token.address) from error
    if not answer.serving_certificate_pem:
        raise CertificateError("the server gave no certificate to serve with: it is older than this relay")
    if identity_of(answer.certificate_pem) != token.identity or answer.member != token.identity.member:
        raise CertificateError(f"the server signed a certificate for another name than {token.identity.uri}")
    own = public_key_pem(key)
    for certificate in (answer.certificate_pem, answer.serving_certificate_pem):
        if public_key_pem_of_certificate(certificate) != own:
            raise CertificateError("the server signed another key than ours: nothing was kept")
    return answer


def _fetch_leaf(address: str) -> bytes:
    """Return the certificate (PEM) that the listener shows, whoever it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what comes of it is compared with the token's fingerprint
    context.set_alpn_protocols(["h2"])
    host, port = split_address(address)
    try:
        with (
            socket.create_connection((host, port), timeout=_DEADLINE_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            leaf = tls.getpeercert(binary_form=True)
    except OSError as error:
        raise UnavailableError(
            f"no fedshare server answers at {address} ({error}): is it running, and can it be reached from here?"
        ) from error
    if not leaf:
        raise UnavailableError(f"the listener at {address} shows no certificate: it is no fedshare server")
    return ssl.DER_cert_to_PEM_cert(leaf).encode()


def _channel(address: str, root: bytes) -> grpc.Channel:
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(root), CHANNEL_OPTIONS)
