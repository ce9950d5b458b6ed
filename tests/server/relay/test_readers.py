"""Readers that come late, and readers that take nothing, at a relay of large versions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from share_core.types import SpaceSpec
from share_core.wire import decode_snapshot
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.relay.verify import Checker

IMPATIENT = (
    "import dataclasses\nfrom share_server.relay import process\nreal = process._build\n"
    "process._build = lambda home, state, limits, pace: real(\n"
    "    home, state, dataclasses.replace(limits, write_timeout_s=1.0), pace)\n"
)


def _whole(stub: hub_pb2_grpc.HubStub, spec: SpaceSpec) -> tuple[hub_pb2.SnapshotHeader, bytes]:
    """Fetch the newest version whole."""
    messages = list(stub.FetchSnapshot(hub_pb2.FetchSnapshotRequest(space_id=spec.space_id), timeout=60))
    return messages[0].header, b"".join(message.chunk for message in messages[1:])


def test_late_readers_begin_with_a_whole_version(
    new_stand: Callable[..., Any],
    publish: Callable[..., int],
    read_steps: Callable[..., list[tuple[bytes, bytes]]],
    wide_spec: SpaceSpec,
    wide_payload: Callable[[int], bytes],
) -> None:
    # The relay is late itself: the hub sends it a whole version.
    stand = new_stand([wide_payload(seed) for seed in range(2)], spec=wide_spec)
    for seed in range(2, 5):
        last = publish(stand.hub, stand.alice, wide_payload(seed))
    stand.relay.wait_for(stand.alice, last)
    request = hub_pb2.FollowVersionsRequest(space_id=wide_spec.space_id)
    with stand.relay.stub(stand.alice) as stub:
        answers = list(stub.FollowVersions(request, timeout=60))
        assert [answer.WhichOneof("part") for answer in answers] == ["heartbeat", "snapshot_required"]
        # The hub's own words, as only its key can sign them.
        checker = Checker(
            stand.hub.layout.ca_cert.read_bytes(), stand.hub.layout.signing_certificate.read_bytes(), wide_spec.space_id
        )
        assert stand.version <= checker.newest(answers[0].heartbeat) <= last
        header, payload = _whole(stub, wide_spec)
        assert hashlib.sha256(payload).hexdigest() == header.payload_sha256
        assert decode_snapshot(payload, wide_spec).version == header.version
        assert stand.version <= header.version <= last
        if header.version < last:
            assert len(read_steps(stub, wide_spec, last, header.version)) == last - header.version
    assert stand.hub.stop() == 0


def test_a_reader_that_takes_nothing_is_cut(
    new_stand: Callable[..., Any],
    stall: Callable[..., None],
    wide_spec: SpaceSpec,
    wide_payload: Callable[[int], bytes],
) -> None:
    stand = new_stand([wide_payload(seed) for seed in range(3)], spec=wide_spec, planted=IMPATIENT)
    authority = stand.hub.layout.ca_cert.read_bytes()
    stall(stand.relay.address, authority, stand.alice, wide_spec.space_id, stand.relay.said)
    with stand.relay.stub(stand.alice) as stub:  # the others go on
        header, payload = _whole(stub, wide_spec)
        assert len(payload) == header.payload_size
