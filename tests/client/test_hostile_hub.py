"""A hostile hub behind valid TLS, seven ways: the client's library refuses each, and no guard can go unnoticed.

The listener is real, its certificate is one of the federation's authority, and so is the client's: nothing in TLS is
wrong. What it shows is a true history of the federation's hub (``ours``), parts of another one that the same key has
signed (``theirs``), and what it makes of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from share_client import chain as chain_module
from share_client import feed as feed_module
from share_client.chain import ManifestChain, open_chain
from share_client.feed import VersionFeed
from share_client.link import HubLink
from share_client.sources import Sources
from share_core.errors import CertificateError, DigestError, FedshareError, ManifestError, VersionError
from share_core.identity import (
    Identity,
    Manifest,
    SignedManifest,
    make_authority,
    make_signer,
    parse_manifest,
    sign_manifest,
)
from share_core.identity import manifest as manifest_module
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2

HELD = 3
"""The version that the client has followed and verified before."""
HOUR_MS = 3_600_000

Message = hub_pb2.FollowVersionsResponse
Plant = Callable[[pytest.MonkeyPatch], None]


def now_ms() -> int:
    return int(time.time() * 1000)


@dataclass(frozen=True)
class Stage:
    """What an attack is made of."""

    signed: Any
    spec: SpaceSpec
    signer: Any
    ours: list[Any]
    theirs: list[Any]

    def newest(self, version: int, age_ms: int = 0, key: bytes = b"", **changes: Any) -> Message:
        """Return a signed statement of the newest version of our history."""
        link = self.ours[version - 1].manifest.sha256 if version else ""
        said = Manifest("newest", self.spec.space_id, version, link, "", 0, now_ms() - age_ms)
        return Message(heartbeat=self.signed.proto(sign_manifest(key or self.signer.key, replace(said, **changes))))

    def honest(self) -> list[Message]:
        """Return what the true hub sends to this client."""
        steps = (self.signed.step(one) for one in self.ours[HELD:])
        return [self.newest(len(self.ours)), *(message for step in steps for message in step)]


@dataclass(frozen=True)
class Attack:
    """One way to lie, what must come of it, and the guard without which it would not."""

    messages: Callable[[Stage], list[Message]]
    expected: type[FedshareError]
    words: str
    plant: Plant
    certificate: Callable[[Stage], bytes] | None = None
    """What the hub shows as its signer's certificate, if not the true one."""


def patch(owner: Any, name: str, value: Any) -> Plant:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that verifies nothing."""
    read = lambda verifier, signed: parse_manifest(signed.body)  # noqa: E731
    monkeypatch.setattr(manifest_module.ManifestVerifier, "read", read)


def any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes the key out of whatever certificate it is shown."""
    key = lambda authority, certificate: x509.load_pem_x509_certificate(certificate).public_key()  # noqa: E731
    monkeypatch.setattr(manifest_module, "verified_signer_key", key)


def another_name(stage: Stage) -> bytes:
    """Return the key of the true signer in a certificate of another federation, made under the same name."""
    return recertified(stage, make_authority("somebody else", datetime.now(UTC)), Identity("signer", "org", "hub"))


def recertified(stage: Stage, authority: tuple[bytes, bytes], identity: Identity) -> bytes:
    """Return a certificate over the true signer's key: what makes it is shown the key instead of drawing one."""
    key = serialization.load_pem_private_key(stage.signer.key, password=None)
    with pytest.MonkeyPatch.context() as patched:
        drawn = "share_core.identity.authority.Ed25519PrivateKey.generate"
        patched.setattr(drawn, staticmethod(lambda: key), raising=True)
        return make_signer(*authority, identity, datetime.now(UTC), 30)[0]


