"""The feed against a hub that skips, damages, repeats and restarts: every version once, in order, or a named error."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from share_client import feed as module
from share_client.feed import VersionFeed
from share_client.link import HubLink
from share_core.errors import DigestError, FedshareError, HeaderError, OverloadError, UnavailableError, VersionError
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import advance, empty_space, update_adapter
from share_core.types import Delta, Space, SpaceSpec
from share_core.wire import encode_delta, encode_snapshot
from share_proto.v1 import hub_pb2

Message = hub_pb2.FollowVersionsResponse
VERSIONS = 4


class Stream:
    """One answer of FollowVersions."""

    def __init__(self, messages: list[Message]) -> None:
        self._messages = iter(messages)
        self.cancelled = False

    def __iter__(self) -> Iterator[Message]:
        return self

    def __next__(self) -> Message:
        return next(self._messages)

    def cancel(self) -> None:
        self.cancelled = True


class Hub:
    """Answers each subscription with the next of the given streams, the last one for ever."""

    address = "test"

    def __init__(self, *answers: list[Message], snapshot: tuple[int, bytes] = (0, b"")) -> None:
        self._answers = list(answers)
        self._snapshot = snapshot
        self.asked: list[int] = []
        self.streams: list[Stream] = []
        self.hub = SimpleNamespace(FollowVersions=self._follow)

    def _follow(self, request: hub_pb2.FollowVersionsRequest) -> Stream:
        self.asked.append(request.since_version)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        self.streams.append(Stream(answer))
        return self.streams[-1]

    def fetch_snapshot(self, space_id: str, version: int = 0, check: Any = None) -> tuple[int, bytes]:
        number, payload = self._snapshot
        check(hub_pb2.SnapshotHeader(version=number, payload_size=len(payload)))
        return number, payload


@pytest.fixture(scope="module")
def spaces(fake: Any, spec: SpaceSpec) -> list[tuple[bytes, Space]]:
    """The payload that leads to each version, and the version; version 0 first."""
    state = empty_state(spec)
    made = [(b"", state.space)]
    for number in range(1, VERSIONS + 1):
        adapter = update_adapter(fake.make_update(state.space, number), state.space.bases)
        merged = merge(state, f"org/t{number}", adapter, MergePolicy(k_max=32))
        state = merged.state
        made.append((encode_delta(merged.delta), state.space))
    return made


def step(payload: bytes, number: int, **changes: Any) -> list[Message]:
    """Return the messages of one delta: an honest header unless ``changes`` say otherwise, then its chunks."""
    fields = {
        "from_version": number - 1,
        "version": number,
        "payload_size": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
    }
    header = Message(delta=hub_pb2.DeltaHeader(**{**fields, **changes}))
    return [header, *(Message(chunk=payload[start : start + 200]) for start in range(0, len(payload), 200))]


def steps(spaces: list[tuple[bytes, Space]], *versions: int) -> list[Message]:
    return [message for version in versions for message in step(spaces[version][0], version)]


def required(newest: int) -> Message:
    return Message(snapshot_required=hub_pb2.SnapshotRequired(newest_version=newest))


def followed(hub: Hub, spec: SpaceSpec, since: int, count: int) -> tuple[list[Delta | Space], list[FedshareError]]:
    """Return the first ``count`` events after ``since`` and what the feed waited for."""
    waits: list[FedshareError] = []
    feed = VersionFeed(cast(HubLink, hub), spec, since, waits.append)
    try:
        return list(itertools.islice(feed.events(), count)), waits
    finally:
        feed.close()


def test_every_version_comes_once_over_several_connections(spec: SpaceSpec, spaces: Any) -> None:
    hub = Hub(steps(spaces, 1, 2), steps(spaces, 3), steps(spaces, 4))
    events, waits = followed(hub, spec, 0, VERSIONS)
    space = empty_space(spec)
    for event in events:
        assert isinstance(event, Delta)
        space = advance(space, event)
    assert space.bases["one"].left.equal(spaces[VERSIONS][1].bases["one"].left)
    assert hub.asked == [0, 2, 3]
    assert {type(wait) for wait in waits} == {UnavailableError}
    assert all(stream.cancelled for stream in hub.streams)


def test_a_jump_gives_a_whole_space_and_goes_on_from_there(spec: SpaceSpec, spaces: Any) -> None:
    snapshot = (3, encode_snapshot(spaces[3][1]))
    hub = Hub([*steps(spaces, 1), required(3)], steps(spaces, 4), snapshot=snapshot)
    events, _ = followed(hub, spec, 0, 3)
    assert [type(event) for event in events] == [Delta, Space, Delta]
    assert [event.version for event in events] == [1, 3, 4]
    assert hub.asked == [0, 3]


@pytest.mark.parametrize(
    ("newest", "announced", "held", "words"),
    [(2, 2, 2, "went back"), (1, 1, 2, "went back"), (3, 1, 2, "after 2"), (3, 2, 2, "after 2"), (4, 4, 0, "got a")],
    ids=["same", "older", "snapshot-older", "snapshot-same", "snapshot-misnamed"],
)
def test_a_snapshot_never_leads_back(
    spec: SpaceSpec, spaces: Any, newest: int, announced: int, held: int, words: str
) -> None:
    inside = 3 if held == 0 else announced
    hub = Hub([required(newest)], snapshot=(announced, encode_snapshot(spaces[inside][1])))
    with pytest.raises(VersionError, match=words):
        followed(hub, spec, held, 1)


def flipped(payload: bytes) -> bytes:
    return payload[:-1] + bytes([payload[-1] ^ 1])


DAMAGES: dict[str, Callable[[bytes, bytes], list[Message]]] = {
    "bit": lambda good, other: step(flipped(good), 1, payload_sha256=hashlib.sha256(good).hexdigest()),
    "cut short": lambda good, other: step(good, 1)[:-1],
    "too much": lambda good, other: step(good + b"x" * 10, 1, payload_size=len(good)),
    "chunk missing": lambda good, other: [m for n, m in enumerate(step(good, 1)) if n != 2],
    "chunks swapped": lambda good, other: [step(good, 1)[n] for n in (0, 2, 1, *range(3, len(step(good, 1))))],
    "no header": lambda good, other: step(good, 1)[1:],
    "header inside": lambda good, other: step(good, 1)[:2] + step(good, 1),
    "another version inside": lambda good, other: step(other, 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_delta_is_asked_for_again(damage: str, spec: SpaceSpec, spaces: Any) -> None:
    broken = DAMAGES[damage](spaces[1][0], spaces[2][0])
    hub = Hub(broken, steps(spaces, 1, 2))
    events, waits = followed(hub, spec, 0, 2)
    assert [event.version for event in events] == [1, 2]
    assert [type(wait) for wait in waits] == [DigestError]
    assert hub.asked == [0, 0], "nothing of the damaged delta may count as held"


def test_planted_bug_without_the_digest_the_damaged_delta_is_taken(
    spec: SpaceSpec, spaces: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "collect", lambda size, sha256, chunks, what, first: b"".join(itertools.islice(chunks, 999))
    )
    hub = Hub(DAMAGES["bit"](spaces[1][0], b""), steps(spaces, 1))
    events, waits = followed(hub, spec, 0, 1)
    assert (len(events), waits, hub.asked) == (1, [], [0]), "so the test above would fail"


@pytest.mark.parametrize(
    ("held", "changes"),
    [
        (1, {"from_version": 0, "version": 1}),
        (1, {"from_version": 2, "version": 3}),
        (1, {"from_version": 1, "version": 3}),
        (1, {"from_version": 0, "version": 2}),
    ],
    ids=["repeated", "skipped", "two-at-once", "from-elsewhere"],
)
def test_a_delta_out_of_order_is_refused(held: int, changes: dict[str, int], spec: SpaceSpec, spaces: Any) -> None:
    hub = Hub(step(spaces[2][0], 2, **changes))
    with pytest.raises(VersionError, match="order of versions"):
        followed(hub, spec, held, 1)
    assert hub.streams[0].cancelled


def test_a_delta_that_cannot_be_read_is_refused_and_not_asked_for_for_ever(spec: SpaceSpec) -> None:
    with pytest.raises(HeaderError):
        followed(Hub(step(b"no safetensors file", 1)), spec, 0, 1)


def test_closing_ends_the_iteration_and_the_stream(spec: SpaceSpec, spaces: Any) -> None:
    hub = Hub(steps(spaces, 1, 2, 3))
    feed = VersionFeed(cast(HubLink, hub), spec, 0)
    events = feed.events()
    assert next(events).version == 1
    feed.close()
    assert hub.streams[0].cancelled
    events.close()  # type: ignore[attr-defined]
    assert list(VersionFeed.events(feed)) == []


class Busy:
    """A hub that sheds the first subscription and serves the second."""

    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages
        self.calls = 0

    def FollowVersions(self, request: hub_pb2.FollowVersionsRequest, context: Any) -> Iterator[Message]:
        self.calls += 1
        if self.calls == 1:
            context.set_trailing_metadata((("share-error", "OverloadError"), ("grpc-retry-pushback-ms", "4000")))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many followers")
        yield from self.messages


def test_a_busy_hub_is_given_the_time_it_asks_for(
    serving: Callable[..., HubLink], waits: list[Any], spec: SpaceSpec, spaces: Any
) -> None:
    link = serving(Busy(steps(spaces, 1, 2)))
    feed = VersionFeed(link, spec, 0)
    assert [event.version for event in itertools.islice(feed.events(), 2)] == [1, 2]
    feed.close()
    assert [(type(wait), wait.retry_after_ms) for wait in waits] == [(OverloadError, 4000)]


@pytest.mark.parametrize("inline", [1, 150, 10**6])
def test_the_first_bytes_may_come_with_the_header(inline: int, spec: SpaceSpec, spaces: Any) -> None:
    payload = spaces[1][0]
    header = step(payload, 1, data=payload[:inline])[0]
    rest = payload[inline:]
    chunks = [Message(chunk=rest[start : start + 100]) for start in range(0, len(rest), 100)]
    events, waited = followed(Hub([header, *chunks, *steps(spaces, 2)]), spec, 0, 2)
    assert [event.version for event in events] == [1, 2]
    assert waited == []


def test_too_many_first_bytes_are_refused(spec: SpaceSpec, spaces: Any) -> None:
    payload = spaces[1][0]
    broken = step(payload, 1, data=payload + b"x")[:1]
    events, waited = followed(Hub(broken, steps(spaces, 1)), spec, 0, 1)
    assert [event.version for event in events] == [1]
    assert [type(wait) for wait in waited] == [DigestError]
