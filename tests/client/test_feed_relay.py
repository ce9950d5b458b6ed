"""A relay that refuses, is slow, or is followed for months: none of it stops or fills a client."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from share_client import status
from share_client.chain import ManifestChain
from share_client.feed import VersionFeed
from share_client.link import HubLink, SpaceDescription
from share_client.member import Credentials
from share_client.sources import Sources
from share_core.errors import VersionError
from share_core.identity import Identity, Manifest, ManifestVerifier, make_authority, make_signer, sign_manifest
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import update_adapter
from share_core.types import Space, SpaceSpec
from share_core.wire import decode_snapshot, encode_delta, encode_snapshot
from share_proto.v1 import hub_pb2

Message = hub_pb2.FollowVersionsResponse
NOW = datetime.now(UTC)


def required(newest: int) -> Message:
    return Message(snapshot_required=hub_pb2.SnapshotRequired(newest_version=newest))


class Stream:
    """One answer of FollowVersions: the messages, then silence until it is cancelled, or the end."""

    def __init__(self, messages: list[Message], silent: bool = False) -> None:
        self._messages = iter(messages)
        self._silent = silent
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[Message]:
        return self

    def __next__(self) -> Message:
        for message in self._messages:
            return message
        if self._silent:
            self._cancelled.wait()
        raise StopIteration

    def cancel(self) -> None:
        self._cancelled.set()


class Source:
    """A hub or relay that answers subscriptions with these streams, the last one again and again."""

    def __init__(self, address: str, *streams: Callable[[], Stream], snapshot: Callable[[], bytes] = bytes) -> None:
        self.address = address
        self._streams = list(streams)
        self._snapshot = snapshot
        self.asked: list[int] = []
        self.hub = SimpleNamespace(FollowVersions=self._follow)

    def _follow(self, request: hub_pb2.FollowVersionsRequest) -> Stream:
        self.asked.append(request.since_version)
        return (self._streams.pop(0) if len(self._streams) > 1 else self._streams[0])()

    def fetch_snapshot(self, space_id: str, version: int = 0, check: Any = None) -> tuple[int, bytes]:
        payload = self._snapshot()
        header = hub_pb2.SnapshotHeader(version=1, payload_size=len(payload))
        check(header)
        return header.version, payload


def first_version(spec: SpaceSpec, fake: Any) -> tuple[bytes, bytes]:
    """Return version 1 as a step and as a whole."""
    state = empty_state(spec)
    adapter = update_adapter(fake.make_update(state.space, 1), state.space.bases)
    merged = merge(state, "org/t1", adapter, MergePolicy(k_max=32))
    return encode_delta(merged.delta), encode_snapshot(merged.state.space)


def step(payload: bytes, number: int, **more: Any) -> Message:
    return Message(
        delta=hub_pb2.DeltaHeader(
            from_version=number - 1,
            version=number,
            newest_version=number,
            payload_size=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            data=payload,
            **more,
        )
    )


class Accuser:
    """A relay whose own upstream shows two histories: it asks for whole versions and refuses to give one."""

    def FollowVersions(self, request: hub_pb2.FollowVersionsRequest, context: Any) -> Iterator[Message]:
        yield required(1)

    def FetchSnapshot(
        self, request: hub_pb2.FetchSnapshotRequest, context: Any
    ) -> Iterator[hub_pb2.FetchSnapshotResponse]:
        context.set_trailing_metadata((("share-error", "ManifestError"),))
        context.abort(grpc.StatusCode.DATA_LOSS, "my hub shows two histories")
        yield hub_pb2.FetchSnapshotResponse()


@pytest.mark.usefixtures("waits")
def test_a_relay_that_speaks_of_a_breach_is_left_and_not_believed(
    spec: SpaceSpec, fake: Any, serving: Callable[..., HubLink]
) -> None:
    """A breach is what the client finds itself; otherwise one relay's trouble would stop all who follow it."""
    delta, _ = first_version(spec, fake)
    hub, relay = Source("hub", lambda: Stream([step(delta, 1)])), serving(Accuser())
    told: list[str] = []
    feed = VersionFeed(Sources(cast(HubLink, hub), relay, told.append), spec, 0)
    (event,) = itertools.islice(feed.events(), 1)
    feed.close()
    assert event.version == 1
    assert "two histories" in told[0]


