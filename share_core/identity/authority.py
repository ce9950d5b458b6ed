"""The federation's own certificate authority: EC P-256 keys, requests and certificates, all as PEM bytes.

A certificate is accepted as a caller's identity only if it has exactly one URI name, that name is a
``share://`` name, and it is meant for client authentication. A listener's certificate is meant for server
authentication only, so it can never be turned around and used to call.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import TypeGuard

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from share_core.errors import CertificateError
from share_core.identity.names import Identity, parse_identity_uri

AUTHORITY_DAYS = 3650
"""Life of the authority, in days."""

CLOCK_SLACK = timedelta(minutes=5)
"""Certificates begin this much in the past, because the clocks of two organisations differ."""


def new_private_key_pem() -> bytes:
    """Return a fresh EC P-256 private key, PKCS#8 PEM without a password."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_key_pem(key_pem: bytes) -> bytes:
    """Return the public half of a private key, SubjectPublicKeyInfo PEM."""
    return _public_pem(_load_key(key_pem).public_key())


def public_key_pem_of_certificate(certificate: bytes) -> bytes:
    """Return the public key inside a certificate (PEM or DER), SubjectPublicKeyInfo PEM."""
    key = _load(certificate).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CertificateError(f"certificate holds a {type(key).__name__}, expected an EC P-256 key")
    return _public_pem(key)


def sign_bytes(key_pem: bytes, message: bytes) -> bytes:
    """Return the ECDSA signature (SHA-256, DER) of ``message`` by an EC private key (PEM)."""
    return _load_key(key_pem).sign(message, ec.ECDSA(hashes.SHA256()))


def make_authority(common_name: str, now: datetime) -> tuple[bytes, bytes]:
    """Return (certificate PEM, private key PEM) of a new authority that lives :data:`AUTHORITY_DAYS`."""
    key_pem = new_private_key_pem()
    key = _load_key(key_pem)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    return certificate.public_bytes(serialization.Encoding.PEM), key_pem


