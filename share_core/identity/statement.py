"""What a client signs: everything that it says of one update, and nothing else.

Signed are the bytes of a list of fields, each preceded by its length as eight big-endian bytes, so that no two lists
give the same bytes. In this order, numbers in decimal ASCII, yes and no as ``1`` and ``0``, text in UTF-8::

    fedshare update 1      the domain: no signature over anything else begins like this
    space_id  task_id  update_id  member  sequence
    payload_sha256  payload_size
    create  open  number of organisations  each organisation, sorted and once
    schema_sha256  rows  lease_id  privacy

``member`` is the name in the signer's certificate; the version the update is based on stands in the payload, and the
payload's digest covers it. Where the chunks of an upload begin is not signed: it changes with every connection.

The signature is ECDSA over P-256 with SHA-256 (FIPS 186-5), DER encoded, by the key of the member's certificate. From
such a signature anybody can compute a second one of the same statement, so nothing may depend on the bytes of a
signature: what makes an update unique are its id, and its signer together with its sequence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from share_core.errors import CertificateError, SignatureError
from share_core.identity.authority import public_key_pem_of_certificate, sign_bytes

MOST_SEQUENCE = 2**63 - 1
"""The largest sequence: what a signed 64-bit number holds."""

_DOMAIN = "fedshare update 1"
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True)
class UpdateStatement:
    """Everything that a client says of one update."""

    space_id: str
    """The space it was trained in."""
    task_id: str
    """``organisation/name``."""
    update_id: str
    """32 hexadecimal digits."""
    member: str
    """``organisation/name`` of the signer's certificate."""
    sequence: int
    """The signer's own count of what it has signed, from 1."""
    payload_sha256: str
    """Hexadecimal digest of the payload."""
    payload_size: int
    """Bytes of the payload."""
    create: bool = False
    """Whether it may make its task."""
    open: bool = False
    """Whether everybody may contribute to the task that it makes."""
    organisations: tuple[str, ...] = ()
    """Who else may contribute to the task that it makes; sorted, each once."""
    schema_sha256: str = ""
    """Hexadecimal digest of the task's label schema; empty if it is not told."""
    rows: int = 0
    """Declared training rows; 0 says nothing."""
    lease_id: str = ""
    """Lease under which it was trained; empty outside a lease."""
    privacy: str = ""
    """What it declares of clipping and noise, as canonical JSON; empty if nothing."""

    def to_bytes(self) -> bytes:
        """Return what is signed."""
        fields = (
            _DOMAIN,
            self.space_id,
            self.task_id,
            self.update_id,
            self.member,
            str(self.sequence),
            self.payload_sha256,
            str(self.payload_size),
            str(int(self.create)),
            str(int(self.open)),
            str(len(self.organisations)),
            *self.organisations,
            self.schema_sha256,
            str(self.rows),
            self.lease_id,
            self.privacy,
        )
        encoded = [field.encode() for field in fields]
        return b"".join(len(field).to_bytes(8, "big") + field for field in encoded)


class Sharing(Protocol):
    """The part of a header that opens a task to others."""

    open: bool

    @property
    def organisations(self) -> Collection[str]:
        """Who else may contribute."""


class Header(Protocol):
    """What a header of a Submit call says; ``SubmitHeader`` of ``hub.proto`` does."""

    update_id: str
    space_id: str
    task_id: str
    create: bool
    payload_size: int
    payload_sha256: str
    lease_id: str
    rows: int
    schema_sha256: str
    sequence: int
    privacy: str

    @property
    def sharing(self) -> Sharing:
        """Who may contribute to the task that it makes."""


def statement_of(header: Header, member: str) -> UpdateStatement:
    """Return the statement of a header that ``member`` sends: for who signs it and for who checks it."""
    return UpdateStatement(
        space_id=header.space_id,
        task_id=header.task_id,
        update_id=header.update_id,
        member=member,
        sequence=header.sequence,
        payload_sha256=header.payload_sha256,
        payload_size=header.payload_size,
        create=header.create,
        open=header.sharing.open,
        organisations=tuple(sorted(set(header.sharing.organisations))),
        schema_sha256=header.schema_sha256,
        rows=header.rows,
        lease_id=header.lease_id,
        privacy=header.privacy,
    )


def sign_update(key_pem: bytes, statement: UpdateStatement) -> bytes:
    """Return the signature of a statement, DER.

    Args:
        key_pem: the private key of the member's certificate, EC P-256, PEM.
        statement: what is signed.

    Raises:
        CertificateError: the key cannot be read or is of another kind.
        SignatureError: the sequence is not from 1 to :data:`MOST_SEQUENCE`.
    """
    check_sequence(statement.sequence)
    return sign_bytes(key_pem, statement.to_bytes())


def check_update_signature(signer: bytes, statement: UpdateStatement, signature: bytes) -> None:
    """Check that the holder of a key has signed a statement.

    Args:
        signer: certificate (PEM or DER) or public key (PEM) of the member.
        statement: what it is said to have signed.
        signature: the signature, DER.

    Raises:
        SignatureError: it is not signed, or not by this key, or says something else than what was signed.
    """
    check_sequence(statement.sequence)
    if not signature:
        raise SignatureError(
            f"update {statement.update_id} is not signed: every update is signed with the key of its sender's "
            "certificate; use a client of this release"
        )
    try:
        _public_key(signer).verify(signature, statement.to_bytes(), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise SignatureError(
            f"update {statement.update_id}: the signature is not one of {statement.member} over this header: it was "
            "changed on the way, or signed with another key than that of the certificate; sign it anew"
        ) from None
    except CertificateError as error:
        raise SignatureError(f"update {statement.update_id}: no signature of {statement.member}: {error}") from error


def check_sequence(sequence: int) -> None:
    """Raise SignatureError unless ``sequence`` is from 1 to :data:`MOST_SEQUENCE`."""
    if not 1 <= sequence <= MOST_SEQUENCE:
        raise SignatureError(
            f"sequence must be from 1 to {MOST_SEQUENCE}, got {sequence}: count what you sign, beginning with 1"
        )


@lru_cache(maxsize=4096)
def _public_key(signer: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key; reading it takes as long as a check, and a signer comes again."""
    is_key = signer.lstrip().startswith(b"-----") and not signer.lstrip().startswith(_CERTIFICATE)
    pem = signer if is_key else public_key_pem_of_certificate(signer)
    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError as error:
        raise CertificateError(f"public key cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateError(f"public key is a {type(key).__name__}, expected EC P-256")
    return key
