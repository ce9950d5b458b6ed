"""Signed manifests in the feed: every way in which a relay or a hub could lie, and the feeds that would believe it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from share_client import chain as module
from share_client.chain import ManifestChain
from share_client.feed import VersionFeed
from share_client.link import HubLink
from share_core.errors import DigestError, ManifestError
from share_core.identity import SignedManifest, parse_manifest, sign_manifest
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2

History = list[Any]


@pytest.mark.parametrize("inline", [0, 100, 10**6])
def test_an_honest_hub_is_followed(inline: int, signed: Any, spec: SpaceSpec, signer: Any, ours: History) -> None:
    chain = signed.chain_of(signer, spec)
    events = signed.followed(signed.Hub(*(signed.step(one, inline) for one in ours)), spec, chain, 0, signed.VERSIONS)
    assert [event.version for event in events] == list(range(1, signed.VERSIONS + 1))
    assert chain.highest == signed.VERSIONS


LIES: dict[str, tuple[str, Callable[[Any, History, History, Any], list[Any]]]] = {
    "no manifest": (
        "without its signed manifest",
        lambda signed, ours, theirs, other: signed.step(ours[3], manifest=None),
    ),
    "forged": (
        "signature is not the hub's",
        lambda signed, ours, theirs, other: signed.step(
            ours[3], manifest=hub_pb2.Manifest(body=ours[3].manifest.body, signature=b"\0" * 64)
        ),
    ),
    "signed by another": (
        "signature is not the hub's",
        lambda signed, ours, theirs, other: signed.step(ours[3], manifest=signed.proto(resigned(ours[3], other))),
    ),
    "body changed": (
        "signature is not the hub's",
        lambda signed, ours, theirs, other: signed.step(
            ours[3],
            manifest=hub_pb2.Manifest(
                body=ours[3].manifest.body.replace(b'"version":4', b'"version":5'), signature=ours[3].manifest.signature
            ),
        ),
    ),
    "another history from here": ("does not continue", lambda signed, ours, theirs, other: signed.step(theirs[3])),
    "payload of another history": (
        "payload_sha256",
        lambda signed, ours, theirs, other: signed.step(theirs[3], manifest=signed.proto(ours[3].manifest)),
    ),
    "size of another payload": (
        "payload_size",
        lambda signed, ours, theirs, other: signed.step(ours[3], payload_size=len(ours[3].delta) + 1),
    ),
    "manifest of the version before": (
        "version is 3",
        lambda signed, ours, theirs, other: signed.step(ours[3], manifest=signed.proto(ours[2].manifest)),
    ),
    "manifest of a snapshot": (
        "kind",
        lambda signed, ours, theirs, other: signed.step(ours[3], manifest=signed.proto(ours[3].whole)),
    ),
    "a step repeated as the next": (
        "does not continue",
        lambda signed, ours, theirs, other: signed.step(
            ours[3], manifest=signed.proto(relinked(ours[3], ours[1], other))
        ),
    ),
}


def resigned(one: Any, signer: Any) -> SignedManifest:
    """Return the manifest as another hub would sign it: in order but for the key."""
    again = sign_manifest(signer.key, parse_manifest(one.manifest.body))
    assert again.body == one.manifest.body
    return again


def relinked(one: Any, before: Any, signer: Any) -> SignedManifest:
    """Return the manifest signed by the hub itself, but following an older version."""
    return sign_manifest(signer.key, replace(parse_manifest(one.manifest.body), previous=before.manifest.sha256))


def run_lie(name: str, signed: Any, spec: SpaceSpec, signer: Any, ours: History, theirs: History) -> Any:
    words, lie = LIES[name]
    other = signed.make_signing("other") if name == "signed by another" else signer
    hub = signed.Hub(lie(signed, ours, theirs, other))
    with pytest.raises(ManifestError, match=words) as raised:
        signed.followed(hub, spec, signed.holding(signer, spec, ours, 3), 3, 1)
    assert len(hub.streams) == 1, "asked again, the feed might be given something it accepts"
    assert "operator" in str(raised.value), "the sentence says what to do"
    return hub


@pytest.mark.parametrize("name", LIES)
def test_a_lie_stops_the_feed_before_the_payload(
    name: str, signed: Any, spec: SpaceSpec, signer: Any, ours: History, theirs: History
) -> None:
    assert run_lie(name, signed, spec, signer, ours, theirs).streams[0].read == 1, "the payload was read"


def credulous(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the chain on purpose."""

    def blind(chain: ManifestChain, header: Any, field: str, what: str) -> Any:
        sent = getattr(header, field)
        return SignedManifest(sent.body, sent.signature), parse_manifest(sent.body)

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
    signed: Any,
    spec: SpaceSpec,
    signer: Any,
    ours: History,
    theirs: History,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    credulous(bug, monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        run_lie(lie, signed, spec, signer, ours, theirs)


@pytest.mark.usefixtures("waits")
def test_planted_bug_a_feed_that_asks_again_is_caught(
    signed: Any,
    spec: SpaceSpec,
    signer: Any,
    ours: History,
    theirs: History,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    credulous("asks again", monkeypatch)
    hub = signed.Hub(signed.step(theirs[3]))
    feed = VersionFeed(cast(HubLink, hub), spec, 3, lambda error: feed.close(), signed.holding(signer, spec, ours, 3))
    assert list(feed.events()) == [], "it waited instead of raising: the test above would fail"


def test_mix_and_match_is_noticed_where_two_histories_meet(
    signed: Any, spec: SpaceSpec, signer: Any, ours: History, theirs: History
) -> None:
    """Both histories are signed by the hub; only the links tell them apart, whichever version the switch is at."""
    assert ours[1].manifest == theirs[1].manifest, "they part after version 2"
    for switch in range(3, signed.VERSIONS):
        parts = [signed.step(one) for one in ours[:switch]] + [signed.step(one) for one in theirs[switch:]]
        feed = VersionFeed(cast(HubLink, signed.Hub(*parts)), spec, 0, chain=signed.chain_of(signer, spec))
        seen: list[int] = []
        with pytest.raises(ManifestError, match="does not continue"):
            seen.extend(event.version for event in feed.events())
        assert seen == list(range(1, switch + 1))
