"""One update on its way to the hub: sent, interrupted, continued, until there is an answer.

The first attempt sends everything. After a broken connection the hub is asked how much of the payload is durable
there, and only the rest is sent; what was whole already is answered with its receipt. A hub that keeps no unfinished
uploads, or that refuses what was put together from two attempts, gets everything again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from share_client.backoff import Backoff
from share_client.sharing import EVERYBODY
from share_core.errors import DigestError, FedshareError, PayloadError, RequestError, UnavailableError
from share_proto.v1 import hub_pb2

_DIGEST_ATTEMPTS = 3
"""How often the same bytes may arrive damaged before it is not the network's fault any more."""


@dataclass(frozen=True)
class Submission:
    """The header of one update: what is sent before the payload."""

    update_id: str
    """32 hexadecimal digits; the same for every attempt."""
    space_id: str
    """The space it was trained in."""
    task_id: str
    """``organisation/name``."""
    create: bool
    """Whether this may make the task."""
    payload_size: int
    """Bytes of the payload."""
    payload_sha256: str
    """Hexadecimal SHA-256 of the payload."""
    lease_id: str = ""
    """Lease under which it was trained; empty outside a lease."""
    rows: int = 0
    """Training rows the client declares; 0 says nothing."""
    signer: str = ""
    """Hexadecimal SHA-256 of the PEM of the public key it is signed with; empty until it is signed."""
    sequence: int = 0
    """The signer's count of what it has signed; 0 until it is signed."""
    signature: str = ""
    """Hexadecimal signature; empty until it is signed."""
    privacy: str = ""
    """What is declared of clipping and noise (:mod:`share_core.privacy`); empty if nothing."""
    schema_sha256: str = ""
    """Digest of the label schema (:attr:`share_client.kinds.PreparedTask.schema_sha256`); told with a head, and for
    a task that several organisations share."""
    share_with: tuple[str, ...] = ()
    """Who else may contribute (:func:`share_client.sharing.read_share_with`); counts when this makes the task."""

    def header(self, offset: int = 0) -> hub_pb2.SubmitHeader:
        """Return the first message of a Submit call whose chunks begin at ``offset``."""
        header = hub_pb2.SubmitHeader(
            update_id=self.update_id,
            space_id=self.space_id,
            task_id=self.task_id,
            create=self.create,
            payload_size=self.payload_size,
            payload_sha256=self.payload_sha256,
            lease_id=self.lease_id,
            rows=self.rows,
            offset=offset,
            sequence=self.sequence,
            signature=bytes.fromhex(self.signature),
            privacy=self.privacy,
            schema_sha256=self.schema_sha256,
        )
        if self.share_with == (EVERYBODY,):
            header.sharing.open = True
        else:
            header.sharing.organisations.extend(self.share_with)
        return header


class Uploader(Protocol):
    """The two calls that an upload takes; :class:`share_client.link.HubLink` has them."""

    def submit(self, submission: Submission, payload: bytes, offset: int = 0) -> hub_pb2.SubmitResponse:
        """Send the payload from ``offset`` on, once."""
        ...

    def get_upload(self, update_id: str) -> hub_pb2.GetUploadResponse:
        """Ask where to go on."""
        ...


def upload(
    hub: Uploader,
    submission: Submission,
    payload: bytes,
    stop: threading.Event,
    on_wait: Callable[[FedshareError], None] | None = None,
) -> hub_pb2.SubmitResponse | None:
    """Send one update, again and again under the same id while the hub is unavailable.

    Returns:
        The receipt; None when ``stop`` was set before an answer came.

    Raises:
        FedshareError: every refusal that another attempt cannot change. What the hub says of an upload put together
            from two attempts is believed only after the whole was sent in one.
    """
    backoff, damaged, broken = Backoff(), 0, False
    reason: FedshareError
    while not stop.is_set():
        offset = 0
        try:
            if broken:
                known = _known(hub, submission.update_id)
                if known.HasField("receipt"):
                    return known.receipt
                offset = known.offset if 0 <= known.offset <= len(payload) else 0
            return hub.submit(submission, payload, offset)
        except UnavailableError as error:
            broken, reason = True, error
        except (PayloadError, RequestError) as error:
            damaged += isinstance(error, DigestError)
            if damaged >= _DIGEST_ATTEMPTS or (offset == 0 and not isinstance(error, DigestError)):
                raise
            broken, reason = False, error  # the hub has thrown away what it held, or never held it: from the beginning
        if on_wait is not None:
            on_wait(reason)
        backoff.wait(stop, reason)
    return None


def _known(hub: Uploader, update_id: str) -> hub_pb2.GetUploadResponse:
    """Ask where to go on. A hub that cannot say gets everything: the question must never cost an update."""
    try:
        return hub.get_upload(update_id)
    except RequestError:
        return hub_pb2.GetUploadResponse()
