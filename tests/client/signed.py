"""A hub's history as it is published, signed and chained, and a stand-in for a hub that sends it, true or not."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from share_client.chain import ManifestChain
from share_client.feed import VersionFeed
from share_client.link import HubLink
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
    """Return a federation of its own."""
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
    """Messages of one subscription; counts how many were read."""

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


def required(newest: int) -> list[Message]:
    return [Message(snapshot_required=hub_pb2.SnapshotRequired(newest_version=newest))]
