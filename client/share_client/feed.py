"""Following versions: an endless, ordered stream of decoded deltas that survives the hub's restarts.

The feed never goes backwards. It starts from the version the caller holds, checks that each delta starts where the
last one ended and that its manifest continues the chain (:mod:`share_client.chain`). When the hub no longer keeps the
deltas that are needed, or they are more bytes than a whole version, it says so, and a whole version is fetched. A lost
connection is opened again for ever, with back-off; a refusal is raised. What a relay refuses is asked of the hub, but a
manifest that does not hold stops the feed wherever it comes from.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime

import grpc

from share_client.backoff import Backoff
from share_client.chain import ManifestChain
from share_client.channel import refusal_from_rpc
from share_client.link import HubLink, collect
from share_client.sources import Sources
from share_core.errors import DigestError, FedshareError, ManifestError, UnavailableError, VersionError
from share_core.identity.manifest import FRESH_MS
from share_core.types import Delta, Space, SpaceSpec
from share_core.wire import decode_delta, decode_snapshot
from share_proto.v1 import hub_pb2

BEHIND_S = 30.0
"""Seconds that a relay may bring nothing although the hub has published more."""

SILENT_S = FRESH_MS / 1000
"""Seconds that a source may say nothing at all, not even that there is nothing new."""


class VersionFeed:
    """One subscription. Iterate over :meth:`events` in one thread; :meth:`close` may be called from any."""

    def __init__(
        self,
        source: HubLink | Sources,
        spec: SpaceSpec,
        since_version: int,
        on_wait: Callable[[FedshareError], None] | None = None,
        chain: ManifestChain | None = None,
    ) -> None:
        self._sources = source if isinstance(source, Sources) else Sources(source)
        self._spec = spec
        self._version = since_version
        self._on_wait = on_wait
        self._chain = chain or ManifestChain(None, spec.space_id)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._stream: grpc.Call | None = None
        self._link = self._sources.hub
        self._opened = self._moved = self._heard = time.monotonic()
        self._behind = self._silent = False
        self._newest = 0

    def close(self) -> None:
        """End the iteration; a read under way is cancelled."""
        with self._lock:
            self._closed.set()
            if self._stream is not None:
                self._stream.cancel()

    def expect(self, version: int, behind_s: float = BEHIND_S, silent_s: float = SILENT_S) -> None:
        """Say that the hub has published ``version``: a relay that brings nothing for ``behind_s`` is left.

        So is a relay that does not tell for ``silent_s`` which version is the newest; of a hub it is a refusal: it, or
        who stands between, holds versions back. May be called from any thread. Without it a client could be held at an
        old version for ever.
        """
        with self._lock:
            now, relay = time.monotonic(), self._sources.is_relay(self._link)
            stuck = max(version, self._newest) > self._version and now - self._moved > behind_s
            silent = self._chain.verifies and now - self._heard > silent_s and now - self._opened > behind_s
            if self._stream is not None and (silent or (stuck and relay)):
                self._behind, self._silent = relay, silent
                self._stream.cancel()

    def events(self) -> Iterator[Delta | Space]:
        """Yield every version after the one held: a Delta where there is one, else a whole Space.

        Raises:
            ManifestError: what arrived is not what the hub has signed, or does not continue what is held.
            FedshareError: the hub refuses the subscription, or it is at an older version than the one held.
        """
        backoff = Backoff()
        while not self._closed.is_set():
            link = self._sources.current()
            try:
                with contextlib.closing(self._subscribe(link)) as subscription:
                    for event in subscription:
                        backoff.reset()
                        self._sources.worked(link)
                        with self._lock:
                            self._version, self._moved, self._behind = event.version, time.monotonic(), False
                            self._heard = self._moved
                        yield event
                        if self._sources.relay_is_due:
                            break
                reason: FedshareError = UnavailableError(f"{link.address} ended the stream of versions")
            except ManifestError:
                raise
            except FedshareError as error:
                if not self._sources.is_relay(link) and not isinstance(error, UnavailableError | DigestError):
                    raise
                reason = error
            if self._closed.is_set():
                return
            if self._silent and not self._sources.is_relay(link):
                raise VersionError(
                    f"{link.address} answers and has not told for {SILENT_S:.0f} s which version is the newest: "
                    "versions may be held back; ask the operator"
                ) from reason
            if not self._sources.is_relay(link) and self._sources.relay_is_due:
                continue
            if self._behind:
                missed = "it has not told which version is the newest" if self._silent else "the hub has published more"
                reason = UnavailableError(f"it is still at version {self._version}, and {missed}")
            self._sources.failed(link, reason, at_once=self._behind)
            if self._on_wait is not None:
                self._on_wait(reason)
            backoff.wait(self._closed, reason)

    def _subscribe(self, link: HubLink) -> Generator[Delta | Space]:
        """Yield events of one connection until it ends."""
        request = hub_pb2.FollowVersionsRequest(space_id=self._spec.space_id, since_version=self._version)
        with self._lock:
            if self._closed.is_set():
                return
            stream = link.hub.FollowVersions(request)
            self._stream, self._link, self._behind, self._silent = stream, link, False, False
            self._opened = self._moved = time.monotonic()
        try:
            for message in stream:
                part = message.WhichOneof("part")
                if part == "snapshot_required":
                    yield self._snapshot(link, message.snapshot_required.newest_version)
                    return
                if part == "heartbeat":
                    self._hear(message.heartbeat)
                    continue
                if part != "delta":
                    raise DigestError("versions: expected the header of a delta, got a chunk")
                yield self._delta(message.delta, iter(stream))
        except grpc.RpcError as error:
            raise refusal_from_rpc(error, f"following versions at {link.address}") from error
        finally:
            stream.cancel()

    def _hear(self, statement: hub_pb2.Manifest) -> None:
        newest = self._chain.check_heartbeat(statement, datetime.now(UTC))
        with self._lock:
            self._newest, self._heard = max(self._newest, newest), time.monotonic()

    def _delta(self, header: hub_pb2.DeltaHeader, stream: Iterator[hub_pb2.FollowVersionsResponse]) -> Delta:
        if header.from_version != self._version or header.version != self._version + 1:
            raise VersionError(
                f"the hub sent the step from version {header.from_version} to {header.version}, "
                f"expected the step from {self._version}: it does not keep the order of versions"
            )
        # Before the payload: from here on its size and digest are the hub's word, and nobody else's.
        link = self._chain.check_delta(header)
        what = f"delta of version {header.version}"
        chunks = self._counted(_chunks(stream, what))
        payload = collect(header.payload_size, header.payload_sha256, chunks, what, header.data)
        delta = decode_delta(payload, self._spec)
        if delta.version != header.version:
            raise DigestError(f"{what}: the payload says version {delta.version}")
        self._chain.take(header.version, link, header.newest_version)
        return delta

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on the pieces of a payload: who sends one is not silent, and there is an end to them."""
        for chunk in chunks:
            self._heard = time.monotonic()
            yield chunk

    def _snapshot(self, link: HubLink, newest: int) -> Space:
        if newest <= self._version:
            raise VersionError(
                f"the hub is at version {newest} and this client already holds {self._version}: the hub went back, "
                "perhaps it was restored from a backup; ask the operator before removing the client's cache directory"
            )
        space, announced = fetch_newest(link, self._spec, self._chain)
        if space.version != announced or announced <= self._version:
            raise VersionError(
                f"asked for a version after {self._version}, got a snapshot of version {space.version} "
                f"announced as {announced}"
            )
        return space


def fetch_newest(link: HubLink, spec: SpaceSpec, chain: ManifestChain) -> tuple[Space, int]:
    """Fetch the newest version whole; return it and the version it was announced as. The chain goes on from it.

    Raises:
        ManifestError: it is not what the hub has signed.
        VersionError: it is older than what was verified before.
        FedshareError: what the call or the payload raises.
    """
    checked = [""]

    def check(header: hub_pb2.SnapshotHeader) -> None:
        checked[0] = chain.check_snapshot(header)

    version, payload = link.fetch_snapshot(spec.space_id, 0, check)
    space = decode_snapshot(payload, spec)
    if space.version == version:
        chain.take(version, checked[0], version)
    return space, version


def _chunks(stream: Iterator[hub_pb2.FollowVersionsResponse], what: str) -> Iterator[bytes]:
    for message in stream:
        if message.WhichOneof("part") != "chunk":
            raise DigestError(f"{what}: another header before the payload was complete")
        yield message.chunk
