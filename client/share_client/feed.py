"""Following versions: an endless, ordered stream of decoded deltas that survives the hub's restarts.

The feed never goes backwards. It starts from the version the caller holds, checks that each delta starts where the
last one ended, and when the hub no longer keeps the delta that is needed it fetches a whole version instead.
A lost connection is opened again for ever, with back-off; a refusal is raised.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import grpc

from share_client.backoff import Backoff
from share_client.channel import error_from_rpc
from share_client.link import HubLink, collect
from share_core.errors import DigestError, FedshareError, UnavailableError, VersionError
from share_core.types import Delta, Space, SpaceSpec
from share_core.wire import decode_delta, decode_snapshot
from share_proto.v1 import hub_pb2


class VersionFeed:
    """One subscription. Iterate over :meth:`events` in one thread; :meth:`close` may be called from any."""

    def __init__(
        self,
        link: HubLink,
        spec: SpaceSpec,
        since_version: int,
        on_wait: Callable[[FedshareError], None] | None = None,
    ) -> None:
        self._link = link
        self._spec = spec
        self._version = since_version
        self._on_wait = on_wait
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._stream: grpc.Call | None = None

    def close(self) -> None:
        """End the iteration; a read under way is cancelled."""
        with self._lock:
            self._closed.set()
            if self._stream is not None:
                self._stream.cancel()

    def events(self) -> Iterator[Delta | Space]:
        """Yield every version after the one held: a Delta where there is one, else a whole Space.

        Raises:
            FedshareError: the hub refuses the subscription, or it is at an older version than the one held.
        """
        backoff = Backoff()
        while not self._closed.is_set():
            try:
                for event in self._subscribe():
                    backoff.reset()
                    self._version = event.version
                    yield event
                reason: FedshareError = UnavailableError("the hub ended the stream of versions")
            except (UnavailableError, DigestError) as error:
                reason = error
            if self._closed.is_set():
                return
            if self._on_wait is not None:
                self._on_wait(reason)
            backoff.wait(self._closed)

    def _subscribe(self) -> Iterator[Delta | Space]:
        """Yield events of one connection until it ends."""
        request = hub_pb2.FollowVersionsRequest(space_id=self._spec.space_id, since_version=self._version)
        with self._lock:
            if self._closed.is_set():
                return
            stream = self._link.hub.FollowVersions(request)
            self._stream = stream
        try:
            for message in stream:
                part = message.WhichOneof("part")
                if part == "snapshot_required":
                    yield self._snapshot(message.snapshot_required.newest_version)
                    return
                if part != "delta":
                    raise DigestError("versions: expected the header of a delta, got a chunk")
                yield self._delta(message.delta, iter(stream))
        except grpc.RpcError as error:
            raise error_from_rpc(error, f"following versions at {self._link.address}") from error
        finally:
            stream.cancel()

    def _delta(self, header: hub_pb2.DeltaHeader, stream: Iterator[hub_pb2.FollowVersionsResponse]) -> Delta:
        if header.from_version != self._version or header.version != self._version + 1:
            raise VersionError(
                f"the hub sent the step from version {header.from_version} to {header.version}, "
                f"expected the step from {self._version}: it does not keep the order of versions"
            )
        what = f"delta of version {header.version}"
        payload = collect(header.payload_size, header.payload_sha256, _chunks(stream, what), what)
        delta = decode_delta(payload, self._spec)
        if delta.version != header.version:
            raise DigestError(f"{what}: the payload says version {delta.version}")
        return delta

    def _snapshot(self, newest: int) -> Space:
        if newest <= self._version:
            raise VersionError(
                f"the hub is at version {newest} and this client already holds {self._version}: the hub went back, "
                "perhaps it was restored from a backup; ask the operator before removing the client's cache directory"
            )
        version, payload = self._link.fetch_snapshot(self._spec.space_id)
        space = decode_snapshot(payload, self._spec)
        if space.version != version or version <= self._version:
            raise VersionError(
                f"asked for a version after {self._version}, got a snapshot of version {space.version} "
                f"announced as {version}"
            )
        return space


def _chunks(stream: Iterator[hub_pb2.FollowVersionsResponse], what: str) -> Iterator[bytes]:
    for message in stream:
        if message.WhichOneof("part") != "chunk":
            raise DigestError(f"{what}: another header before the payload was complete")
        yield message.chunk
