"""The operator's approval of one adapter whose backbone nobody could compare.

Who contributes an adapter shows the backbone, and its fingerprints decide. Where the backbone is not at hand, the
operator may vouch for the adapter instead: with the hub's signing key, for one space and one adapter, named by the
SHA-256 of its factors (:func:`share_core.wire.encode_adapter`). The text is ``fa1.`` and the signature in URL-safe
base64. Signed are the bytes ``"fedshare approval 1" NUL space id NUL hexadecimal SHA-256``, by Ed25519.
"""

from __future__ import annotations

import base64
import re
from datetime import datetime

from cryptography.exceptions import InvalidSignature

from share_core.errors import RequestError, SignatureError
from share_core.identity.authority import check_validity, verified_signer_key
from share_core.identity.manifest import load_signing_key

PREFIX = "fa1."
_SHA256 = re.compile(r"[0-9a-f]{64}")


def approve_adapter(signing_key: bytes, space_id: str, adapter_sha256: str) -> str:
    """Return the approval of one adapter for one space.

    Args:
        signing_key: the hub's signing key, PEM.
        space_id: ``sha256:<hex>``.
        adapter_sha256: hexadecimal digest of the adapter, as ``share-client contribute`` tells it.

    Raises:
        RequestError: the digest is none.
        CertificateError: the key is no Ed25519 key.
    """
    if not _SHA256.fullmatch(adapter_sha256):
        raise RequestError(
            f"the adapter's SHA-256 has 64 hexadecimal digits in lower case, got {adapter_sha256[:80]!r}: copy what "
            "share-client contribute printed"
        )
    signature = load_signing_key(signing_key).sign(_signed_bytes(space_id, adapter_sha256))
    return PREFIX + base64.urlsafe_b64encode(signature).decode("ascii").rstrip("=")


def check_approval(
    text: str, space_id: str, adapter_sha256: str, authority: bytes, signer_certificate: bytes, now: datetime
) -> None:
    """Check that the hub's operator has approved this adapter for this space.

    Args:
        text: what :func:`approve_adapter` gave.
        space_id: the space.
        adapter_sha256: hexadecimal digest of the adapter.
        authority: the federation's authority, PEM.
        signer_certificate: certificate of the hub's signing key, PEM.
        now: the moment, for the certificate's validity.

    Raises:
        SignatureError: it is no approval, or one of another adapter, space or hub.
        CertificateError: the certificate is not the authority's, or not valid now.
    """
    key = verified_signer_key(authority, signer_certificate)
    check_validity(signer_certificate, now)
    body = text.strip().removeprefix(PREFIX)
    try:
        signature = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        key.verify(signature, _signed_bytes(space_id, adapter_sha256))
    except (InvalidSignature, ValueError):
        raise SignatureError(
            f"the approval is not the operator's for the adapter with SHA-256 {adapter_sha256} in space {space_id}: "
            "ask for one of this adapter: share-server approve DIR SHA256"
        ) from None


def _signed_bytes(space_id: str, adapter_sha256: str) -> bytes:
    return b"\0".join((b"fedshare approval 1", space_id.encode(), adapter_sha256.encode()))
