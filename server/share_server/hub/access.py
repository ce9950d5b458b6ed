"""Who may call what. Everything that has no rule here is refused.

Checked on every single call, not only at the handshake, because a connection outlives certificates: TLS 1.3; a client
certificate of our authority (TLS has verified the chain); its life; client authentication and exactly one ``share://``
name; the role's right to the method; for members that this key is the one they enrolled last and that they are not shut
out; and for the server's own tools their very names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from share_core.errors import AccessError, CertificateError, IdentityError
from share_core.identity import Identity, check_validity, identity_of, public_key_pem_of_certificate
from share_server.provision import OWN_CERTIFICATES
from share_server.store.members import check_standing, key_digest
from share_server.store.records import MemberRow

MEMBER_ROLES = frozenset({"trainer", "contributor", "reader", "relay"})
"""Roles that are enrolled with a join token."""

_SUBMITTERS = frozenset({"trainer", "contributor"})
_EVERYBODY = MEMBER_ROLES | {"operator", "fleet"}

RULES: Mapping[str, frozenset[str]] = {
    "/share_proto.v1.Hub/DescribeSpace": _EVERYBODY,
    "/share_proto.v1.Hub/Submit": _SUBMITTERS,
    "/share_proto.v1.Hub/GetUpload": _SUBMITTERS,
    "/share_proto.v1.Hub/GetUpdate": _SUBMITTERS | {"operator"},
    "/share_proto.v1.Hub/ListUpdates": _SUBMITTERS | {"operator"},
    "/share_proto.v1.Hub/FollowVersions": MEMBER_ROLES | {"operator"},
    "/share_proto.v1.Hub/FetchSnapshot": MEMBER_ROLES | {"operator"},
    "/share_proto.v1.Hub/FetchHead": MEMBER_ROLES | {"operator"},  # and only of tasks that are shared with the caller
    "/share_proto.v1.Hub/ListTasks": MEMBER_ROLES | {"operator"},
    "/share_proto.v1.Hub/ReportEvaluation": _SUBMITTERS,
    "/share_proto.v1.Hub/ListEvaluations": MEMBER_ROLES | {"operator"},
    "/share_proto.v1.Hub/GetStatus": _EVERYBODY,
    "/share_proto.v1.Hub/GetRoster": frozenset({"relay"}),
    "/share_proto.v1.Hub/ListCertificates": frozenset({"operator"}),
    "/share_proto.v1.Hub/Backup": frozenset({"operator"}),
    "/share_proto.v1.Hub/Renew": MEMBER_ROLES,
    "/share_proto.v1.Hub/Revoke": frozenset({"operator"}),
    "/share_proto.v1.Hub/DecideUpdate": frozenset({"operator"}),
    "/share_proto.v1.Fleet/Dispatch": frozenset({"fleet"}),
    "/share_proto.v1.Fleet/CloseLease": frozenset({"trainer"}),
    "/share_proto.v1.Fleet/ListNodes": frozenset({"fleet", "operator"}),
    "/share_proto.v1.Fleet/BindNode": frozenset({"fleet"}),
    "/share_proto.v1.Fleet/GetNode": frozenset({"trainer"}),
    "/grpc.health.v1.Health/Check": _EVERYBODY,
    "/grpc.health.v1.Health/Watch": frozenset({"operator", "fleet"}),
}
"""Roles that may call each method of the listener that demands a certificate."""


@dataclass(frozen=True)
class Caller:
    """Who is calling."""

    identity: Identity
    """From the certificate."""
    certificate: bytes
    """The certificate, PEM."""

    @property
    def member(self) -> str:
        """``organisation/name``."""
        return self.identity.member

    @property
    def organisation(self) -> str:
        """The organisation that answers for it."""
        return self.identity.organisation

    @property
    def signer(self) -> str:
        """Hexadecimal SHA-256 of the public key in the certificate, by which what it signs is remembered."""
        return _read(self.certificate)[1]


CALLER: ContextVar[Caller] = ContextVar("caller")
"""The caller of the RPC that the current task serves; set by the interceptor."""


class Roster:
    """Which key each member enrolled last, in memory; the journal is where it comes from."""

    def __init__(self, members: list[MemberRow]) -> None:
        self._members = {row.member: row for row in members}

    def put(self, row: MemberRow) -> None:
        """Take over what has become of a member, once it is durable."""
        self._members[row.member] = row

    def replace(self, members: list[MemberRow]) -> None:
        """Take over what another keeper of the roster says."""
        self._members = {row.member: row for row in members}

    def check(self, identity: Identity, key_sha256: str) -> None:
        """Refuse a member that is unknown, shut out, or shows a key it has replaced.

        Raises:
            CertificateError: unknown member or replaced key; AccessError: shut out.
        """
        check_standing(self._members.get(identity.member), identity, key_sha256)


class Gate:
    """The rules, applied."""

    def __init__(self, roster: Roster, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._roster = roster
        self._clock = clock

    def admit(self, method: str, peer: Mapping[str, object]) -> Caller:
        """Return who calls ``method``, from gRPC's authentication context.

        Raises:
            IdentityError, CertificateError: no usable identity; AccessError: it may not call this.
        """
        require_tls13(peer)
        certificate = _first(peer, "x509_pem_cert")
        if not certificate:
            raise IdentityError("this call needs a client certificate of this federation: join first")
        identity, _ = _read(certificate)
        caller = Caller(identity, certificate)
        self.recheck(caller)
        if identity.role not in RULES.get(method, frozenset()):
            raise AccessError(f"role {identity.role} may not call {method.rsplit('/', 1)[-1]}")
        return caller

    def recheck(self, caller: Caller) -> None:
        """Check again what changes with time, for a call that has been open for long.

        Raises:
            CertificateError: expired or replaced; AccessError: shut out.
        """
        identity, key_sha256 = _read(caller.certificate)
        check_validity(caller.certificate, self._clock())
        if identity.role in MEMBER_ROLES:
            self._roster.check(identity, key_sha256)
        elif identity not in OWN_CERTIFICATES.values():
            raise CertificateError(f"{identity.uri} is none of the server's own tools")


def require_tls13(peer: Mapping[str, object]) -> None:
    """Raise IdentityError unless the connection speaks TLS 1.3; gRPC cannot be told to demand it itself."""
    version = _first(peer, "ssl_tls_version").decode("ascii", "replace")
    if version != "TLSv1.3":
        raise IdentityError(f"expected TLS 1.3, got {version or 'no TLS'}")


def _first(peer: Mapping[str, object], name: str) -> bytes:
    """Return the only value of a property; none or several count as absent."""
    values = peer.get(name)
    if isinstance(values, list | tuple) and len(values) == 1 and isinstance(values[0], bytes):
        return values[0]
    return b""


@lru_cache(maxsize=4096)
def _read(certificate: bytes) -> tuple[Identity, str]:
    """Return (identity, digest of the public key). Parsing is the costly part of a check, and never changes."""
    return identity_of(certificate), key_digest(public_key_pem_of_certificate(certificate))