def test_a_hub_that_speaks_of_a_breach_is_a_refusal(spec: SpaceSpec, serving: Callable[..., HubLink]) -> None:
    with pytest.raises(VersionError, match="two histories"):
        next(VersionFeed(serving(Accuser()), spec, 0).events())


@pytest.mark.usefixtures("waits")
def test_a_relay_that_was_slow_and_then_brought_it_is_not_left(spec: SpaceSpec, fake: Any) -> None:
    """It is missed while a whole version is on its way; the version arrives, so nothing is missing any more."""
    _, whole = first_version(spec, fake)
    told: list[str] = []

    def slow() -> bytes:
        feed.expect(1, behind_s=0.0)
        return whole

    relay = Source("relay", lambda: Stream([required(1)]), lambda: Stream([], silent=True), snapshot=slow)
    hub = Source("hub", lambda: Stream([], silent=True))
    feed = VersionFeed(Sources(cast(HubLink, hub), cast(HubLink, relay), told.append), spec, 0)
    events = feed.events()
    first = next(events)
    assert isinstance(first, Space)
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, events)
        while len(relay.asked) < 2 and not hub.asked:
            time.sleep(0.01)
        feed.close()
        assert rest.result() == []
    assert relay.asked == [0, 1]
    assert hub.asked == []
    assert told == []


def test_a_snapshot_before_anything_is_published_is_the_empty_space(spec: SpaceSpec) -> None:
    """Nobody signs version 0: everybody knows what it holds."""
    authority, authority_key = make_authority("test", NOW)
    certificate, _ = make_signer(authority, authority_key, Identity("signer", "org", "hub"), NOW, 30)
    link = cast(HubLink, SimpleNamespace(describe=lambda: SpaceDescription(spec, 0, 1 << 20, certificate)))
    version, payload = status.fetch_snapshot(link, Credentials(b"", b"", authority), 0)
    assert version == decode_snapshot(payload, spec).version == 0
    assert decode_snapshot(payload, spec).cores == {}


def test_watching_for_months_holds_no_history(spec: SpaceSpec, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, authority_key = make_authority("test", NOW)
    certificate, key = make_signer(authority, authority_key, Identity("signer", "org", "hub"), NOW, 30)
    chain = ManifestChain(ManifestVerifier(authority, certificate, NOW), spec.space_id)
    state, previous, messages = empty_state(spec), "", []
    for number in range(1, 31):
        adapter = update_adapter(fake.make_update(state.space, 1), state.space.bases)
        merged = merge(state, "org/t1", adapter, MergePolicy(k_max=32))
        state, delta = merged.state, encode_delta(merged.delta)
        said = Manifest(
            "version", spec.space_id, number, previous, hashlib.sha256(delta).hexdigest(), len(delta), issued_ms=1
        )
        signed = sign_manifest(key, said)
        previous = signed.sha256
        sent = hub_pb2.Manifest(body=signed.body, signature=signed.signature)
        messages.append(step(delta, number, manifest=sent))
    hub = Source("hub", lambda: Stream(messages))
    hub.describe = lambda: SpaceDescription(spec, 0, 1 << 20, certificate)  # type: ignore[attr-defined]
    monkeypatch.setattr(status, "open_chain", lambda *arguments: chain)
    held = []
    lines = status.watch_versions(Sources(cast(HubLink, hub)), Credentials(b"", b"", authority))
    for line in itertools.islice(lines, 31):
        held.append(len(chain._held))
        last = line["version"]
    assert last == 30
    assert max(held) <= 3, "the chain would grow for ever"
