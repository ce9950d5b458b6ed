"""Readers that come late, and readers that take nothing, at a relay of large versions."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch
from grpc import aio

from share_core.fingerprint import describe_space
from share_core.types import Factors, SiteUpdate, SpaceSpec, Update
from share_core.wire import decode_snapshot, encode_update
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.local import Holder
from share_server.operator import CHANNEL_OPTIONS

IMPATIENT = (
    "import dataclasses\nfrom share_server.relay import process\nreal = process._build\n"
    "process._build = lambda home, state, limits, pace: real(\n"
    "    home, state, dataclasses.replace(limits, write_timeout_s=1.0), pace)\n"
)


@pytest.fixture(scope="module")
def wide_spec() -> SpaceSpec:
    """One site whose bases are a few megabytes: a chain of steps soon is larger than a whole version."""
    return describe_space("wide", {"w": torch.zeros(40_000, 8)}, k_max=8, rank_limit=8)


def _payload(spec: SpaceSpec, seed: int) -> bytes:
    draw = torch.Generator().manual_seed(seed)
    site = spec.sites["w"]
    factors = Factors(torch.randn(site.d_out, 8, generator=draw), torch.randn(site.d_in, 8, generator=draw))
    return encode_update(Update(0, {"w": SiteUpdate(residual=factors)}))


def _whole(stub: hub_pb2_grpc.HubStub, spec: SpaceSpec) -> tuple[hub_pb2.SnapshotHeader, bytes]:
    """Fetch the newest version whole."""
    messages = list(stub.FetchSnapshot(hub_pb2.FetchSnapshotRequest(space_id=spec.space_id), timeout=60))
    return messages[0].header, b"".join(message.chunk for message in messages[1:])


def test_late_readers_begin_with_a_whole_version(
    new_stand: Callable[..., Any],
    publish: Callable[..., int],
    read_steps: Callable[..., list[tuple[bytes, bytes]]],
    wide_spec: SpaceSpec,
) -> None:
    # The relay is late itself: the hub sends it a whole version.
    stand = new_stand([_payload(wide_spec, seed) for seed in range(2)], spec=wide_spec)
    for seed in range(2, 5):
        last = publish(stand.hub, stand.alice, _payload(wide_spec, seed))
    stand.relay.wait_for(stand.alice, last)
    request = hub_pb2.FollowVersionsRequest(space_id=wide_spec.space_id)
    with stand.relay.stub(stand.alice) as stub:
        answers = list(stub.FollowVersions(request, timeout=60))
        assert [answer.WhichOneof("part") for answer in answers] == ["snapshot_required"]
        header, payload = _whole(stub, wide_spec)
        assert hashlib.sha256(payload).hexdigest() == header.payload_sha256
        assert decode_snapshot(payload, wide_spec).version == header.version
        assert stand.version <= header.version <= last
        if header.version < last:
            assert len(read_steps(stub, wide_spec, last, header.version)) == last - header.version
    assert stand.hub.stop() == 0


def test_a_reader_that_takes_nothing_is_cut(new_stand: Callable[..., Any], wide_spec: SpaceSpec) -> None:
    stand = new_stand([_payload(wide_spec, seed) for seed in range(3)], spec=wide_spec, planted=IMPATIENT)
    asyncio.run(_stall(stand.relay, stand.alice))
    with stand.relay.stub(stand.alice) as stub:  # the others go on
        header, payload = _whole(stub, wide_spec)
        assert len(payload) == header.payload_size


async def _stall(relay: Any, holder: Holder) -> None:
    """Ask for a whole version, take one message, and nothing more until the relay ends it."""
    authority = relay.hub.layout.ca_cert.read_bytes()
    credentials = grpc.ssl_channel_credentials(authority, holder.key, holder.certificate)
    window = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with aio.secure_channel(relay.address, credentials, [*CHANNEL_OPTIONS, *window]) as channel:
        request = hub_pb2.FetchSnapshotRequest(space_id=relay.hub.spec.space_id)
        stream = hub_pb2_grpc.HubStub(channel).FetchSnapshot(request, timeout=120)
        first: Any = await stream.read()
        assert first.header.payload_size > 1_000_000
        end = time.monotonic() + 60
        while "nothing was read" not in relay.said():
            assert time.monotonic() < end, "the reader was never cut"
            await asyncio.sleep(0.05)
