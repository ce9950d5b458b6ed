"""Signed manifests in the feed: every way in which a relay or a hub could lie, and the feeds that would believe it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from share_client.cache import SpaceCache, chain_path
from share_client.chain import ManifestChain, open_chain
from share_client.feed import VersionFeed, fetch_newest
from share_client.link import HubLink, SpaceDescription
from share_client.member import Credentials
from share_core.errors import CertificateError, ConfigError, DigestError, FedshareError, ManifestError, VersionError
from share_core.identity import (
    Identity,
    Manifest,
    ManifestVerifier,
    SignedManifest,
    make_authority,
    make_signer,
    sign_manifest,
)
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import update_adapter
from share_core.types import Delta, Space, SpaceSpec
from share_core.wire import encode_delta, encode_snapshot
from share_proto.v1 import hub_pb2

Message = hub_pb2.FollowVersionsResponse
NOW = datetime.now(UTC)
VERSIONS = 6


@dataclass(frozen=True)
class Signer:
    """A federation's authority and the hub's signing key."""

    authority: bytes
    certificate: bytes
    key: bytes


def make_signing(name: str = "hub") -> Signer:
    authority, authority_key = make_authority("test", NOW)
    certificate, key = make_signer(authority, authority_key, Identity("signer", "org", name), NOW, 30)
    return Signer(authority, certificate, key)


@dataclass(frozen=True)
class Published:
    """One version as the hub publishes it."""

    space: Space
    delta: bytes
    snapshot: bytes
    manifest: SignedManifest
    whole: SignedManifest


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def history(spec: SpaceSpec, fake: Any, key: bytes, seeds: list[int]) -> list[Published]:
    """Return the versions from 1 on that merging these updates gives, signed and chained."""
    state, previous, made = empty_state(spec), "", []
    for seed in seeds:
        adapter = update_adapter(fake.make_update(state.space, seed), state.space.bases)
        merged = merge(state, f"org/t{seed}", adapter, MergePolicy(k_max=32))
        state = merged.state
        delta, snapshot = encode_delta(merged.delta), encode_snapshot(state.space)
        step = Manifest("version", spec.space_id, state.space.version, previous, sha(delta), len(delta), 1)
        manifest = sign_manifest(key, step)
        previous = manifest.sha256
        whole = replace(step, kind="snapshot", previous=previous, payload_sha256=sha(snapshot))
        whole = replace(whole, payload_size=len(snapshot))
        made.append(Published(state.space, delta, snapshot, manifest, sign_manifest(key, whole)))
    return made


@pytest.fixture(scope="module")
def signer() -> Signer:
    return make_signing()


@pytest.fixture(scope="module")
def ours(spec: SpaceSpec, fake: Any, signer: Signer) -> list[Published]:
    return history(spec, fake, signer.key, list(range(1, VERSIONS + 1)))


@pytest.fixture(scope="module")
def theirs(spec: SpaceSpec, fake: Any, signer: Signer) -> list[Published]:
    """Another history under the same key: the hub after a restore, or one that shows two faces. It parts after 2."""
    return history(spec, fake, signer.key, [1, 2, *range(103, 101 + VERSIONS)])


def proto(manifest: SignedManifest) -> hub_pb2.Manifest:
    return hub_pb2.Manifest(body=manifest.body, signature=manifest.signature)


def step(one: Published, inline: int = 0, **changes: Any) -> list[Message]:
    """Return the messages of one delta; ``inline`` bytes travel in the header."""
    fields: dict[str, Any] = {
        "from_version": one.space.version - 1,
        "version": one.space.version,
        "newest_version": one.space.version,
        "payload_size": len(one.delta),
        "payload_sha256": sha(one.delta),
        "manifest": proto(one.manifest),
        "data": one.delta[:inline],
    }
    fields.update(changes)
    rest = one.delta[inline:]
    header = Message(delta=hub_pb2.DeltaHeader(**{name: value for name, value in fields.items() if value is not None}))
    return [header, *(Message(chunk=rest[start : start + 300]) for start in range(0, len(rest), 300))]


class Stream:
    def __init__(self, messages: list[Message]) -> None:
        self._messages = iter(messages)
        self.read = 0

    def __iter__(self) -> Iterator[Message]:
        return self

    def __next__(self) -> Message:
        self.read += 1
        return next(self._messages)

    def cancel(self) -> None:
        pass


class Hub:
    """Sends the given messages to every subscription, and one snapshot."""

    address = "test"

    def __init__(self, *parts: list[Message], snapshot: Published | None = None, **header: Any) -> None:
        self.messages = [message for part in parts for message in part]
        self.snapshot = snapshot
        self.header = header
        self.streams: list[Stream] = []
        self.hub = SimpleNamespace(FollowVersions=self._follow)

    def _follow(self, request: hub_pb2.FollowVersionsRequest) -> Stream:
        self.streams.append(Stream(self.messages))
        return self.streams[-1]

    def fetch_snapshot(self, space_id: str, version: int, check: Callable[[Any], object]) -> tuple[int, bytes]:
        assert self.snapshot is not None
        fields: dict[str, Any] = {
            "version": self.snapshot.space.version,
            "payload_size": len(self.snapshot.snapshot),
            "payload_sha256": sha(self.snapshot.snapshot),
            "manifest": proto(self.snapshot.whole),
            "version_manifest": proto(self.snapshot.manifest),
        }
        fields.update(self.header)
        check(hub_pb2.SnapshotHeader(**{name: value for name, value in fields.items() if value is not None}))
        return int(fields["version"]), self.snapshot.snapshot


def chain_of(signer: Signer, spec: SpaceSpec, path: Path | None = None) -> ManifestChain:
    return ManifestChain(ManifestVerifier(signer.authority, signer.certificate, NOW), spec.space_id, path)


def followed(hub: Hub, spec: SpaceSpec, chain: ManifestChain, since: int, count: int) -> list[Delta | Space]:
    feed = VersionFeed(cast(HubLink, hub), spec, since, chain=chain)
    try:
        return list(itertools.islice(feed.events(), count))
    finally:
        feed.close()


def holding(signer: Signer, spec: SpaceSpec, ours: list[Published], version: int) -> ManifestChain:
    """Return a chain that has verified every version up to ``version``."""
    chain = chain_of(signer, spec)
    if version:
        followed(Hub(*(step(one) for one in ours[:version])), spec, chain, 0, version)
    return chain


@pytest.mark.parametrize("inline", [0, 100, 10**6])
def test_an_honest_hub_is_followed(inline: int, spec: SpaceSpec, signer: Signer, ours: list[Published]) -> None:
    chain = chain_of(signer, spec)
    events = followed(Hub(*(step(one, inline) for one in ours)), spec, chain, 0, VERSIONS)
    assert [event.version for event in events] == list(range(1, VERSIONS + 1))
    assert chain.highest == VERSIONS


LIES: dict[str, tuple[str, Callable[[list[Published], list[Published], Signer], list[Message]]]] = {
    "no manifest": ("without its signed manifest", lambda ours, theirs, other: step(ours[3], manifest=None)),
    "forged": (
        "signature is not the hub's",
        lambda ours, theirs, other: step(
            ours[3], manifest=hub_pb2.Manifest(body=ours[3].manifest.body, signature=b"\0" * 64)
        ),
    ),
    "signed by another": (
        "signature is not the hub's",
        lambda ours, theirs, other: step(ours[3], manifest=proto(resigned(ours[3], other))),
    ),
    "body changed": (
        "signature is not the hub's",
        lambda ours, theirs, other: step(
            ours[3],
            manifest=hub_pb2.Manifest(
                body=ours[3].manifest.body.replace(b'"version":4', b'"version":5'), signature=ours[3].manifest.signature
            ),
        ),
    ),
    "another history from here": ("does not continue", lambda ours, theirs, other: step(theirs[3])),
    "payload of another history": (
        "payload_sha256",
        lambda ours, theirs, other: step(theirs[3], manifest=proto(ours[3].manifest)),
    ),
    "size of another payload": (
        "payload_size",
        lambda ours, theirs, other: step(ours[3], payload_size=len(ours[3].delta) + 1),
    ),
    "manifest of the version before": (
        "version is 3",
        lambda ours, theirs, other: step(ours[3], manifest=proto(ours[2].manifest)),
    ),
    "manifest of a snapshot": ("kind", lambda ours, theirs, other: step(ours[3], manifest=proto(ours[3].whole))),
    "a step repeated as the next": (
        "does not continue",
        lambda ours, theirs, other: step(ours[3], manifest=proto(relinked(ours[3], ours[1], other))),
    ),
}


def resigned(one: Published, signer: Signer) -> SignedManifest:
    return SignedManifest(
        one.manifest.body, sign_manifest(signer.key, Manifest("version", "s", 4, "", "", 1, 1)).signature
    )


def relinked(one: Published, before: Published, signer: Signer) -> SignedManifest:
    """Return the manifest signed by the hub itself, but following an older version."""
    stated = ManifestVerifier(signer.authority, signer.certificate, NOW).read(one.manifest)
    return sign_manifest(signer.key, replace(stated, previous=before.manifest.sha256))


def run_lie(name: str, spec: SpaceSpec, signer: Signer, ours: list[Published], theirs: list[Published]) -> Hub:
    words, lie = LIES[name]
    other = make_signing("other") if name == "signed by another" else signer
    hub = Hub(lie(ours, theirs, other))
    with pytest.raises(ManifestError, match=words) as raised:
        followed(hub, spec, holding(signer, spec, ours, 3), 3, 1)
    assert len(hub.streams) == 1, "asked again, the feed might be given something it accepts"
    assert "operator" in str(raised.value), "the sentence says what to do"
    return hub


@pytest.mark.parametrize("name", LIES)
def test_a_lie_stops_the_feed_before_the_payload(
    name: str, spec: SpaceSpec, signer: Signer, ours: list[Published], theirs: list[Published]
) -> None:
    assert run_lie(name, spec, signer, ours, theirs).streams[0].read == 1, "the payload was read"


def credulous(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the chain on purpose."""
    from share_client import chain as module

    def blind(chain: ManifestChain, header: Any, field: str, what: str) -> Any:
        sent = getattr(header, field)
        from share_core.identity import parse_manifest

        signed = SignedManifest(sent.body, sent.signature)
        return signed, parse_manifest(sent.body)

    if name == "does not check previous":
        take = ManifestChain.take

        def forgetful(chain: ManifestChain, version: int, sha256: str, newest: int) -> None:
            take(chain, version, sha256, newest)
            chain._held.clear()

        monkeypatch.setattr(ManifestChain, "take", forgetful)
    elif name == "does not check signatures":
        monkeypatch.setattr(ManifestChain, "_read", blind)
    elif name == "does not compare the payload":
        monkeypatch.setattr(module, "_compare", lambda *arguments: None)
    elif name == "asks again":
        real = ManifestChain.check_delta

        def patient(chain: ManifestChain, header: Any) -> str:
            try:
                return real(chain, header)
            except ManifestError as error:
                raise DigestError(str(error)) from error

        monkeypatch.setattr(ManifestChain, "check_delta", patient)