def make_csr(key_pem: bytes) -> bytes:
    """Return a PKCS#10 request over ``key_pem``, PEM. It names nobody: the authority decides the name."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return request.sign(_load_key(key_pem), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def sign_csr(
    ca_cert: bytes,
    ca_key: bytes,
    csr_pem: bytes,
    identity: Identity,
    now: datetime,
    days: float,
    server_names: Iterable[str] = (),
) -> bytes:
    """Return a certificate (PEM) for the key in ``csr_pem``, named ``identity``.

    The request must be signed with the key it asks for (proof of possession); its subject and extensions are
    ignored. With ``server_names`` (host names or IP addresses) the certificate serves a listener and cannot
    be used to call; without, it is a caller's certificate and cannot serve.

    Raises:
        CertificateError: the request cannot be read, its signature is wrong, or its key is not EC P-256.
    """
    return _issue(ca_cert, ca_key, _requested_key(csr_pem), identity, now, days, server_names)


def reissue(
    ca_cert: bytes, ca_key: bytes, certificate: bytes, now: datetime, days: float, server_names: Iterable[str] = ()
) -> bytes:
    """Return a certificate (PEM) for the key and the identity of ``certificate`` (PEM or DER), a caller's one.

    Nothing else of it is taken over. Its holder must have proven that it holds the key, which a call with it does.

    Raises:
        CertificateError: it is no caller's certificate, or its key is not EC P-256.
    """
    public = _load(certificate).public_key()
    if not _is_p256(public):
        raise CertificateError(f"certificate holds a {type(public).__name__}, expected an EC P-256 key")
    return _issue(ca_cert, ca_key, public, identity_of(certificate), now, days, server_names)


def _issue(
    ca_cert: bytes,
    ca_key: bytes,
    public: ec.EllipticCurvePublicKey,
    identity: Identity,
    now: datetime,
    days: float,
    server_names: Iterable[str],
) -> bytes:
    authority, authority_key = _load(ca_cert), _load_key(ca_key)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    names += [_general_name(name) for name in server_names]
    purpose = ExtendedKeyUsageOID.CLIENT_AUTH if len(names) == 1 else ExtendedKeyUsageOID.SERVER_AUTH
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, identity.organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, identity.name),
        ]
    )
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        _builder(subject, authority.subject, public, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    return builder.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def make_signer(ca_cert: bytes, ca_key: bytes, identity: Identity, now: datetime, days: float) -> tuple[bytes, bytes]:
    """Return (certificate PEM, private key PEM) of a new Ed25519 key that signs manifests. It is no TLS identity."""
    authority, authority_key = _load(ca_cert), _load_key(ca_key)
    key = Ed25519PrivateKey.generate()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)])
    certificate = (
        _builder(subject, authority.subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key_pem


def verified_signer_key(ca_cert: bytes, certificate: bytes) -> Ed25519PublicKey:
    """Return the key of a signer's certificate (PEM) that the authority (PEM) has issued.

    Raises:
        CertificateError: another issuer, another role, or another kind of key.
    """
    loaded = _load(certificate)
    try:
        loaded.verify_directly_issued_by(_load(ca_cert))
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise CertificateError("the hub's signing certificate is not one of this federation's authority") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1 or parse_identity_uri(uris[0]).role != "signer":
        raise CertificateError(f"the hub's signing certificate names {uris!r}, expected one share://signer/ name")
    key = loaded.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise CertificateError(f"the hub's signing certificate holds a {type(key).__name__}, expected Ed25519")
    return key


def identity_of(certificate: bytes) -> Identity:
    """Return who a caller's certificate (PEM or DER) names.

    The chain is not verified here; TLS has done that. Checked here, in order: no authority, client
    authentication is its purpose, exactly one URI name, and that name is a ``share://`` name.

    Raises:
        CertificateError: if any of these does not hold.
    """
    loaded = _load(certificate)
    try:
        extensions = loaded.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise CertificateError(f"certificate is not one of this federation: {error}") from error
    if constraints.ca:
        raise CertificateError("certificate belongs to an authority, expected a member's certificate")
    if ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
        raise CertificateError("certificate is not meant for client authentication")
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise CertificateError(f"certificate has {len(uris)} URI names, expected exactly one share:// name")
    return parse_identity_uri(uris[0])


def issued_identity(ca_cert: bytes, certificate: bytes) -> Identity:
    """Return who a member's certificate (PEM or DER) names, after checking that the authority (PEM) has issued it.

    Whether it is valid now is not asked: what its holder signed stays signed.

    Raises:
        CertificateError: another issuer, or it is no member's certificate.
    """
    try:
        _load(certificate).verify_directly_issued_by(_load(ca_cert))
    except (InvalidSignature, ValueError, TypeError) as error:
        raise CertificateError("the certificate is not one of this federation's authority") from error
    return identity_of(certificate)


def serial_of(certificate: bytes) -> str:
    """Return the serial number of ``certificate`` (PEM or DER), hexadecimal."""
    return f"{_load(certificate).serial_number:x}"


def check_validity(certificate: bytes, now: datetime) -> None:
    """Raise CertificateError if ``now`` lies outside the life of ``certificate`` (PEM or DER)."""
    loaded = _load(certificate)
    if now < loaded.not_valid_before_utc:
        raise CertificateError(f"certificate is not valid before {loaded.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    if now > loaded.not_valid_after_utc:
        raise CertificateError(
            f"certificate expired {loaded.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: "
            "ask the operator for a new join token"
        )


def not_after(certificate: bytes) -> datetime:
    """Return the last moment at which ``certificate`` (PEM or DER) is valid, UTC."""
    return _load(certificate).not_valid_after_utc


def renewal_moment(certificate: bytes) -> datetime:
    """Return when ``certificate`` (PEM or DER) is due to be renewed, UTC: when half of its life is over.

    Its life begins when it was issued, :data:`CLOCK_SLACK` after its first valid moment.
    """
    loaded = _load(certificate)
    issued = loaded.not_valid_before_utc + CLOCK_SLACK
    return issued + (loaded.not_valid_after_utc - issued) / 2


def certificate_to_der(certificate: bytes) -> bytes:
    """Return ``certificate`` (PEM or DER) as DER."""
    return _load(certificate).public_bytes(serialization.Encoding.DER)


def certificate_to_pem(certificate: bytes) -> bytes:
    """Return ``certificate`` (PEM or DER) as PEM."""
    return _load(certificate).public_bytes(serialization.Encoding.PEM)


def certificate_fingerprint(certificate: bytes) -> str:
    """Return the lower-case hexadecimal SHA-256 of the DER form of ``certificate`` (PEM or DER)."""
    return _load(certificate).fingerprint(hashes.SHA256()).hex()


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey | Ed25519PublicKey,
    now: datetime,
    days: float,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key a request asks for, after checking that the requester holds its private half."""
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        public = request.public_key()
        proven = request.is_signature_valid
    except (ValueError, TypeError, InvalidSignature) as error:
        raise CertificateError(f"certificate request cannot be read: {error}") from error
    if not _is_p256(public):
        raise CertificateError(f"certificate request holds a {type(public).__name__}, expected an EC P-256 key")
    if not proven:
        raise CertificateError("certificate request is not signed with its own key: no proof of possession")
    return public


def _is_p256(key: object) -> TypeGuard[ec.EllipticCurvePublicKey]:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def _general_name(name: str) -> x509.GeneralName:
    """Return a subject alternative name: an IP address if it is one, else a host name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _load(certificate: bytes) -> x509.Certificate:
    try:
        if certificate.lstrip().startswith(b"-----"):
            return x509.load_pem_x509_certificate(certificate)
        return x509.load_der_x509_certificate(certificate)
    except ValueError as error:
        raise CertificateError(f"certificate cannot be read: {error}") from error


def _load_key(key_pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise CertificateError("private key cannot be read: expected an unencrypted PKCS#8 PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"private key is a {type(key).__name__}, expected EC P-256")
    return key


def _public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
