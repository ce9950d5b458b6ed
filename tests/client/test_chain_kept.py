"""What a client has verified stays so: over whole versions, restarts, kills, and with a hub that stops signing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from share_client.cache import SpaceCache, chain_path
from share_client.chain import ManifestChain, open_chain
from share_client.feed import fetch_newest
from share_client.link import HubLink, SpaceDescription
from share_client.member import Credentials
from share_core.errors import CertificateError, ConfigError, FedshareError, ManifestError, VersionError
from share_core.types import SpaceSpec

History = list[Any]


def test_a_snapshot_starts_the_chain_anew(
    signed: Any, spec: SpaceSpec, signer: Any, ours: History, theirs: History
) -> None:
    chain = signed.holding(signer, spec, ours, 1)
    events = signed.followed(signed.Hub(signed.required(4), snapshot=ours[3]), spec, chain, 1, 1)
    assert [event.version for event in events] == [4]
    assert [event.version for event in signed.followed(signed.Hub(signed.step(ours[4])), spec, chain, 4, 1)] == [5]
    with pytest.raises(ManifestError, match="does not continue"):
        signed.followed(signed.Hub(signed.step(theirs[4])), spec, holding_from(signed, signer, spec, ours[3]), 4, 1)


def holding_from(signed: Any, signer: Any, spec: SpaceSpec, one: Any) -> ManifestChain:
    chain: ManifestChain = signed.chain_of(signer, spec)
    fetch_newest(cast(HubLink, signed.Hub(snapshot=one)), spec, chain)
    return chain


SNAPSHOT_LIES: dict[str, tuple[str, Callable[[Any, History, History], dict[str, Any]]]] = {
    "no manifest": ("without its signed", lambda signed, ours, theirs: {"manifest": None}),
    "no version manifest": ("without its signed", lambda signed, ours, theirs: {"version_manifest": None}),
    "payload exchanged": ("payload_sha256", lambda signed, ours, theirs: {"payload_sha256": signed.sha(b"other")}),
    "manifest of a step": ("kind", lambda signed, ours, theirs: {"manifest": signed.proto(ours[4].manifest)}),
    "manifest of another version": (
        "version is 4",
        lambda signed, ours, theirs: {"manifest": signed.proto(ours[3].whole)},
    ),
    "linked into another history": (
        "two histories",
        lambda signed, ours, theirs: {"version_manifest": signed.proto(theirs[4].manifest)},
    ),
    "another version's link": (
        "exchanged it",
        lambda signed, ours, theirs: {"version_manifest": signed.proto(ours[3].manifest)},
    ),
}


@pytest.mark.parametrize("name", SNAPSHOT_LIES)
def test_a_lie_about_a_snapshot(
    name: str, signed: Any, spec: SpaceSpec, signer: Any, ours: History, theirs: History
) -> None:
    words, changes = SNAPSHOT_LIES[name]
    hub = signed.Hub(signed.required(5), snapshot=ours[4], **changes(signed, ours, theirs))
    with pytest.raises(ManifestError, match=words):
        signed.followed(hub, spec, signed.holding(signer, spec, ours, 2), 2, 1)


def test_a_snapshot_is_never_older_than_what_was_seen(signed: Any, spec: SpaceSpec, signer: Any, ours: History) -> None:
    """The client was at 5; its cache is older. A relay that holds versions back would take it to 4."""
    with pytest.raises(VersionError, match="older than version 5"):
        signed.followed(
            signed.Hub(signed.required(4), snapshot=ours[3]), spec, signed.holding(signer, spec, ours, 5), 2, 1
        )


def test_a_version_seen_before_must_be_the_same_one(
    signed: Any, spec: SpaceSpec, signer: Any, ours: History, theirs: History
) -> None:
    chain = signed.holding(signer, spec, ours, 4)
    assert len(signed.followed(signed.Hub(signed.step(ours[2]), signed.step(ours[3])), spec, chain, 2, 2)) == 2, (
        "walking again is fine"
    )
    with pytest.raises(ManifestError, match="different histories"):
        signed.followed(signed.Hub(signed.step(theirs[2])), spec, chain, 2, 1)
    with pytest.raises(ManifestError, match="different histories"):
        signed.followed(signed.Hub(signed.required(4), snapshot=theirs[3]), spec, chain, 2, 1)


@pytest.mark.parametrize("bug", ["", "the chain is kept in memory only"])
def test_a_restart_continues_the_chain(
    bug: str, tmp_path: Path, signed: Any, spec: SpaceSpec, signer: Any, ours: History, theirs: History
) -> None:
    """The first life caches version 3 and sees 5; the second is offered another history from the cached version on."""
    path = None if bug else chain_path(tmp_path, spec)
    chain = signed.chain_of(signer, spec, path)
    cache = SpaceCache(tmp_path, spec, chain)
    signed.followed(signed.Hub(*(signed.step(one) for one in ours[:3])), spec, chain, 0, 3)
    cache.save(ours[2].space)
    signed.followed(signed.Hub(*(signed.step(one) for one in ours[3:5])), spec, chain, 3, 2)

    def second_life(offered: History, since: int) -> list[int]:
        chain = signed.chain_of(signer, spec, path)
        kept = SpaceCache(tmp_path, spec, chain).load()
        assert kept is not None
        assert kept.version == since
        events = signed.followed(signed.Hub(*(signed.step(one) for one in offered)), spec, chain, since, len(offered))
        return [event.version for event in events]

    if bug:
        assert second_life(theirs[3:5], 3) == [4, 5], "so the test would fail"
        return
    with pytest.raises(ManifestError, match="does not continue"):
        second_life(theirs[3:5], 3)
    assert second_life(ours[3:6], 3) == [4, 5, 6]
    with pytest.raises(VersionError, match="went back"):
        signed.chain_of(signer, spec, path).check_newest(5)


def test_killed_between_chain_and_cache_the_older_cache_still_continues(
    tmp_path: Path, signed: Any, spec: SpaceSpec, signer: Any, ours: History
) -> None:
    path = chain_path(tmp_path, spec)
    chain = signed.chain_of(signer, spec, path)
    cache = SpaceCache(tmp_path, spec, chain)
    signed.followed(signed.Hub(*(signed.step(one) for one in ours[:5])), spec, chain, 0, 5)
    cache.save(ours[1].space)
    chain.before_cached(4)  # the crash is here: the cache still holds version 2
    again = signed.chain_of(signer, spec, path)
    signed.followed(signed.Hub(*(signed.step(one) for one in ours[2:])), spec, again, 2, 4)
    assert sorted(again._held) == [2, 3, 4, 5, 6]
    cache = SpaceCache(tmp_path, spec, again)
    cache.save(ours[3].space)
    cache.save(ours[4].space)
    assert min(signed.chain_of(signer, spec, path)._held) == 4, "what no cache needs is forgotten"


def test_a_hub_that_signed_may_not_stop_signing(
    tmp_path: Path, signed: Any, spec: SpaceSpec, signer: Any, ours: History
) -> None:
    path = chain_path(tmp_path, spec)
    signed.followed(signed.Hub(signed.step(ours[0])), spec, signed.chain_of(signer, spec, path), 0, 1)
    with pytest.raises(ManifestError, match="signs none"):
        ManifestChain(None, spec.space_id, path)


def test_a_hub_that_never_signed_is_followed(signed: Any, spec: SpaceSpec, ours: History, tmp_path: Path) -> None:
    path = chain_path(tmp_path, spec)
    chain = ManifestChain(None, spec.space_id, path)
    assert len(signed.followed(signed.Hub(signed.step(ours[0], manifest=None)), spec, chain, 0, 1)) == 1
    assert not path.exists()


def test_a_damaged_chain_file_is_named(tmp_path: Path, signed: Any, spec: SpaceSpec, signer: Any) -> None:
    path = chain_path(tmp_path, spec)
    for text in ("{", "[]", '{"held": {"x": "y"}, "highest": 3}', '{"held": 5, "highest": 3}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=path.name):
            signed.chain_of(signer, spec, path)


def test_a_signer_of_another_authority_is_refused(signed: Any, spec: SpaceSpec, signer: Any) -> None:
    other = signed.make_signing("other")
    credentials = Credentials(b"", b"", signer.authority)
    description = SpaceDescription(spec, 1, 1, signer_certificate=other.certificate)
    with pytest.raises(CertificateError, match="not one of this federation's"):
        open_chain(description, credentials, None, signed.NOW)
    description = replace(description, signer_certificate=signer.certificate)
    assert open_chain(description, credentials, None, signed.NOW).highest == 0
    with pytest.raises(FedshareError, match="expired"):
        open_chain(description, credentials, None, signed.NOW + timedelta(days=60))
