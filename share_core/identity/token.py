"""Join tokens: one line of text that lets one machine enrol once.

Form: ``fs1.`` followed by base64url (without padding) of a compact ASCII JSON object with exactly the keys
``address``, ``ca`` (hexadecimal SHA-256 of the authority's DER), ``organisation``, ``name``, ``role``,
``expires`` (seconds since 1970), ``nonce`` (32 hexadecimal digits) and ``mac`` (64 of them). The token of a relay may
also have ``hosts``: the names and addresses, at least one, under which it may serve.

``mac`` is HMAC-SHA256 under the server's enrolment key over ``fedshare join token 1`` and the other fields in that
order, each of ``hosts`` as a field of its own at the end, each preceded by its length as eight big-endian bytes: no two
field lists give the same bytes. Nothing is written down when a token is made; the hub remembers the nonces it has seen.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from share_core.errors import CertificateError, ConfigError, TokenError
from share_core.identity.names import Identity

TOKEN_PREFIX = "fs1."
"""Every token of this form begins with it."""

KEY_BYTES = 32
"""Length of the server's enrolment key: nobody guesses a token without it."""

_DOMAIN = "fedshare join token 1"
_LAST_SECOND = 253_402_300_799  # of the year 9999, the last that a date can name
_LONGEST = 2048
_HEX_64 = re.compile(r"[0-9a-f]{64}")
_HEX_32 = re.compile(r"[0-9a-f]{32}")
_MOST_HOSTS = 8
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}|[0-9A-Fa-f:.]{2,45}")
_ADDRESS = re.compile(r"[!-~]{1,255}:[0-9]{1,5}")


@dataclass(frozen=True)
class JoinToken:
    """What a join token says."""

    address: str
    """``host:port`` of the enrolment listener."""
    ca_sha256: str
    """Hexadecimal SHA-256 of the authority's DER: whom to trust."""
    organisation: str
    """Organisation the new member belongs to."""
    name: str
    """Its name inside the organisation."""
    role: str
    """Its role."""
    expires: int
    """Seconds since 1970 after which the token is refused."""
    nonce: str
    """32 hexadecimal digits that make the token work only once."""
    mac: str
    """Hexadecimal HMAC-SHA256 of all other fields."""
    hosts: tuple[str, ...] = ()
    """Names and addresses under which a relay may serve; empty for every other role."""

    @property
    def identity(self) -> Identity:
        """The identity that the certificate will carry."""
        return Identity(self.role, self.organisation, self.name)


def token_encode(
    key: bytes,
    address: str,
    ca_sha256: str,
    identity: Identity,
    expires: datetime,
    nonce: str,
    hosts: tuple[str, ...] = (),
) -> str:
    """Return a join token for ``identity``.

    Args:
        key: the server's enrolment key, 32 random bytes.
        address: ``host:port`` of the enrolment listener.
        ca_sha256: fingerprint of the authority.
        identity: whom the certificate will name.
        expires: aware moment after which the token is refused.
        nonce: 32 random hexadecimal digits, never used before.
        hosts: names and addresses under which a relay may serve; only for role ``relay``.

    Raises:
        TokenError: one of these cannot stand in a token. ConfigError: the key is none.
    """
    seconds = int(expires.timestamp())
    unsigned = JoinToken(
        address, ca_sha256, identity.organisation, identity.name, identity.role, seconds, nonce, "", hosts
    )
    _check_fields(unsigned)
    fields: dict[str, object] = {
        "address": address,
        "ca": ca_sha256,
        "organisation": identity.organisation,
        "name": identity.name,
        "role": identity.role,
        "expires": seconds,
        "nonce": nonce,
        "mac": _mac(key, unsigned),
    }
    if hosts:
        fields["hosts"] = list(hosts)
    packed = json.dumps(fields, separators=(",", ":")).encode("ascii")
    return TOKEN_PREFIX + base64.urlsafe_b64encode(packed).rstrip(b"=").decode("ascii")


