"""Every kind of certificate that somebody may show, each wrong in one way only, and a way to speak the TLS of others.

What is wrong is the certificate and not the key, wherever that is possible: the key is the one that the member has
enrolled, so that nothing but the check in question stands in the way.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from share_core.identity import Identity, make_authority, make_csr, new_private_key_pem, sign_csr

CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
_PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Pair:
    """A private key and a certificate, PEM."""

    key: bytes
    certificate: bytes


@dataclass(frozen=True)
class Federation:
    """Whom the strangers want to be taken for."""

    authority: Pair
    member: Identity
    """An enrolled trainer."""
    enrolled: Pair
    """What it enrolled last."""
    replaced: Pair
    """What it had enrolled before."""
    revoked: Pair
    """Of a trainer that is shut out."""
    listener: Pair
    """The server's own."""
    signer: Pair
    """The key that signs versions."""


REFUSED_BY_TLS = frozenset(
    {
        "no certificate",
        "self-signed",
        "other authority",
        "issued by a member",
        "expired",
        "not yet valid",
        "server's purpose",
        "listener's own",
        "signer's",
        "authority itself",
    }
)
"""Kinds that get no connection; all others are refused call by call."""

NOT_SHOWN_BY_GRPC = frozenset({"signer's", "authority itself"})
"""Kinds that gRPC's own client would not show; :func:`tls_line` does."""


def make_federation(authority: Pair, listener: Pair, signer: Pair) -> Federation:
    """Return a federation whose members exist on paper only: who has enrolled is for the test to say."""
    now = datetime.now(UTC)

    def issue(member: Identity) -> Pair:
        key = new_private_key_pem()
        return Pair(key, sign_csr(authority.certificate, authority.key, make_csr(key), member, now, 7))

    alice, gone = Identity("trainer", "acme", "alice"), Identity("trainer", "acme", "gone")
    return Federation(authority, alice, issue(alice), issue(alice), issue(gone), listener, signer)


def stranger_kinds(one: Federation) -> dict[str, Pair | None]:
    """Return every kind that must be refused everywhere; None is no certificate at all."""
    name, now = one.member.uri, datetime.now(UTC)
    hour, week = timedelta(hours=1), timedelta(days=7)
    other = Pair(*reversed(make_authority("fedshare authority", now)))
    own_authority = one.authority

    def craft(  # the member's own key and name, unless told otherwise
        uris: Sequence[str] = (name,),
        key: bytes = one.enrolled.key,
        issuer: Pair = own_authority,
        begin: datetime = now - hour,
        end: datetime = now + week,
        **more: Any,
    ) -> Pair:
        return Pair(key, certify(issuer, key, uris, begin, end, **more))

    def crowned(role: str, member: str = one.member.member) -> Pair:
        return craft([f"share://{role}/{member}"])

    return {
        "no certificate": None,
        "self-signed": craft(issuer=Pair(one.enrolled.key, _lone(one.enrolled.key, name, now))),
        "other authority": craft(issuer=other),
        "issued by a member": Pair(one.enrolled.key, craft(issuer=one.enrolled).certificate + one.enrolled.certificate),
        "expired": craft(begin=now - week, end=now - hour),
        "not yet valid": craft(begin=now + hour),
        "no purpose": craft(purposes=()),
        "server's purpose": craft(purposes=(SERVER,)),
        "two names": craft([name, one.member.uri.replace("trainer", "operator")]),
        "no name": craft([]),
        "host name only": craft([], hosts=("localhost",)),
        "other scheme": craft([name.replace("share://", "spiffe://")]),
        "name with an end": craft([name + "/"]),
        "name in capitals": craft([name.upper().replace("SHARE", "share")]),
        "never enrolled": craft(["share://trainer/ghost/ghost"], key=new_private_key_pem()),
        "same name, own key": craft(key=new_private_key_pem()),
        "replaced": one.replaced,
        "revoked": one.revoked,
        "other member role": crowned("contributor"),
        "would-be operator": crowned("operator"),
        "would-be fleet": crowned("fleet"),
        "would-be hub": crowned("hub", "server/hub"),
        "would-be signer": crowned("signer", "server/hub"),
        "unknown role": crowned("emperor"),
        "listener's own": one.listener,
        "signer's": one.signer,
        "authority itself": own_authority,
        "authority with a name": craft(ca=True),
        "rsa key": craft(key=_private_pem(rsa.generate_private_key(65537, 2048))),
        "p384 key": craft(key=_private_pem(ec.generate_private_key(ec.SECP384R1()))),
    }


def certify(
    issuer: Pair,
    key: bytes,
    uris: Sequence[str],
    begin: datetime,
    end: datetime,
    *,
    purposes: Sequence[x509.ObjectIdentifier] = (CLIENT,),
    hosts: Sequence[str] = (),
    ca: bool = False,
) -> bytes:
    """Return a certificate (PEM) over the public half of ``key``, with nothing checked."""
    public, issuing = _load(key).public_key(), x509.load_pem_x509_certificate(issuer.certificate)
    issuing_key: Any = issuing.public_key()
    names = [x509.UniformResourceIdentifier(uri) for uri in uris] + [x509.DNSName(host) for host in hosts]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name.from_rfc4514_string("CN=alice,O=acme"))
        .issuer_name(issuing.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuing_key), critical=False)
    )
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(purposes)), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(_load(issuer.key), hashes.SHA256()).public_bytes(_PEM)


def _lone(key: bytes, name: str, now: datetime) -> bytes:
    """Return a certificate that nobody but its own key has signed."""
    subject = x509.Name.from_rfc4514_string("CN=alice,O=acme")
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
    public = _load(key).public_key()
    builder = builder.public_key(public).serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    return builder.sign(_load(key), hashes.SHA256()).public_bytes(_PEM)


def _load(key: bytes) -> Any:
    return serialization.load_pem_private_key(key, None)


def _private_pem(key: Any) -> bytes:
    return bytes(key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


@contextlib.contextmanager
def tls_line(
    address: str, folder: Path, shown: Pair | None, highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> Iterator[str]:
    """Listen without TLS and pass everything on to ``address`` over a TLS that gRPC's own client would not speak.

    Yields the address to call. ``folder`` takes the file that :mod:`ssl` wants to read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the server is not what these tests doubt
    context.maximum_version = highest
    context.set_alpn_protocols(["h2"])
    if shown is not None:
        (folder / "shown.pem").write_bytes(shown.certificate + shown.key)
        context.load_cert_chain(folder / "shown.pem")
    host, _, port = address.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    near = listener.accept()[0]
                except OSError:
                    return
                threading.Thread(target=_pass_on, args=(near, context, (host, int(port))), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def _pass_on(near: socket.socket, context: ssl.SSLContext, address: tuple[str, int]) -> None:
    with (
        contextlib.suppress(OSError),
        near,
        socket.create_connection(address, 20) as raw,
        context.wrap_socket(raw, server_hostname=address[0]) as far,
    ):
        while True:
            ready = [far] if far.pending() else select.select([near, far], [], [])[0]
            for source, target in ((near, far), (far, near)):
                if source in ready:
                    data = source.recv(65536)
                    if not data:
                        return
                    target.sendall(data)
