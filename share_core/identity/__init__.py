"""Who is who: member names, the federation's certificate authority, and join tokens.

Everything here is pure: the clock is passed in as an aware ``datetime``, keys and certificates are PEM bytes,
and nothing touches a disk or a socket.
"""

from share_core.identity.approval import approve_adapter, check_approval
from share_core.identity.authority import (
    certificate_fingerprint,
    certificate_to_der,
    certificate_to_pem,
    check_validity,
    identity_of,
    issued_identity,
    make_authority,
    make_csr,
    make_signer,
    new_private_key_pem,
    not_after,
    public_key_pem,
    public_key_pem_of_certificate,
    reissue,
    renewal_moment,
    serial_of,
    sign_csr,
    verified_signer_key,
)
from share_core.identity.manifest import Manifest, ManifestVerifier, SignedManifest, parse_manifest, sign_manifest
from share_core.identity.names import ROLES, Identity, parse_identity_uri
from share_core.identity.statement import UpdateStatement, check_update_signature, sign_update, statement_of
from share_core.identity.token import TOKEN_PREFIX, JoinToken, check_token, check_token_key, token_decode, token_encode

__all__ = [
    "ROLES",
    "TOKEN_PREFIX",
    "Identity",
    "JoinToken",
    "Manifest",
    "ManifestVerifier",
    "SignedManifest",
    "UpdateStatement",
    "approve_adapter",
    "certificate_fingerprint",
    "certificate_to_der",
    "certificate_to_pem",
    "check_approval",
    "check_token",
    "check_token_key",
    "check_update_signature",
    "check_validity",
    "identity_of",
    "issued_identity",
    "make_authority",
    "make_csr",
    "make_signer",
    "new_private_key_pem",
    "not_after",
    "parse_identity_uri",
    "parse_manifest",
    "public_key_pem",
    "public_key_pem_of_certificate",
    "reissue",
    "renewal_moment",
    "serial_of",
    "sign_csr",
    "sign_manifest",
    "sign_update",
    "statement_of",
    "token_decode",
    "token_encode",
    "verified_signer_key",
]
