"""The chain of signed manifests: what arrives is what the hub published, and one history is never mixed with another.

Every version comes with a manifest that the hub has signed and that names the manifest before it. Held are the SHA-256
of the manifest bodies from the version in the cache to the newest one seen; they lie beside the cached space, so that a
restart goes on where it was. A relay, or a hub that fell into other hands or was restored from an old copy, is noticed
at the first version that is forged, exchanged, left out or does not follow.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from share_client.durable import to_json
from share_client.link import SpaceDescription
from share_client.member import Credentials
from share_core.durable import write_atomic
from share_core.errors import ConfigError, ManifestError, VersionError
from share_core.identity import Manifest, ManifestVerifier, SignedManifest
from share_core.identity.manifest import GENESIS, HEAD, SNAPSHOT, VERSION, check_newest
from share_proto.v1 import hub_pb2

_SAVE_EVERY = 100
"""Versions after which the chain is written while catching up; at the newest version it is written at once."""

_ASK = "ask the operator; do not remove the client's cache directory before it is explained"


class ManifestChain:
    """Checks manifests and remembers them. Safe to use from several threads.

    Without a verifier the hub signs nothing and nothing is checked; that is an error once it has signed something.
    """

    def __init__(self, verifier: ManifestVerifier | None, space_id: str, path: Path | None = None) -> None:
        """Go on with what ``path`` holds; None keeps nothing.

        Raises:
            ConfigError: the file cannot be read.
            ManifestError: it tells of signed versions, and now there is no verifier.
        """
        self._verifier = verifier
        self._space_id = space_id
        self._path = path
        self._lock = threading.Lock()
        self._held, self._highest = _load(path) if path is not None else ({}, 0)
        self._cached = min(self._held, default=0)
        self._unsaved = 0
        if verifier is None and self._held:
            raise ManifestError(
                f"this client holds signed versions up to {self._highest}, and now the hub says that it signs none: "
                f"perhaps it is another hub; {_ASK}"
            )

    @property
    def space_id(self) -> str:
        """The space that the chain is about."""
        return self._space_id

    @property
    def verifies(self) -> bool:
        """Whether the hub signs what it publishes."""
        return self._verifier is not None

    @property
    def highest(self) -> int:
        """The highest version ever verified; 0 for none."""
        return self._highest

    def check_newest(self, version: int) -> None:
        """Refuse a hub whose newest version is older than one that was verified here.

        Raises:
            VersionError: it went back.
        """
        if version < self._highest:
            raise VersionError(
                f"the hub is at version {version} and this client has verified {self._highest}: the hub went back, "
                f"perhaps it was restored from a backup; {_ASK}"
            )

    def check_heartbeat(self, sent: hub_pb2.Manifest, now: datetime) -> int:
        """Check what the hub says of its newest version; return that version, 0 if the hub signs nothing.

        Raises:
            ManifestError: it is forged, about something else, or of another history.
            VersionError: it is too old, or older than what was verified here: versions are held back, or the hub went
                back. A relay that lags behind is no liar.
        """
        if self._verifier is None:
            return 0
        what = "the hub's statement of its newest version"
        try:
            manifest = self._verifier.read(SignedManifest(sent.body, sent.signature))
            check_newest(manifest, self._space_id, int(now.timestamp() * 1000))
        except (ManifestError, VersionError) as error:
            raise type(error)(f"{what}: {error}; {_ASK}") from error
        with self._lock:
            self.check_newest(manifest.version)
            self._same(manifest.version, manifest.previous)
        return manifest.version

    def check_delta(self, header: hub_pb2.DeltaHeader) -> str:
        """Check the manifest of a step before its payload is read; return the SHA-256 of its body, "" if unsigned.

        Raises:
            ManifestError: it is missing, forged, about something else, or does not continue what is held.
        """
        if self._verifier is None:
            return ""
        what = f"version {header.version}"
        signed, manifest = self._read(header, "manifest", what)
        _compare(what, manifest, VERSION, self._space_id, header)
        with self._lock:
            before = GENESIS if header.version == 1 else self._held.get(header.version - 1)
            if before is not None and manifest.previous != before:
                raise ManifestError(
                    f"{what} does not continue the version {header.version - 1} that this client holds: it follows "
                    f"{_short(manifest.previous)}, held is {_short(before)}; somebody mixes two histories (a relay?), "
                    f"or the hub was restored from a backup; {_ASK}"
                )
            self._same(header.version, signed.sha256)
        return signed.sha256

    def check_snapshot(self, header: hub_pb2.SnapshotHeader) -> str:
        """Check both manifests of a whole version before its payload is read; return what the next one links to.

        Raises:
            ManifestError: one is missing or forged, or they are about something else.
            VersionError: the version is older than one verified before; a relay that lags behind is no liar.
        """
        if self._verifier is None:
            return ""
        what = f"the snapshot of version {header.version}"
        _, manifest = self._read(header, "manifest", what)
        _compare(what, manifest, SNAPSHOT, self._space_id, header)
        version, link = self._read(header, "version_manifest", what)
        if (link.kind, link.space_id, link.version) != (VERSION, self._space_id, header.version):
            raise ManifestError(
                f"{what} comes with the manifest of {link.kind} {link.version} of {link.space_id}: somebody on the way "
                f"(a relay?) exchanged it; {_ASK}"
            )
        if manifest.previous != version.sha256:
            raise ManifestError(f"{what} and its version manifest belong to two histories: do not trust it; {_ASK}")
        with self._lock:
            if header.version < self._highest:
                raise VersionError(
                    f"{what} is older than version {self._highest}, which this client has verified: a relay lags "
                    f"behind or holds versions back, or the hub was restored from a backup; {_ASK}"
                )
            self._same(header.version, version.sha256)
        return version.sha256

    def check_head(self, header: hub_pb2.HeadHeader, version: int) -> None:
        """Check the manifest of a shared head in ``version`` before its payload is read.

        Raises:
            ManifestError: it is missing, forged, about something else, or of another history.
        """
        if self._verifier is None:
            return
        what = f"the shared head of version {version}"
        _, manifest = self._read(header, "manifest", what)
        _compare(what, manifest, HEAD, self._space_id, header)
        if manifest.version != version:
            raise ManifestError(f"{what} comes with the manifest of version {manifest.version}; {_ASK}")
        with self._lock:
            self._same(version, manifest.previous)

    def take(self, version: int, sha256: str, newest: int) -> None:
        """Hold what a check returned, once the payload has arrived as announced; write it if it is the newest."""
        if not sha256:
            return
        with self._lock:
            self._held[version] = sha256
            self._highest = max(self._highest, version)
            self._unsaved += 1
            if version >= newest or self._unsaved >= _SAVE_EVERY:
                self._save()

    def before_cached(self, version: int) -> None:
        """Forget what lies before the version in the cache and make the rest durable; ``version`` takes its place next.

        The older one is still held: a crash between the two writes leaves a cache that the chain knows, either way.
        """
        with self._lock:
            if not self._held:
                return
            self._held = {held: sha256 for held, sha256 in self._held.items() if held >= self._cached}
            self._save()
            self._cached = version

    def _save(self) -> None:
        if self._path is not None:
            held = {str(version): self._held[version] for version in sorted(self._held)}
            write_atomic(self._path, to_json({"highest": self._highest, "held": held}))
        self._unsaved = 0

    def _read(
        self, header: hub_pb2.DeltaHeader | hub_pb2.SnapshotHeader | hub_pb2.HeadHeader, field: str, what: str
    ) -> tuple[SignedManifest, Manifest]:
        assert self._verifier is not None
        if not header.HasField(field):
            raise ManifestError(
                f"{what} came without its signed manifest, and the hub signs every version: somebody on the way "
                f"(a relay?) has removed it; {_ASK}"
            )
        sent: hub_pb2.Manifest = getattr(header, field)
        signed = SignedManifest(sent.body, sent.signature)
        try:
            return signed, self._verifier.read(signed)
        except ManifestError as error:
            raise ManifestError(f"{what}: {error}; {_ASK}") from error

    def _same(self, version: int, sha256: str) -> None:
        """A version that was verified before must be the same one."""
        held = self._held.get(version)
        if held is not None and held != sha256:
            raise ManifestError(
                f"version {version} has the manifest {_short(sha256)}, and this client has verified {_short(held)} "
                f"before: the hub shows different histories, or was restored from a backup; {_ASK}"
            )


def open_chain(
    description: SpaceDescription, credentials: Credentials, path: Path | None, now: datetime
) -> ManifestChain:
    """Return the chain for a hub's space, continuing the one in ``path``.

    Raises:
        CertificateError: the hub's signing certificate is not one of this federation's authority.
        VersionError: the hub is at an older version than one verified before.
        ConfigError, ManifestError: as :class:`ManifestChain`.
    """
    verifier = None
    if description.signer_certificate:
        verifier = ManifestVerifier(credentials.authority, description.signer_certificate, now)
    chain = ManifestChain(verifier, description.spec.space_id, path)
    chain.check_newest(description.version)
    return chain


def _compare(
    what: str,
    manifest: Manifest,
    kind: str,
    space_id: str,
    header: hub_pb2.DeltaHeader | hub_pb2.SnapshotHeader | hub_pb2.HeadHeader,
) -> None:
    expected: Mapping[str, Any] = {
        "kind": kind,
        "space_id": space_id,
        "version": header.version,
        "payload_sha256": header.payload_sha256,
        "payload_size": header.payload_size,
    }
    for name, value in expected.items():
        found = getattr(manifest, name)
        if found != value:
            raise ManifestError(
                f"{what} comes with a manifest whose {name} is {found!r}, not {value!r}: somebody on the way (a "
                f"relay?) exchanged one of them; {_ASK}"
            )


def _short(sha256: str) -> str:
    return f"{sha256[:12]}..." if sha256 else "nothing"


def _load(path: Path) -> tuple[dict[int, str], int]:
    if not path.exists():
        return {}, 0
    try:
        document = json.loads(path.read_bytes())
        held = {int(version): str(sha256) for version, sha256 in document["held"].items()}
        return held, max(int(document["highest"]), *held, 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}): the disk may be failing; remove the directory {path.parent} to fetch "
            "the space anew"
        ) from error