@pytest.mark.parametrize(
    ("bug", "lie"),
    [
        ("does not check previous", "another history from here"),
        ("does not check signatures", "forged"),
        ("does not compare the payload", "payload of another history"),
    ],
)
def test_planted_bugs_are_caught(
    bug: str,
    lie: str,
    spec: SpaceSpec,
    signer: Signer,
    ours: list[Published],
    theirs: list[Published],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    credulous(bug, monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        run_lie(lie, spec, signer, ours, theirs)


@pytest.mark.usefixtures("waits")
def test_planted_bug_a_feed_that_asks_again_is_caught(
    spec: SpaceSpec,
    signer: Signer,
    ours: list[Published],
    theirs: list[Published],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    credulous("asks again", monkeypatch)
    hub = Hub(step(theirs[3]))
    feed = VersionFeed(cast(HubLink, hub), spec, 3, lambda error: feed.close(), holding(signer, spec, ours, 3))
    assert list(feed.events()) == [], "it waited instead of raising: the test above would fail"


def test_mix_and_match_is_noticed_where_two_histories_meet(
    spec: SpaceSpec, signer: Signer, ours: list[Published], theirs: list[Published]
) -> None:
    """Both histories are signed by the hub; only the links tell them apart, whichever version the switch is at."""
    assert ours[1].manifest == theirs[1].manifest, "they part after version 2"
    for switch in range(3, VERSIONS):
        parts = [step(one) for one in ours[:switch]] + [step(one) for one in theirs[switch:]]
        feed = VersionFeed(cast(HubLink, Hub(*parts)), spec, 0, chain=chain_of(signer, spec))
        seen: list[int] = []
        with pytest.raises(ManifestError, match="does not continue"):
            seen.extend(event.version for event in feed.events())
        assert seen == list(range(1, switch + 1))


def required(newest: int) -> list[Message]:
    return [Message(snapshot_required=hub_pb2.SnapshotRequired(newest_version=newest))]


def test_a_snapshot_starts_the_chain_anew(
    spec: SpaceSpec, signer: Signer, ours: list[Published], theirs: list[Published]
) -> None:
    chain = holding(signer, spec, ours, 1)
    events = followed(Hub(required(4), snapshot=ours[3]), spec, chain, 1, 1)
    assert [event.version for event in events] == [4]
    assert [event.version for event in followed(Hub(step(ours[4])), spec, chain, 4, 1)] == [5]
    with pytest.raises(ManifestError, match="does not continue"):
        followed(Hub(step(theirs[4])), spec, holding_from(signer, spec, ours[3]), 4, 1)


def holding_from(signer: Signer, spec: SpaceSpec, one: Published) -> ManifestChain:
    chain = chain_of(signer, spec)
    fetch_newest(cast(HubLink, Hub(snapshot=one)), spec, chain)
    return chain


SNAPSHOT_LIES: dict[str, tuple[str, Callable[[list[Published], list[Published]], dict[str, Any]]]] = {
    "no manifest": ("without its signed", lambda ours, theirs: {"manifest": None}),
    "no version manifest": ("without its signed", lambda ours, theirs: {"version_manifest": None}),
    "payload exchanged": ("payload_sha256", lambda ours, theirs: {"payload_sha256": sha(b"other")}),
    "manifest of a step": ("kind", lambda ours, theirs: {"manifest": proto(ours[4].manifest)}),
    "manifest of another version": ("version is 4", lambda ours, theirs: {"manifest": proto(ours[3].whole)}),
    "linked into another history": (
        "two histories",
        lambda ours, theirs: {"version_manifest": proto(theirs[4].manifest)},
    ),
    "another version's link": ("exchanged it", lambda ours, theirs: {"version_manifest": proto(ours[3].manifest)}),
}


@pytest.mark.parametrize("name", SNAPSHOT_LIES)
def test_a_lie_about_a_snapshot(
    name: str, spec: SpaceSpec, signer: Signer, ours: list[Published], theirs: list[Published]
) -> None:
    words, changes = SNAPSHOT_LIES[name]
    hub = Hub(required(5), snapshot=ours[4], **changes(ours, theirs))
    with pytest.raises(ManifestError, match=words):
        followed(hub, spec, holding(signer, spec, ours, 2), 2, 1)


def test_a_snapshot_is_never_older_than_what_was_seen(spec: SpaceSpec, signer: Signer, ours: list[Published]) -> None:
    """The client was at 5; its cache is older. A relay that holds versions back would take it to 4."""
    with pytest.raises(VersionError, match="older than version 5"):
        followed(Hub(required(4), snapshot=ours[3]), spec, holding(signer, spec, ours, 5), 2, 1)


def test_a_version_seen_before_must_be_the_same_one(
    spec: SpaceSpec, signer: Signer, ours: list[Published], theirs: list[Published]
) -> None:
    chain = holding(signer, spec, ours, 4)
    assert len(followed(Hub(step(ours[2]), step(ours[3])), spec, chain, 2, 2)) == 2, "walking again is fine"
    with pytest.raises(ManifestError, match="different histories"):
        followed(Hub(step(theirs[2])), spec, chain, 2, 1)
    with pytest.raises(ManifestError, match="different histories"):
        followed(Hub(required(4), snapshot=theirs[3]), spec, chain, 2, 1)


@pytest.mark.parametrize("bug", ["", "the chain is kept in memory only"])
def test_a_restart_continues_the_chain(
    bug: str, tmp_path: Path, spec: SpaceSpec, signer: Signer, ours: list[Published], theirs: list[Published]
) -> None:
    """The first life caches version 3 and sees 5; the second is offered another history from the cached version on."""
    path = None if bug else chain_path(tmp_path, spec)
    chain = chain_of(signer, spec, path)
    cache = SpaceCache(tmp_path, spec, chain)
    followed(Hub(*(step(one) for one in ours[:3])), spec, chain, 0, 3)
    cache.save(ours[2].space)
    followed(Hub(*(step(one) for one in ours[3:5])), spec, chain, 3, 2)

    def second_life(offered: list[Published], since: int) -> list[int]:
        chain = chain_of(signer, spec, path)
        kept = SpaceCache(tmp_path, spec, chain).load()
        assert kept is not None
        assert kept.version == since
        events = followed(Hub(*(step(one) for one in offered)), spec, chain, since, len(offered))
        return [event.version for event in events]

    if bug:
        assert second_life(theirs[3:5], 3) == [4, 5], "so the test would fail"
        return
    with pytest.raises(ManifestError, match="does not continue"):
        second_life(theirs[3:5], 3)
    assert second_life(ours[3:6], 3) == [4, 5, 6]
    with pytest.raises(VersionError, match="went back"):
        chain_of(signer, spec, path).check_newest(5)


def test_killed_between_chain_and_cache_the_older_cache_still_continues(
    tmp_path: Path, spec: SpaceSpec, signer: Signer, ours: list[Published]
) -> None:
    path = chain_path(tmp_path, spec)
    chain = chain_of(signer, spec, path)
    cache = SpaceCache(tmp_path, spec, chain)
    followed(Hub(*(step(one) for one in ours[:5])), spec, chain, 0, 5)
    cache.save(ours[1].space)
    chain.before_cached(4)  # the crash is here: the cache still holds version 2
    again = chain_of(signer, spec, path)
    followed(Hub(*(step(one) for one in ours[2:])), spec, again, 2, 4)
    assert sorted(again._held) == [2, 3, 4, 5, 6]
    cache = SpaceCache(tmp_path, spec, again)
    cache.save(ours[3].space)
    cache.save(ours[4].space)
    assert min(chain_of(signer, spec, path)._held) == 4, "what no cache needs is forgotten"


def test_a_hub_that_signed_may_not_stop_signing(
    tmp_path: Path, spec: SpaceSpec, signer: Signer, ours: list[Published]
) -> None:
    path = chain_path(tmp_path, spec)
    followed(Hub(step(ours[0])), spec, chain_of(signer, spec, path), 0, 1)
    with pytest.raises(ManifestError, match="signs none"):
        ManifestChain(None, spec.space_id, path)


def test_a_hub_that_never_signed_is_followed(spec: SpaceSpec, ours: list[Published], tmp_path: Path) -> None:
    path = chain_path(tmp_path, spec)
    chain = ManifestChain(None, spec.space_id, path)
    assert len(followed(Hub(step(ours[0], manifest=None)), spec, chain, 0, 1)) == 1
    assert not path.exists()


def test_a_damaged_chain_file_is_named(tmp_path: Path, spec: SpaceSpec, signer: Signer) -> None:
    path = chain_path(tmp_path, spec)
    for text in ("{", "[]", '{"held": {"x": "y"}, "highest": 3}', '{"held": 5, "highest": 3}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=path.name):
            chain_of(signer, spec, path)


def test_a_signer_of_another_authority_is_refused(spec: SpaceSpec, signer: Signer) -> None:
    other = make_signing("other")
    credentials = Credentials(b"", b"", signer.authority)
    description = SpaceDescription(spec, 1, 1, signer_certificate=other.certificate)
    with pytest.raises(CertificateError, match="not one of this federation's"):
        open_chain(description, credentials, None, NOW)
    description = replace(description, signer_certificate=signer.certificate)
    assert open_chain(description, credentials, None, NOW).highest == 0
    with pytest.raises(FedshareError, match="expired"):
        open_chain(description, credentials, None, NOW + timedelta(days=60))
