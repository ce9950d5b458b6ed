"""Signed manifests: what the hub says about the bytes it publishes.

A manifest is about one payload: the step to a version (``kind`` ``version``), a whole version (``snapshot``), or the
shared head of a task in a version (``head``; the payload names the task). A
statement of kind ``newest`` is about none: it says which version was the newest when it was issued, and it is worth
something only for :data:`FRESH_MS`. Without it, who stands between could show an old version for ever.
Version manifests form a chain: each names the SHA-256 of the body before it, so a follower that holds one knows whether
the next continues it. The body is canonical JSON (sorted keys, no spaces, ASCII). Signed are the bytes
``"fedshare manifest 1" || len(body) as eight big-endian bytes || body``, by Ed25519, with a key whose certificate the
federation's authority has issued for the role ``signer``. Bytes are signed, never an object written anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from share_core.errors import CertificateError, ManifestError, VersionError
from share_core.identity.authority import check_validity, verified_signer_key

VERSION, SNAPSHOT, HEAD, NEWEST = "version", "snapshot", "head", "newest"
"""Kinds of manifests."""

FRESH_MS = 600_000
"""Milliseconds, ten minutes: how old a ``newest`` statement may be, and how far two clocks may be apart."""

GENESIS = ""
"""``previous`` of the manifest of version 1."""

_DOMAIN = b"fedshare manifest 1"


@dataclass(frozen=True)
class Manifest:
    """One statement."""

    kind: str
    """``version``: the payload is the step from the version before. ``snapshot``: it is the whole version. ``head``: it
    is the shared head of one of its tasks. ``newest``: there is no payload."""
    space_id: str
    """The space."""
    version: int
    """The version that the payload leads to or is."""
    previous: str
    """Hexadecimal SHA-256 of a body: for ``version`` that of the version before, ``""`` before version 1; for
    the others that of this version's own ``version`` manifest, ``""`` for version 0."""
    payload_sha256: str
    """Digest of the payload; empty for a version without a step, which is only published whole."""
    payload_size: int
    """Bytes of the payload."""
    issued_ms: int
    """When the hub said so, milliseconds since 1970."""


@dataclass(frozen=True)
class SignedManifest:
    """Body and signature as they travel and are stored."""

    body: bytes
    """Canonical JSON."""
    signature: bytes
    """Ed25519, 64 bytes."""

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the body: what the next manifest links to."""
        return hashlib.sha256(self.body).hexdigest()


def sign_manifest(key_pem: bytes, manifest: Manifest) -> SignedManifest:
    """Return ``manifest`` signed with the hub's signing key (PEM).

    Raises:
        CertificateError: the key is no Ed25519 key.
    """
    key = load_signing_key(key_pem)
    body = json.dumps(asdict(manifest), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    return SignedManifest(body, key.sign(_signed_bytes(body)))


def load_signing_key(key_pem: bytes) -> Ed25519PrivateKey:
    """Return the hub's signing key.

    Raises:
        CertificateError: it cannot be read, or is no Ed25519 key.
    """
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise CertificateError("signing key cannot be read: expected an unencrypted PKCS#8 PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CertificateError(f"signing key is a {type(key).__name__}, expected Ed25519")
    return key


class ManifestVerifier:
    """Checks manifests of one hub: the signer's certificate against the authority once, then each signature."""

    def __init__(self, ca_cert: bytes, signer_certificate: bytes, now: datetime) -> None:
        """Trust ``signer_certificate`` (PEM) if the authority (PEM) has issued it for the role ``signer``.

        Raises:
            CertificateError: it has not, or the certificate is not valid now.
        """
        self._key: Ed25519PublicKey = verified_signer_key(ca_cert, signer_certificate)
        check_validity(signer_certificate, now)

    def read(self, signed: SignedManifest) -> Manifest:
        """Return what a manifest says.

        Raises:
            ManifestError: its signature does not match, or its body is not one of ours.
        """
        try:
            self._key.verify(signed.signature, _signed_bytes(signed.body))
        except InvalidSignature:
            raise ManifestError("manifest: the signature is not the hub's: the payload may be forged") from None
        return parse_manifest(signed.body)


def check_newest(manifest: Manifest, space_id: str, now_ms: int) -> None:
    """Check what a verified ``newest`` statement is about and how old it is at ``now_ms``.

    Raises:
        ManifestError: it is of another kind or space.
        VersionError: it is too old, or of a time to come.
    """
    if (manifest.kind, manifest.space_id) != (NEWEST, space_id):
        raise ManifestError(
            f"expected a statement of the newest version of {space_id}, got {manifest.kind!r} of {manifest.space_id}"
        )
    age_ms = now_ms - manifest.issued_ms
    if abs(age_ms) > FRESH_MS:
        raise VersionError(
            f"the statement that version {manifest.version} is the newest is {abs(age_ms) / 1000:.0f} s "
            f"{'old' if age_ms > 0 else 'ahead of this clock'}, at most {FRESH_MS / 1000:.0f} are allowed: newer "
            "versions are held back, or one of the clocks is wrong"
        )


def parse_manifest(body: bytes) -> Manifest:
    """Read a body whose signature was checked, or that comes from our own disk.

    Raises:
        ManifestError: it does not hold exactly the fields of a manifest, or one has another type.
    """
    try:
        values: Any = json.loads(body)
        manifest = Manifest(**values)
    except (ValueError, TypeError, RecursionError) as error:
        raise ManifestError(f"manifest: the body cannot be read: {error}") from error
    for name, kind in Manifest.__annotations__.items():
        expected = int if kind == "int" else str
        if type(getattr(manifest, name)) is not expected:
            raise ManifestError(f"manifest: {name} is {values[name]!r}, expected {expected.__name__}")
    lowest = {VERSION: 1, SNAPSHOT: 1, HEAD: 1, NEWEST: 0}
    if manifest.version < lowest.get(manifest.kind, manifest.version + 1):
        raise ManifestError(f"manifest: {manifest.kind!r} of version {manifest.version} is nothing that is published")
    return manifest


def _signed_bytes(body: bytes) -> bytes:
    return _DOMAIN + len(body).to_bytes(8, "big") + body
