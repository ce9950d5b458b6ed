"""The client's directory: who this member is and where everything lies.

::

    CDIR/member.json            member, addresses, space id, node id
    CDIR/identity/              key.pem cert.pem ca.pem (mTLS), node.key node.pub (Flower SuperNode)
    CDIR/outbox/<update id>/    trained and not yet merged; outbox/refused/ holds what the hub will not take
    CDIR/tasks/<task>/          private heads, history.jsonl, record.json
    CDIR/cache/                 a version of the space, to rejoin without downloading all again
    CDIR/fleet/                 private Flower home and the loopback authority
    CDIR/logs/                  session.jsonl, supernode.log
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from share_client.durable import to_json
from share_core.durable import PUBLIC, write_atomic
from share_core.errors import CertificateError, ConfigError
from share_core.identity import not_after


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
    def outbox(self) -> Path:
        """Trained and not yet merged updates."""
        return self.root / "outbox"

    @property
    def tasks(self) -> Path:
        """What is known of each own task."""
        return self.root / "tasks"

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
            f"{layout.root} is not enrolled: it has no member.json; run share-client join TOKEN --dir {layout.root}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{layout.member}: cannot be read: {error}") from error
    expected = {field.name: type(field.default) if field.name == "node_id" else str for field in fields(Member)}
    for name, kind in expected.items():
        if not isinstance(document, dict) or not isinstance(document.get(name), kind):
            raise ConfigError(f"{layout.member}: key {name!r}: expected {kind.__name__}, got {document!r:.200}")
    return Member(**{name: document[name] for name in expected})


def load_credentials(layout: ClientLayout, now: datetime) -> Credentials:
    """Read the mTLS identity and check that its certificate has not run out at ``now``.

    Raises:
        ConfigError: a file is missing.
        CertificateError: the certificate cannot be read or has expired.
    """
    try:
        credentials = Credentials(
            key=layout.key.read_bytes(),
            certificate=layout.certificate.read_bytes(),
            authority=layout.authority.read_bytes(),
        )
    except OSError as error:
        raise ConfigError(
            f"{layout.identity}: identity is incomplete: {error}; enrol again with a new token"
        ) from error
    end = not_after(credentials.certificate)
    if end <= now:
        raise CertificateError(
            f"{layout.certificate} expired at {end:%Y-%m-%d %H:%M} UTC: ask the operator for a new join token"
        )
    return credentials
