"""The client's directory: who this member is and where everything lies.

::

    CDIR/member.json            member, addresses, space id, node id
    CDIR/identity/              key.pem cert.pem ca.pem (mTLS), node.key node.pub (Flower SuperNode), sequence.json
    CDIR/outbox/<update id>/    trained and not yet merged; outbox/refused/ holds what the hub will not take
    CDIR/tasks/<task>/          private heads, history.jsonl, record.json
    CDIR/egress/                everything that left, line by line
    CDIR/cache/                 a version of the space, to rejoin without downloading all again
    CDIR/fleet/                 private Flower home and the loopback authority
    CDIR/logs/                  session.jsonl, supernode.log
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from share_client.durable import to_json
from share_client.egress import EgressLog
from share_core.durable import PUBLIC, write_atomic
from share_core.errors import CertificateError, ConfigError
from share_core.identity import not_after, public_key_pem, public_key_pem_of_certificate

_T = TypeVar("_T")


@dataclass(frozen=True)
class ClientLayout:
    """The paths inside one client directory."""

    root: Path
    """The directory itself, CDIR; made absolute, because child processes run in other directories."""

    def __post_init__(self) -> None:
        """Make the root absolute."""
        object.__setattr__(self, "root", self.root.absolute())

    @property
    def member(self) -> Path:
        """Who we are; written last when enrolling."""
        return self.root / "member.json"

    @property
    def identity(self) -> Path:
        """Keys and certificates, mode 0700."""
        return self.root / "identity"

    @property
    def key(self) -> Path:
        """Private key of the mTLS certificate."""
        return self.identity / "key.pem"

    @property
    def certificate(self) -> Path:
        """The member's certificate."""
        return self.identity / "cert.pem"

    @property
    def authority(self) -> Path:
        """The federation's certificate authority."""
        return self.identity / "ca.pem"

    @property
    def node_key(self) -> Path:
        """Private key the SuperNode signs with, OpenSSH format."""
        return self.identity / "node.key"

    @property
    def node_public_key(self) -> Path:
        """Public half of the node key, PEM."""
        return self.identity / "node.pub"

    @property
    def sequence(self) -> Path:
        """The number of what was signed last."""
        return self.identity / "sequence.json"

    @property
    def outbox(self) -> Path:
        """Trained and not yet merged updates."""
        return self.root / "outbox"

    @property
    def tasks(self) -> Path:
        """What is known of each own task."""
        return self.root / "tasks"

    @property
    def egress(self) -> Path:
        """What left this building."""
        return self.root / "egress"

    @property
    def cache(self) -> Path:
        """A version of the space."""
        return self.root / "cache"

    @property
    def fleet(self) -> Path:
        """Flower's private files."""
        return self.root / "fleet"

    @property
    def logs(self) -> Path:
        """Logs."""
        return self.root / "logs"

    @property
    def session_log(self) -> Path:
        """JSON lines of what sessions do."""
        return self.logs / "session.jsonl"


@dataclass(frozen=True)
class Member:
    """What enrolment told us; ``member.json``."""

    member: str
    """``organisation/name``."""
    hub_address: str
    """host:port of the Hub and Fleet services."""
    gateway_address: str
    """host:port of the Flower gateway."""
    space_id: str
    """The space the hub served at enrolment."""
    node_id: int = 0
    """Flower's id of our node; 0 until the server registered it."""
    follow_address: str = ""
    """host:port of a relay to follow versions from; empty to follow the hub."""

    @property
    def organisation(self) -> str:
        """The part before the slash."""
        return self.member.partition("/")[0]


@dataclass(frozen=True)
class Credentials:
    """The PEM bytes of one mTLS identity."""

    key: bytes
    """Private key."""
    certificate: bytes
    """The member's certificate."""
    authority: bytes
    """The only root that is trusted."""
    egress: EgressLog | None = None
    """Where all that is sent under this identity is written down first; None writes nothing down."""


def save_member(layout: ClientLayout, member: Member) -> None:
    """Write ``member.json`` atomically."""
    write_atomic(layout.member, to_json(asdict(member)), PUBLIC)


