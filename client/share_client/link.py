"""Synchronous calls of the hub's tensor plane over mTLS.

Every unary call has a deadline. Every failure is an error of :mod:`share_core.errors`, with the hub's sentence.
Versions are followed in :mod:`share_client.feed`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from share_client.backoff import Backoff
from share_client.channel import CHUNK_BYTES, error_from_rpc, open_channel, refusal_from_rpc
from share_client.member import Credentials
from share_client.uploading import Submission, upload
from share_core.errors import GO_AHEAD_KEY, DigestError, FedshareError, UnavailableError, UnknownUpdateError
from share_core.types import SiteSpec, SpaceSpec
from share_proto.v1 import fleet_pb2, fleet_pb2_grpc, hub_pb2, hub_pb2_grpc

_T = TypeVar("_T")

OLD_CALLS_S = 60.0
"""Seconds that calls under way have when the identity was renewed."""

_UPLOAD_FLOOR = 100_000
"""Bytes per second below which an upload is given up and begun again."""

_PATIENCE_S = 5.0
"""Longest wait for the hub's word that the payload may come; without it the payload is sent all the same."""


@dataclass(frozen=True)
class SpaceDescription:
    """What the hub says of its space."""

    spec: SpaceSpec
    """Sites and limits."""
    version: int
    """The newest published version."""
    max_payload_bytes: int
    """The largest payload Submit accepts."""
    signer_certificate: bytes = b""
    """Certificate (PEM) of the key that signs manifests; empty if the hub signs none."""
    oldest_base_version: int = 0
    """The oldest version an update may be based on."""


