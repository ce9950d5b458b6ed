"""Where things lie in a server directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """The paths of one server directory. Nothing is created here."""

    root: Path
    """The directory given to ``share-server init``."""

    @property
    def config(self) -> Path:
        """``server.toml``: addresses, leases, limits."""
        return self.root / "server.toml"

    @property
    def space(self) -> Path:
        """``space.toml``: the space this hub owns."""
        return self.root / "space.toml"

    @property
    def space_next(self) -> Path:
        """``space.toml.next``: limits of a rebuild whose version may not be committed yet."""
        return self.root / "space.toml.next"

    @property
    def ca_cert(self) -> Path:
        """Certificate of the federation's authority."""
        return self.root / "ca" / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """Private key of the authority."""
        return self.root / "ca" / "ca.key"

    @property
    def enrol_key(self) -> Path:
        """32 random bytes under which join tokens are made."""
        return self.root / "enrol.key"

    def certificate(self, name: str) -> Path:
        """Certificate of ``server``, ``operator`` or ``fleet``."""
        return self.root / "tls" / f"{name}.pem"

    def key(self, name: str) -> Path:
        """Private key of ``server``, ``operator`` or ``fleet``."""
        return self.root / "tls" / f"{name}.key"

    @property
    def signing_key(self) -> Path:
        """Ed25519 private key under which versions are signed."""
        return self.root / "signing.key"

    @property
    def signing_certificate(self) -> Path:
        """The authority's certificate of the signing key."""
        return self.root / "signing.pem"

    @property
    def store(self) -> Path:
        """The durable state of the hub. Only the hub process opens it."""
        return self.root / "store"

    @property
    def fleet(self) -> Path:
        """Working files of the Flower side."""
        return self.root / "fleet"

    @property
    def logs(self) -> Path:
        """Log files of the supervised processes."""
        return self.root / "logs"

    @property
    def run_file(self) -> Path:
        """``run.json``: process ids and addresses while everything is up."""
        return self.root / "run.json"
