"""Whose signature an update bears: checked with the certificates that were issued, and those with the authority."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from share_core.errors import CertificateError, SignatureError
from share_core.identity import check_update_signature, issued_identity, public_key_pem_of_certificate, serial_of
from share_server.store.members import key_digest
from share_server.store.records import CertificateRow, NewUpdate

VALID, INVALID, UNSIGNED = "valid", "invalid", "none"
"""What is said of a signature; ``none`` is that of an update of a store of format 2 or before."""


@dataclass(frozen=True)
class Checked:
    """What came out of checking one signature."""

    signature: str
    """:data:`VALID`, :data:`INVALID` or :data:`UNSIGNED`."""
    serial: str = ""
    """Hexadecimal serial number of the newest certificate over the key that has signed; only of a valid one."""
    problem: str = ""
    """Why it is not valid; only of an invalid one."""


class SignatureChecker:
    """Checks the signatures of one store."""

    def __init__(self, ca_cert: bytes, space_id: str, certificates: Iterable[CertificateRow]) -> None:
        """Trust those of ``certificates`` that the authority (PEM) has issued; of one key the last one counts."""
        self._ca_cert = ca_cert
        self._space_id = space_id
        self._certificates = {(row.key_sha256, row.member): row.certificate for row in certificates}
        self._refused: dict[tuple[str, str], str] = {}
        for owner, certificate in self._certificates.items():
            if problem := self._problem(*owner, certificate):
                self._refused[owner] = problem

    def check(self, new: NewUpdate) -> Checked:
        """Check the signature of one update."""
        if not new.signature and not new.signer and not new.sequence:
            return Checked(UNSIGNED)
        owner = (new.signer, new.member)
        certificate = self._certificates.get(owner)
        if certificate is None:
            return Checked(INVALID, problem=f"no certificate over the key {new.signer[:12]} was issued to {new.member}")
        if problem := self._refused.get(owner):
            return Checked(INVALID, problem=problem)
        try:
            check_update_signature(certificate, new.statement(self._space_id), new.signature)
        except SignatureError as error:
            return Checked(INVALID, problem=str(error))
        return Checked(VALID, serial=serial_of(certificate))

    def _problem(self, key_sha256: str, member: str, certificate: bytes) -> str:
        """Return why a certificate proves nothing about its member; empty if it does."""
        try:
            named = issued_identity(self._ca_cert, certificate).member
            digest = key_digest(public_key_pem_of_certificate(certificate))
        except CertificateError as error:
            return f"the certificate of {member}: {error}"
        if (named, digest) != (member, key_sha256):
            return f"the certificate of {member} over the key {key_sha256[:12]} is one of {named} over {digest[:12]}"
        return ""