def load_member(layout: ClientLayout) -> Member:
    """Read ``member.json``.

    Raises:
        ConfigError: the directory is not enrolled, or the file does not hold what it should.
    """
    try:
        document = json.loads(layout.member.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{layout.root} is not enrolled: it has no member.json; run share-client join TOKEN --dir {layout.root} ("
            "enrol in place of join if it is not to train)"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{layout.member}: cannot be read ({error}): restore the file, or remove it and join again with a new token"
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(f"{layout.member}: expected an object, got {document!r:.200}")
    values: dict[str, Any] = {}
    for field in fields(Member):
        kind = int if field.name == "node_id" else str
        optional = field.name == "follow_address"  # newer than the others: a directory may be older
        value = document.get(field.name, field.default if optional else None)
        if type(value) is not kind:
            raise ConfigError(f"{layout.member}: key {field.name!r}: expected {kind.__name__}, got {document!r:.200}")
        values[field.name] = value
    return Member(**values)


def load_credentials(layout: ClientLayout, now: datetime) -> Credentials:
    """Read the mTLS identity and check that its parts can be used, belong together, and have not run out at ``now``.

    Raises:
        ConfigError: a file is missing.
        CertificateError: a file is damaged, they do not belong together, or the certificate has expired. The message
            names the file.
    """
    try:
        credentials = Credentials(
            key=layout.key.read_bytes(),
            certificate=layout.certificate.read_bytes(),
            authority=layout.authority.read_bytes(),
            egress=EgressLog(layout.egress),
        )
    except OSError as error:
        raise ConfigError(
            f"{layout.identity}: identity is incomplete: {error}; enrol again with a new token"
        ) from error
    check_credentials(layout, credentials, now)
    return credentials


def check_credentials(layout: ClientLayout, credentials: Credentials, now: datetime) -> None:
    """Check that the parts of an identity can be used, belong together, and have not run out at ``now``.

    Raises:
        CertificateError: otherwise. The message names the file of ``layout`` in which the part lies, or is to lie.
    """
    own = _usable(layout.key, lambda: public_key_pem(credentials.key))
    certified = _usable(layout.certificate, lambda: public_key_pem_of_certificate(credentials.certificate))
    _usable(layout.authority, lambda: _check_issued(credentials.authority, credentials.authority))
    _usable(layout.certificate, lambda: _check_issued(credentials.certificate, credentials.authority))
    if own != certified:
        raise CertificateError(
            f"{layout.key} is not the key that {layout.certificate} was issued for: restore the one that belongs to "
            "the other, or enrol again with a new token"
        )
    end = not_after(credentials.certificate)
    if end <= now:
        raise CertificateError(
            f"{layout.certificate} expired at {end:%Y-%m-%d %H:%M} UTC: ask the operator for a new join token"
        )


def check_node_key(layout: ClientLayout) -> None:
    """Check that the key the SuperNode signs with can be read and is the one that was enrolled.

    Raises:
        ConfigError: a file is missing.
        CertificateError: a file is damaged, or they do not belong together. The message names the file.
    """
    try:
        private, public = layout.node_key.read_bytes(), layout.node_public_key.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{layout.identity}: identity is incomplete: {error}; enrol again with a new token"
        ) from error
    own = _usable(layout.node_key, lambda: _ssh_public_key(private))
    if own != _usable(layout.node_public_key, lambda: _subject_public_key(public)):
        raise CertificateError(
            f"{layout.node_key} is not the key of {layout.node_public_key}: restore the one that belongs to the other, "
            "or enrol again with a new token"
        )


def _usable(path: Path, read: Callable[[], _T]) -> _T:
    """Return what ``read`` makes of a file, or say which file is damaged and what to do."""
    try:
        return read()
    except Exception as error:  # parsers meet damaged bytes with errors of many kinds, also NotImplementedError
        raise CertificateError(
            f"{path} is damaged ({error}): restore the file from a backup, or enrol again with a new token"
        ) from error


def _check_issued(certificate: bytes, authority: bytes) -> None:
    """Check that an authority has signed a certificate as it is; its own one as well."""
    try:
        issued, issuer = x509.load_pem_x509_certificate(certificate), x509.load_pem_x509_certificate(authority)
        issued.verify_directly_issued_by(issuer)
    except InvalidSignature as error:
        raise CertificateError("its signature is not the authority's") from error
    # The count of unused bits before the signature is not signed; parsers let other values than none pass.
    if not issued.public_bytes(serialization.Encoding.DER).endswith(b"\0" + issued.signature):
        raise CertificateError("its signature is not written as it must be")


def _ssh_public_key(private: bytes) -> bytes:
    return _public_pem(serialization.load_ssh_private_key(private, password=None).public_key())


def _subject_public_key(public: bytes) -> bytes:
    return _public_pem(serialization.load_pem_public_key(public))


def _public_pem(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