class HubLink:
    """One channel to the hub. Safe to use from several threads."""

    def __init__(self, address: str, credentials: Credentials, deadline: float = 30.0) -> None:
        self.address = address
        self._deadline = deadline
        self._egress = credentials.egress
        self._old: list[tuple[threading.Timer, grpc.Channel]] = []
        self._open(credentials)

    def _open(self, credentials: Credentials) -> None:
        self.credentials = credentials
        """Who calls: what is submitted here must be signed with this key."""
        self._channel = open_channel(self.address, credentials)
        self._hub = hub_pb2_grpc.HubStub(self._channel)
        self._fleet = fleet_pb2_grpc.FleetStub(self._channel)

    def use(self, credentials: Credentials, grace_s: float = OLD_CALLS_S) -> None:
        """Make every call from now on over a new connection with ``credentials``, our renewed identity.

        Calls under way go on over the old one, which is closed after ``grace_s`` seconds: a stream that is still open
        ends then as if the connection was lost, and those who need it open it again.
        """
        timer = threading.Timer(grace_s, self._channel.close)
        timer.daemon = True
        self._old.append((timer, self._channel))
        self._open(credentials)
        timer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls under way end as cancelled."""
        for timer, channel in self._old:
            timer.cancel()
            channel.close()
        self._channel.close()

    @property
    def hub(self) -> hub_pb2_grpc.HubStub:
        """The stub, for streams that this class does not wrap."""
        return self._hub

    def describe(self) -> SpaceDescription:
        """Return the space of the hub."""
        answer = self._call("asking for the space", self._hub.DescribeSpace, hub_pb2.DescribeSpaceRequest())
        return _description(answer)

    def submit(self, submission: Submission, payload: bytes, offset: int = 0) -> hub_pb2.SubmitResponse:
        """Send one update once, the payload from ``offset`` on, and return its receipt: it is durable then.

        Raises:
            FedshareError: the hub's refusal, or UnavailableError when no answer came; then the update may or
                may not be durable, and sending the same update id again is right in both cases.
        """
        header = submission.header(offset)
        admitted, ended = threading.Event(), threading.Event()
        if self._egress is not None:
            self._egress.call(self.address, "/share_proto.v1.Hub/Submit", header)

        def messages() -> Iterator[hub_pb2.SubmitRequest]:
            yield hub_pb2.SubmitRequest(header=header)
            admitted.wait(_PATIENCE_S)
            if ended.is_set():
                return  # refused, or known already: the payload stays here
            if self._egress is not None:
                self._egress.upload(self.address, header, payload)
            for start in range(offset, len(payload), CHUNK_BYTES):
                yield hub_pb2.SubmitRequest(chunk=payload[start : start + CHUNK_BYTES])

        action = f"submitting update {submission.update_id} of {submission.task_id}"
        deadline = self._deadline + (len(payload) - offset) / _UPLOAD_FLOOR
        try:
            call = self._hub.Submit.future(messages(), timeout=deadline)
            # The hub answers the header before the payload: one that it refuses costs nobody a byte more.
            if any(key == GO_AHEAD_KEY for key, _ in call.initial_metadata()):
                admitted.set()
            return call.result()
        except grpc.RpcError as error:
            raise error_from_rpc(error, action) from error
        finally:
            ended.set()
            admitted.set()  # a refusal must not leave a thread waiting that holds the payload

    def get_upload(self, update_id: str) -> hub_pb2.GetUploadResponse:
        """Return how much of an upload is durable at the hub, or its receipt; of nothing, offset 0.

        A hub that does not know the call keeps no unfinished uploads, which is the same as having none.
        """
        request = hub_pb2.GetUploadRequest(update_id=update_id)
        try:
            return self._hub.GetUpload(request, timeout=self._deadline)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return hub_pb2.GetUploadResponse()
            raised = error_from_rpc(error, f"asking for the upload {update_id} at {self.address}")
            if isinstance(raised, UnknownUpdateError):
                return hub_pb2.GetUploadResponse()
            raise raised from error

    def submit_until_answered(
        self,
        submission: Submission,
        payload: bytes,
        stop: threading.Event,
        on_wait: Callable[[FedshareError], None] | None = None,
    ) -> hub_pb2.SubmitResponse | None:
        """Send one update until the hub has answered; see :func:`share_client.uploading.upload`."""
        receipt = upload(self, submission, payload, stop, on_wait)
        if receipt is not None and self._egress is not None:
            self._egress.receipt(self.address, receipt)
        return receipt

    def get_update(self, update_id: str) -> hub_pb2.UpdateRecord:
        """Return what became of an update."""
        request = hub_pb2.GetUpdateRequest(update_id=update_id)
        return self._call(f"asking for update {update_id}", self._hub.GetUpdate, request).update

    def list_updates(self, after_seq: int, limit: int) -> hub_pb2.ListUpdatesResponse:
        """Return updates of our organisation after an ingest number, in ingest order."""
        request = hub_pb2.ListUpdatesRequest(after_seq=after_seq, limit=limit)
        return self._call("listing updates", self._hub.ListUpdates, request)

    def report(self, evaluations: Sequence[hub_pb2.Evaluation]) -> hub_pb2.ReportEvaluationResponse:
        """Hand in evaluations; they are durable at the hub when this returns."""
        request = hub_pb2.ReportEvaluationRequest(evaluations=evaluations)
        return self._call("reporting evaluations", self._hub.ReportEvaluation, request)

    def list_tasks(self) -> hub_pb2.ListTasksResponse:
        """Return every task of the space."""
        return self._call("listing tasks", self._hub.ListTasks, hub_pb2.ListTasksRequest())

    def get_node(self) -> fleet_pb2.Node:
        """Return what the hub knows of our own Flower node."""
        return self._call("asking for our node", self._fleet.GetNode, fleet_pb2.GetNodeRequest()).node

    def renew(self) -> bytes:
        """Return a new certificate (PEM) over our key: the hub's newest one of us."""
        return self._call("renewing our certificate", self._hub.Renew, hub_pb2.RenewRequest()).certificate_pem

    def close_lease(self, lease_id: str, idle: bool, submitted: int) -> None:
        """Tell the hub that a lease is over."""
        request = fleet_pb2.CloseLeaseRequest(lease_id=lease_id, idle=idle, submitted=submitted)
        self._call(f"closing lease {lease_id}", self._fleet.CloseLease, request)

    def fetch_snapshot(
        self, space_id: str, version: int = 0, check: Callable[[hub_pb2.SnapshotHeader], object] | None = None
    ) -> tuple[int, bytes]:
        """Return (version, payload) of one whole version, 0 for the newest. Size and SHA-256 are checked.

        ``check`` sees the header before any payload byte is read, and may raise.
        """
        request = hub_pb2.FetchSnapshotRequest(space_id=space_id, version=version)
        stream = self._hub.FetchSnapshot(request, timeout=20 * self._deadline)
        try:
            header, payload = self._whole(stream, "snapshot", check or (lambda header: None))
        except grpc.RpcError as error:
            raise refusal_from_rpc(error, f"fetching a snapshot at {self.address}") from error
        return header.version, payload

    def fetch_head(
        self, space_id: str, task_id: str, version: int, most: int, check: Callable[[hub_pb2.HeadHeader, int], object]
    ) -> bytes | None:
        """Return the payload of a task's shared head in a version; None from a hub that does not know the call.

        At most ``most`` bytes are taken. ``check`` sees header and version before any of them is read, and may raise.
        """

        def checked(header: hub_pb2.HeadHeader) -> None:
            if header.payload_size > most:
                raise DigestError(
                    f"the head of {task_id} from {self.address} is announced with {header.payload_size} bytes, at "
                    f"most {most} are possible"
                )
            check(header, version)

        request = hub_pb2.FetchHeadRequest(space_id=space_id, task_id=task_id, version=version)
        stream = self._hub.FetchHead(request, timeout=20 * self._deadline)
        try:
            return self._whole(stream, "head", checked)[1]
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return None
            raise refusal_from_rpc(error, f"fetching the head of {task_id} at {self.address}") from error

    def _whole(self, stream: Any, what: str, check: Callable[[Any], object]) -> tuple[Any, bytes]:
        """Return header and payload of a stream of one payload, whose header ``check`` has seen."""
        try:
            first = next(iter(stream), None)
            if first is None or first.WhichOneof("part") != "header":
                raise DigestError(f"the {what} from {self.address} does not begin with a header")
            header = first.header
            check(header)
            return header, collect(header.payload_size, header.payload_sha256, _chunks_of(stream, what), what)
        finally:
            stream.cancel()

    def _call(self, action: str, method: Callable[..., _T], request: object) -> _T:
        try:
            return method(request, timeout=self._deadline)
        except grpc.RpcError as error:
            raise error_from_rpc(error, f"{action} at {self.address}") from error