def token_decode(text: str) -> JoinToken:
    """Return what ``text`` says, whoever wrote it: a client has no key to check it with.

    Raises:
        TokenError: if it does not have the form of a token.
    """
    text = text.strip()
    if not text.startswith(TOKEN_PREFIX):
        raise TokenError(f"this is no join token: expected one line beginning with {TOKEN_PREFIX!r}")
    if len(text) > _LONGEST:
        raise TokenError(f"join token has {len(text)} characters, at most {_LONGEST} are allowed")
    body = text[len(TOKEN_PREFIX) :]
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        fields = json.loads(raw.decode("ascii"))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise TokenError("join token is damaged: copy the whole line that share-server invite printed") from error
    expected = {
        "address": str,
        "ca": str,
        "organisation": str,
        "name": str,
        "role": str,
        "expires": int,
        "nonce": str,
    }
    expected["mac"] = str
    if isinstance(fields, dict) and "hosts" in fields:
        expected["hosts"] = list
    if (
        not isinstance(fields, dict)
        or set(fields) != set(expected)
        or any(type(fields[key]) is not kind for key, kind in expected.items())
    ):
        raise TokenError("join token is damaged: its fields are not those of a token")
    token = JoinToken(
        address=fields["address"],
        ca_sha256=fields["ca"],
        organisation=fields["organisation"],
        name=fields["name"],
        role=fields["role"],
        expires=fields["expires"],
        nonce=fields["nonce"],
        mac=fields["mac"],
        hosts=_hosts(fields),
    )
    _check_fields(token)
    if not _HEX_64.fullmatch(token.mac):
        raise TokenError("join token is damaged: its mac is not 64 hexadecimal digits")
    return token


def check_token(text: str, key: bytes, now: datetime) -> JoinToken:
    """Return what ``text`` says after checking that this server made it and that it is not expired.

    Whether it was used before is for the caller to check, in the same transaction that marks it used.

    Raises:
        TokenError: if it is damaged, forged or expired. ConfigError: the key is none.
    """
    token = token_decode(text)
    if not hmac.compare_digest(_mac(key, token), token.mac):
        raise TokenError("join token was not made by this server")
    if now.timestamp() > token.expires:
        raise TokenError(f"join token for {token.organisation}/{token.name} is expired: ask the operator for a new one")
    return token


def check_token_key(key: bytes) -> None:
    """Refuse what is no enrolment key, such as the beginning of one: tokens under a short key can be guessed.

    Raises:
        ConfigError: it does not have :data:`KEY_BYTES` bytes.
    """
    if len(key) != KEY_BYTES:
        raise ConfigError(f"the enrolment key has {len(key)} bytes, expected {KEY_BYTES}: restore it from a backup")


def _hosts(fields: dict[str, Any]) -> tuple[str, ...]:
    """Return ``hosts``; when the field is there it must hold something, so that a token has one form only."""
    hosts = fields.get("hosts", ())
    if "hosts" in fields and not (hosts and all(isinstance(host, str) for host in hosts)):
        raise TokenError("join token is damaged: its hosts are not a list of names")
    return tuple(hosts)


def _check_fields(token: JoinToken) -> None:
    if not _ADDRESS.fullmatch(token.address):
        raise TokenError(f"join token names no usable address: {token.address[:80]!r} is not host:port")
    if not _HEX_64.fullmatch(token.ca_sha256):
        raise TokenError("join token is damaged: its fingerprint is not 64 hexadecimal digits")
    if not 0 <= token.expires <= _LAST_SECOND:
        raise TokenError("join token is damaged: it expires at no date")
    if not _HEX_32.fullmatch(token.nonce):
        raise TokenError("join token is damaged: its nonce is not 32 hexadecimal digits")
    if token.hosts and token.role != "relay":
        raise TokenError(f"join token gives hosts to a {token.role}: only a relay serves others")
    if len(token.hosts) > _MOST_HOSTS or not all(_HOST.fullmatch(host) for host in token.hosts):
        raise TokenError(
            f"join token: expected at most {_MOST_HOSTS} host names or addresses, got {token.hosts!r:.200}"
        )
    try:
        _ = token.identity
    except CertificateError as error:
        raise TokenError(f"join token names nobody: {error}") from error


def _mac(key: bytes, token: JoinToken) -> str:
    check_token_key(key)
    parts = (
        _DOMAIN,
        token.address,
        token.ca_sha256,
        token.organisation,
        token.name,
        token.role,
        str(token.expires),
        token.nonce,
        *token.hosts,
    )
    message = b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
    return hmac.new(key, message, hashlib.sha256).hexdigest()