def truncated(stage: Stage) -> list[Message]:
    """The last third of a payload is missing, and the header is made to match."""
    one = stage.ours[HELD]
    short = one.delta[: len(one.delta) * 2 // 3]
    return stage.signed.step(replace(one, delta=short))  # type: ignore[no-any-return]


def from_the_future(stage: Stage) -> list[Message]:
    """Version 6, as good as signed, shown as the next one after 3."""
    return stage.signed.step(  # type: ignore[no-any-return]
        stage.ours[5], from_version=HELD, version=HELD + 1, newest_version=HELD + 1
    )


ATTACKS: dict[str, Attack] = {
    "rollback": Attack(
        lambda stage: [stage.newest(HELD - 1)],
        VersionError,
        "the hub went back",
        patch(ManifestChain, "check_newest", lambda chain, version: None),
    ),
    "freeze": Attack(
        lambda stage: [stage.newest(HELD, age_ms=HOUR_MS)],
        VersionError,
        "3600 s old",
        patch(manifest_module, "FRESH_MS", 10**15),
    ),
    "mix-and-match": Attack(
        lambda stage: stage.signed.step(stage.theirs[HELD]),
        ManifestError,
        "mixes two histories",
        patch(chain_module, "_load", lambda path: ({}, HELD)),
    ),
    "wrong key": Attack(
        lambda stage: [stage.newest(HELD, key=stage.signed.make_signing("other").key)],
        ManifestError,
        "the signature is not the hub's",
        blind,
    ),
    "same key under another name": Attack(
        lambda stage: stage.honest(),
        CertificateError,
        "not one of this federation's authority",
        any_name,
        certificate=another_name,
    ),
    "truncated payload": Attack(
        truncated, ManifestError, "payload_sha256", patch(chain_module, "_compare", lambda *arguments: None)
    ),
    "version from the future": Attack(
        from_the_future, ManifestError, "whose version is 6", patch(chain_module, "_compare", lambda *arguments: None)
    ),
}


class HostileHub:
    """Says what it was told to say to everybody."""

    def __init__(self, stage: Stage, messages: list[Message], certificate: bytes) -> None:
        self._stage, self._messages, self._certificate = stage, messages, certificate
        self.quiet = False

    def DescribeSpace(self, request: Any, context: Any) -> hub_pb2.DescribeSpaceResponse:
        spec = self._stage.spec
        return hub_pb2.DescribeSpaceResponse(
            space_id=spec.space_id,
            version=HELD,
            k_max=spec.k_max,
            tau=spec.tau,
            rank_limit=spec.rank_limit,
            signer_certificate_pem=self._certificate,
        )

    def FollowVersions(self, request: hub_pb2.FollowVersionsRequest, context: Any) -> Iterator[Message]:
        yield from self._messages
        while self.quiet and context.is_active():
            time.sleep(0.02)


@pytest.fixture
def stage(signed: Any, spec: SpaceSpec, signer: Any, ours: list[Any], theirs: list[Any]) -> Stage:
    return Stage(signed, spec, signer, ours, theirs)


def kept_chain(stage: Stage, path: Path) -> Path:
    """Leave on the disk what a client has verified that followed the true hub up to :data:`HELD`."""
    chain = stage.signed.chain_of(stage.signer, stage.spec, path)
    stage.signed.followed(
        stage.signed.Hub(*(stage.signed.step(one) for one in stage.ours[:HELD])), stage.spec, chain, 0, HELD
    )
    return path


def followed(
    stage: Stage, serving: Callable[..., HubLink], path: Path, messages: list[Message], certificate: bytes
) -> list[int]:
    """Follow a hub as a session does, over TLS; return the versions that were taken, or raise what it raises."""
    link = serving(HostileHub(stage, messages, certificate))
    credentials = replace(link.credentials, authority=stage.signer.authority)
    chain = open_chain(link.describe(), credentials, path, datetime.now(UTC))
    feed = VersionFeed(link, stage.spec, HELD, lambda error: feed.close(), chain)
    try:
        return [event.version for event in itertools.islice(feed.events(), len(stage.ours) - HELD)]
    finally:
        feed.close()


def refused(name: str, stage: Stage, serving: Callable[..., HubLink], path: Path) -> bool:
    """Return whether an attack ends as it must."""
    attack = ATTACKS[name]
    shown = attack.certificate(stage) if attack.certificate else stage.signer.certificate
    try:
        followed(stage, serving, kept_chain(stage, path), attack.messages(stage), shown)
    except FedshareError as error:
        return type(error) is attack.expected and attack.words in str(error)
    return False


@pytest.mark.usefixtures("waits")
def test_the_true_hub_is_followed(stage: Stage, serving: Callable[..., HubLink], tmp_path: Path) -> None:
    path = kept_chain(stage, tmp_path / "chain.json")
    assert followed(stage, serving, path, stage.honest(), stage.signer.certificate) == [4, 5, 6]


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("name", ATTACKS)
def test_seven_of_seven_are_refused(
    name: str, stage: Stage, serving: Callable[..., HubLink], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(ATTACKS) == 7
    assert refused(name, stage, serving, tmp_path / "chain.json")
    ATTACKS[name].plant(monkeypatch)
    assert not refused(name, stage, serving, tmp_path / "planted.json"), "without its guard it would go unnoticed"


STATEMENTS: dict[str, tuple[Callable[[Stage], Message], type[FedshareError], str]] = {
    "of a time to come": (lambda stage: stage.newest(HELD, age_ms=-HOUR_MS), VersionError, "ahead of this clock"),
    "of another space": (lambda stage: stage.newest(HELD, space_id="sha256:0"), ManifestError, "of sha256:0"),
    "of a snapshot": (lambda stage: stage.newest(HELD, kind="snapshot"), ManifestError, "'snapshot'"),
    "of another history": (lambda stage: stage.newest(HELD, previous="ab" * 32), ManifestError, "different histories"),
    "unsigned": (
        lambda stage: Message(heartbeat=hub_pb2.Manifest(body=stage.newest(HELD).heartbeat.body)),
        ManifestError,
        "the signature is not the hub's",
    ),
}


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("name", STATEMENTS)
def test_other_statements_are_refused(name: str, stage: Stage, serving: Callable[..., HubLink], tmp_path: Path) -> None:
    made, expected, words = STATEMENTS[name]
    path = kept_chain(stage, tmp_path / "chain.json")
    with pytest.raises(expected, match=words):
        followed(stage, serving, path, [made(stage)], stage.signer.certificate)


@pytest.mark.usefixtures("waits")
def test_the_signers_key_in_a_certificate_for_another_role(
    stage: Stage, serving: Callable[..., HubLink], tmp_path: Path
) -> None:
    authority = make_authority("another", datetime.now(UTC))
    trainer = recertified(stage, authority, Identity("trainer", "org", "one"))
    other = replace(stage, signer=replace(stage.signer, authority=authority[0]))
    with pytest.raises(CertificateError, match="expected one share://signer/ name"):
        followed(other, serving, tmp_path / "chain.json", stage.honest(), trainer)


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("relay", [False, True])
def test_a_source_that_says_nothing_is_refused_and_a_relay_left(
    relay: bool, stage: Stage, serving: Callable[..., HubLink], tmp_path: Path
) -> None:
    """It answers, and keeps still: without its word that there is nothing new the client would wait for ever."""
    silent = HostileHub(stage, [], stage.signer.certificate)
    silent.quiet = True
    quiet, true = serving(silent), serving(HostileHub(stage, stage.honest(), stage.signer.certificate))
    chain = stage.signed.chain_of(stage.signer, stage.spec, kept_chain(stage, tmp_path / "chain.json"))
    told: list[str] = []
    sources = Sources(true, quiet, told.append) if relay else Sources(quiet)
    feed = VersionFeed(sources, stage.spec, HELD, chain=chain)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, feed.events())
        try:
            end = time.monotonic() + 30
            feed.expect(0)
            assert not first.done(), "it has ten minutes"
            while not told and not first.done() and time.monotonic() < end:
                feed.expect(0, behind_s=0.0, silent_s=0.0)
                time.sleep(0.02)
            if relay:
                assert first.result().version == HELD + 1
                assert told
            else:
                with pytest.raises(VersionError, match="has not told"):
                    first.result()
        finally:
            feed.close()


def test_a_hub_that_signs_nothing_need_not_speak(
    stage: Stage, serving: Callable[..., HubLink], signed: Any, spec: SpaceSpec
) -> None:
    mute = HostileHub(stage, signed.step(stage.ours[0]), b"")
    mute.quiet = True
    feed = VersionFeed(serving(mute), spec, 0)
    events = feed.events()
    assert next(events).version == 1
    with ThreadPoolExecutor(1) as pool:
        more = pool.submit(next, events, None)
        for _ in range(20):
            feed.expect(0, behind_s=0.0, silent_s=0.0)
            time.sleep(0.01)
        assert not more.done()
        feed.close()
        assert more.result() is None


@pytest.mark.usefixtures("waits")
def test_what_a_statement_names_and_a_relay_does_not_bring_is_missed(
    stage: Stage, serving: Callable[..., HubLink], tmp_path: Path
) -> None:
    held_back = HostileHub(stage, [stage.newest(len(stage.ours))], stage.signer.certificate)
    held_back.quiet = True
    relay, true = serving(held_back), serving(HostileHub(stage, stage.honest(), stage.signer.certificate))
    chain = stage.signed.chain_of(stage.signer, stage.spec, kept_chain(stage, tmp_path / "chain.json"))
    told: list[str] = []
    feed = VersionFeed(Sources(true, relay, told.append), stage.spec, HELD, chain=chain)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, feed.events())
        try:
            end = time.monotonic() + 30
            while not first.done() and time.monotonic() < end:
                if not told:
                    feed.expect(0, behind_s=0.0)
                time.sleep(0.02)
            assert first.result().version == HELD + 1
            assert "has published more" in told[0]
        finally:
            feed.close()


def test_a_payload_that_is_cut_off_is_asked_for_again(
    stage: Stage, serving: Callable[..., HubLink], tmp_path: Path, waits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that breaks is no lie; nothing of what came counts."""
    path = kept_chain(stage, tmp_path / "chain.json")
    broken = stage.signed.step(stage.ours[HELD])[:-1]
    assert followed(stage, serving, path, broken, stage.signer.certificate) == []
    monkeypatch.setattr(feed_module, "collect", lambda *arguments: stage.ours[HELD].delta)
    assert followed(stage, serving, path, broken, stage.signer.certificate) != [], "without the guard it is taken"
    assert DigestError.grpc_code == "DATA_LOSS"


def test_signed_manifest_is_what_travels(stage: Stage) -> None:
    sent = stage.newest(HELD).heartbeat
    assert parse_manifest(SignedManifest(sent.body, sent.signature).body).kind == "newest"