def patiently(
    call: Callable[[], _T],
    stop: threading.Event,
    on_wait: Callable[[FedshareError], None] | None = None,
) -> _T | None:
    """Repeat a harmless call while the hub is unavailable; None when ``stop`` was set first."""
    backoff = Backoff()
    while not stop.is_set():
        try:
            return call()
        except UnavailableError as error:
            if on_wait is not None:
                on_wait(error)
            backoff.wait(stop, error)
    return None


def collect(size: int, sha256: str, chunks: Iterator[bytes], what: str, first: bytes = b"") -> bytes:
    """Join ``first`` and chunks until ``size`` bytes are there; compare their SHA-256.

    Raises:
        DigestError: too few bytes, too many, or other bytes than announced.
    """
    buffer = bytearray(first)
    while len(buffer) < size:
        chunk = next(chunks, None)
        if chunk is None:
            raise DigestError(f"{what}: the stream ended after {len(buffer)} of {size} bytes")
        buffer += chunk
    if len(buffer) > size:
        raise DigestError(f"{what}: expected {size} bytes, got {len(buffer)}")
    found = hashlib.sha256(buffer).hexdigest()
    if found != sha256:
        raise DigestError(f"{what}: expected SHA-256 {sha256}, got {found}")
    return bytes(buffer)


def _chunks_of(stream: Any, what: str) -> Iterator[bytes]:
    for message in stream:
        if message.WhichOneof("part") != "chunk":
            raise DigestError(f"{what}: a second header among the chunks")
        yield message.chunk


def _description(answer: hub_pb2.DescribeSpaceResponse) -> SpaceDescription:
    sites = {site.name: SiteSpec(site.name, site.d_out, site.d_in, site.sha256) for site in answer.sites}
    spec = SpaceSpec(
        space_id=answer.space_id,
        backbone=answer.backbone,
        sites=sites,
        k_max=answer.k_max,
        tau=answer.tau,
        rank_limit=answer.rank_limit,
    )
    return SpaceDescription(
        spec=spec,
        version=answer.version,
        max_payload_bytes=answer.max_payload_bytes,
        signer_certificate=answer.signer_certificate_pem,
        oldest_base_version=answer.oldest_base_version,
    )
