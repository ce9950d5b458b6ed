"""What a relay checks before it passes anything on: signatures, digests, and that versions follow each other.

Members check all of this again. A relay does it too, so that a bad upstream is found where it is, and so that nothing
unsigned is ever stored or multiplied.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from share_core.errors import DigestError, ManifestError
from share_core.identity import Manifest, ManifestVerifier, SignedManifest
from share_core.identity.manifest import GENESIS, SNAPSHOT, VERSION, check_newest
from share_proto.v1 import hub_pb2


class Checker:
    """The manifests of one space, whose signer the federation's authority vouches for."""

    def __init__(self, authority: bytes, signer_certificate: bytes, space_id: str) -> None:
        """Trust the signer's certificate (PEM) if the authority (PEM) has issued it.

        Raises:
            CertificateError: it has not.
        """
        self._verifier = ManifestVerifier(authority, signer_certificate, datetime.now(UTC))
        self._space_id = space_id

    def step(self, header: hub_pb2.DeltaHeader, head: int, link: str) -> str:
        """Check the header of the step after version ``head``, before its payload is read.

        ``link`` is the digest of the manifest of ``head``. Returns the digest of this one.

        Raises:
            ManifestError: it is not signed, says something else, or does not follow.
        """
        if header.version != head + 1 or header.from_version != head:
            raise ManifestError(f"upstream sent the step {header.from_version} to {header.version} after {head}")
        signed, manifest = self._read(header.manifest)
        self._compare(manifest, VERSION, header.version, header.payload_sha256, header.payload_size)
        expected = GENESIS if head == 0 else link
        if manifest.previous != expected:
            raise ManifestError(
                f"version {header.version} follows {manifest.previous[:12] or 'nothing'}, but this relay holds "
                f"{expected[:12] or 'nothing'}: upstream shows another history, or the hub was restored from a backup"
            )
        return signed.sha256

    def whole(self, header: hub_pb2.SnapshotHeader) -> str:
        """Check the header of a whole version; return the digest of the manifest to which the next one links.

        Raises:
            ManifestError: it is not signed, or its two manifests do not belong together.
        """
        _, manifest = self._read(header.manifest)
        self._compare(manifest, SNAPSHOT, header.version, header.payload_sha256, header.payload_size)
        link, version = self._read(header.version_manifest)
        if (version.kind, version.space_id, version.version) != (VERSION, self._space_id, header.version):
            raise ManifestError(f"the whole version {header.version} comes with the manifest of {version.version}")
        if manifest.previous != link.sha256:
            raise ManifestError(f"the whole version {header.version} and its manifest belong to two histories")
        return link.sha256

    def newest(self, sent: hub_pb2.Manifest) -> int:
        """Return which version the hub says is its newest.

        Raises:
            ManifestError: it is not signed, or about something else. VersionError: it is too old.
        """
        _, manifest = self._read(sent)
        check_newest(manifest, self._space_id, int(datetime.now(UTC).timestamp() * 1000))
        return manifest.version

    def _read(self, sent: hub_pb2.Manifest) -> tuple[SignedManifest, Manifest]:
        if not sent.body:
            raise ManifestError("upstream sent a version without its signed manifest: is it older than this relay?")
        signed = SignedManifest(sent.body, sent.signature)
        return signed, self._verifier.read(signed)

    def _compare(self, manifest: Manifest, kind: str, version: int, sha256: str, size: int) -> None:
        found = (manifest.kind, manifest.space_id, manifest.version, manifest.payload_sha256, manifest.payload_size)
        if found != (kind, self._space_id, version, sha256, size):
            raise ManifestError(f"the manifest of version {version} is about something else than what came with it")


def check_payload(payload: bytes, sha256: str, size: int, what: str) -> None:
    """Raise DigestError unless ``payload`` is what its header announces."""
    if len(payload) != size or hashlib.sha256(payload).hexdigest() != sha256:
        raise DigestError(f"{what}: the payload is not what its manifest says")
