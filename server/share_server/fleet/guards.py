"""What the gateway demands of a request, one function per demand.

Each guard returns None or the refusal. The codes are an interface towards Flower's SuperNode, which reads them so:
401 stops it for good; 503 has it try again for ever; 413, 404, 405 and 400 have it give up that call; 403 it would
take for "the run has ended" and 429 would end its heartbeat, so neither is ever used. Bodies of refusals avoid the
words by which the SuperNode recognises a broken transport.

Order of the checks: path, method, framing, size, identity, enrolment, certificate, key, and for pushed messages their
source.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError

from share_core.identity import Identity
from share_server.fleet.hub_link import EnrolledNode
from share_server.fleet.node_table import canonical_key

Headers = Sequence[tuple[bytes, bytes]]

SMALL = 64 * 2**10
"""Body limit of calls that carry a few ids, in bytes."""

PUSH_MESSAGES = b"/v1/fleet/push-messages"

ROUTES: Mapping[bytes, int] = {
    b"/v1/fleet/activate-node": SMALL,
    b"/v1/fleet/deactivate-node": SMALL,
    b"/v1/fleet/send-node-heartbeat": SMALL,
    b"/v1/fleet/pull-messages": SMALL,
    PUSH_MESSAGES: 4 * 2**20,
    b"/v1/fleet/get-run": SMALL,
    b"/v1/fleet/get-fab": SMALL,
    b"/v1/fleet/push-object": 8 * 2**20,  # Flower cuts arrays into 5 MiB chunks
    b"/v1/fleet/pull-object": SMALL,
    b"/v1/fleet/confirm-message-received": SMALL,
}
"""Everything that is published, letter for letter, with the largest body in bytes."""

KEY_HEADER = b"flwr-public-key"

PASSED_UP = frozenset(
    {
        b"content-type",
        b"content-length",
        b"accept",
        KEY_HEADER,
        b"flwr-timestamp",
        b"flwr-signature",
        b"flwr-package-name",
        b"flwr-package-version",
        b"flwr-component-name",
    }
)
"""Request headers that reach the SuperLink. Each may stand there once."""

PASSED_DOWN = frozenset({b"content-type", b"content-length", b"flwr-version-incompatibility-message"})
"""Response headers that reach the node."""


@dataclass(frozen=True)
class Peer:
    """Who holds the other end of the connection."""

    identity: Identity | None
    """From the certificate; None if it names nobody of ours."""
    key_sha256: str
    """SHA-256 of the PEM of the certificate's public key; empty without identity."""
    not_before: datetime
    """First moment of the certificate."""
    not_after: datetime
    """Last moment of the certificate."""
    renew_at: datetime
    """When the certificate is due to be renewed."""


@dataclass(frozen=True)
class Refusal:
    """How a request is turned away."""

    status: int
    """HTTP status."""
    reason: str
    """One short sentence; no words about the transport."""


def check_path(raw_path: bytes, query: bytes) -> Refusal | None:
    """Only published paths exist, exactly as written: no query, no escapes, no second spelling."""
    if raw_path not in ROUTES or query:
        return Refusal(404, "no such path")
    return None


def check_method(method: str) -> Refusal | None:
    """Every published path is called with POST."""
    return None if method == "POST" else Refusal(405, "use POST")


def check_framing(headers: Headers) -> Refusal | None:
    """No header we pass on may stand twice, and a body has one length, told in one way."""
    names = [name for name, _ in headers]
    if any(names.count(name) > 1 for name in (*PASSED_UP, b"transfer-encoding", b"host")):
        return Refusal(400, "a header stands twice")
    if b"content-length" in names and b"transfer-encoding" in names:
        return Refusal(400, "two ways of telling the length")
    length = header(headers, b"content-length")
    if length is not None and not (length.isdigit() and len(length) < 19):
        return Refusal(400, "unreadable length")
    return None


def check_declared_size(raw_path: bytes, headers: Headers) -> Refusal | None:
    """A body that says it is too large is refused before a byte of it is read."""
    length = header(headers, b"content-length")
    return check_size(raw_path, int(length)) if length else None


def check_size(raw_path: bytes, size: int) -> Refusal | None:
    """The body is not larger than its path allows; asked again for every piece that arrives."""
    limit = ROUTES.get(raw_path, SMALL)
    return Refusal(413, f"body larger than {limit} bytes") if size > limit else None


def check_identity(peer: Peer | None, now: datetime) -> Refusal | None:
    """The connection belongs to a trainer whose certificate is valid at this moment, not only at the handshake."""
    if peer is None or peer.identity is None or peer.identity.role != "trainer":
        return Refusal(401, "not a trainer of this federation")
    if not peer.not_before <= now <= peer.not_after:
        return Refusal(401, "identity expired: ask the operator for a new join token")
    return None


def check_enrolment(node: EnrolledNode | None) -> Refusal | None:
    """The member has a node here and is not shut out."""
    if node is None:
        return Refusal(401, "not enrolled")
    return Refusal(401, "revoked") if node.revoked else None


def check_certificate(node: EnrolledNode, peer: Peer) -> Refusal | None:
    """The certificate is over the key that the member enrolled last, as the hub demands."""
    known = node.key_sha256 != "" and peer.key_sha256 == node.key_sha256
    return None if known else Refusal(401, "enrolled again with another key")


def check_key(node: EnrolledNode, headers: Headers) -> Refusal | None:
    """The node speaks with the key that this very member enrolled. SuperLink verifies that it also holds it."""
    try:
        told = base64.b64decode(header(headers, KEY_HEADER) or b"", validate=True)
    except binascii.Error:
        return Refusal(401, "unreadable node key")
    enrolled = canonical_key(node.public_key)
    return None if enrolled and told == enrolled else Refusal(401, "another node key than the enrolled one")


def check_source(body: bytes) -> Refusal | None:
    """Pushed messages name their sender as source. SuperLink itself takes a reply in anybody's name."""
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return Refusal(400, "unreadable body")
    if any(message.metadata.src_node_id != request.node.node_id for message in request.messages_list):
        return Refusal(401, "message in another node's name")
    return None


def header(headers: Headers, name: bytes) -> bytes | None:
    """Return the first value of a header."""
    return next((value for key, value in headers if key == name), None)


def utc_now() -> datetime:
    """Return the present moment, aware."""
    return datetime.now(UTC)
