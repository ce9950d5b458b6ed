"""The name a certificate carries: ``share://<role>/<organisation>/<name>``."""

from __future__ import annotations

from dataclasses import dataclass

from share_core.errors import CertificateError, TaskNameError
from share_core.names import check_name

ROLES = frozenset({"trainer", "contributor", "reader", "relay", "operator", "fleet", "hub", "signer"})
"""Every role a certificate may name.

``trainer`` trains under leases, ``contributor`` submits finished adapters, ``reader`` only follows, ``relay`` follows
and serves what it got to others; ``operator`` and ``fleet`` are the server's own tools; ``hub`` is the listener itself
and ``signer`` the key that signs manifests; neither is ever accepted as a caller.
"""

_SCHEME = "share://"


@dataclass(frozen=True)
class Identity:
    """One holder of a certificate."""

    role: str
    """One of :data:`ROLES`."""
    organisation: str
    """The organisation that answers for it. Tasks belong to organisations."""
    name: str
    """Name inside the organisation."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise CertificateError(f"role {self.role[:80]!r} is not one of {', '.join(sorted(ROLES))}")
        try:
            check_name(self.organisation, "organisation")
            check_name(self.name, "member name")
        except TaskNameError as error:
            raise CertificateError(str(error)) from error

    @property
    def member(self) -> str:
        """``organisation/name``, the id of a member."""
        return f"{self.organisation}/{self.name}"

    @property
    def uri(self) -> str:
        """The URI that stands in the certificate."""
        return f"{_SCHEME}{self.role}/{self.member}"


def parse_identity_uri(uri: str) -> Identity:
    """Return the identity written in ``uri``; the exact inverse of :attr:`Identity.uri`.

    Raises:
        CertificateError: if it is not ``share://<role>/<organisation>/<name>`` letter for letter.
    """
    parts = uri.removeprefix(_SCHEME).split("/")
    if not uri.startswith(_SCHEME) or len(parts) != 3:
        raise CertificateError(f"name {uri[:200]!r} is not of the form share://role/organisation/name")
    return Identity(*parts)
