"""Manifests of versions: of steps, of whole versions, and of those that were made before versions were signed."""

from __future__ import annotations

from share_core.identity import Manifest, SignedManifest, sign_manifest
from share_core.identity.manifest import GENESIS, HEAD, NEWEST, SNAPSHOT, VERSION
from share_server.hub.clock import now_ms
from share_server.hub.policy import StepPolicy
from share_server.store.journal import Journal
from share_server.store.records import VersionRow
from share_server.store.versions import head_version, list_versions, read_manifest, record_manifests

_PAGE = 500


def sign_version(
    key: bytes, space_id: str, version: int, delta: tuple[str, int], previous: SignedManifest | None
) -> SignedManifest:
    """Return the signed manifest of one version.

    Args:
        key: Ed25519 private key, PEM.
        space_id: the space.
        version: the version.
        delta: (digest, bytes) of its step; ("", 0) for a version that is only published whole.
        previous: manifest of the version before; None before version 1.
    """
    link = GENESIS if previous is None else previous.sha256
    return sign_manifest(key, Manifest(VERSION, space_id, version, link, *delta, now_ms()))


def sign_whole(
    key: bytes, space_id: str, version: int, snapshot: tuple[str, int], own: SignedManifest | None
) -> SignedManifest:
    """Return the signed manifest of one version as a snapshot; it names the manifest of the version itself.

    Args:
        key: Ed25519 private key, PEM.
        space_id: the space.
        version: the version.
        snapshot: (digest, bytes) of its payload.
        own: manifest of the version.
    """
    link = "" if own is None else own.sha256
    return sign_manifest(key, Manifest(SNAPSHOT, space_id, version, link, *snapshot, now_ms()))


def sign_head(
    key: bytes, space_id: str, version: int, head: tuple[str, int], own: SignedManifest | None
) -> SignedManifest:
    """Return the signed manifest of a shared head as :func:`sign_whole` does; ``head`` is its digest and bytes."""
    link = "" if own is None else own.sha256
    return sign_manifest(key, Manifest(HEAD, space_id, version, link, *head, now_ms()))


def sign_newest(key: bytes, space_id: str, version: int, own: SignedManifest | None) -> SignedManifest:
    """Return the signed statement that a version is the newest now.

    Args:
        key: Ed25519 private key, PEM.
        space_id: the space.
        version: the version.
        own: manifest of the version; None for version 0.
    """
    link = GENESIS if own is None else own.sha256
    return sign_manifest(key, Manifest(NEWEST, space_id, version, link, "", 0, now_ms()))


def sign_unsigned(journal: Journal, key: bytes, space_id: str, policy: StepPolicy) -> int:
    """Sign the versions of format 1, which had no manifests; return how many there were.

    Without that no member could follow them. They did not record their policy either: the one in force now is written
    down with the signatures, for the limits of the space may change later. They are signed from version 1 on, as many
    in a transaction as are read at once, so that a start that is cut short goes on where it was.
    """
    signed = 0
    head = head_version(journal)
    while rows := _unsigned(journal, head):
        previous = read_manifest(journal, rows[0].version - 1)
        made: dict[int, SignedManifest] = {}
        for row in rows:
            previous = sign_version(key, space_id, row.version, (row.delta_sha256, row.delta_size), previous)
            made[row.version] = previous
        record_manifests(journal, made, policy.to_text())
        signed += len(made)
    return signed


def _unsigned(journal: Journal, head: int) -> list[VersionRow]:
    row = journal.row("SELECT min(version) FROM versions WHERE manifest = x''")
    if row is None or row[0] is None:
        return []
    return list_versions(journal, row[0] - 1, min(head, row[0] - 1 + _PAGE))
