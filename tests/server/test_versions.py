"""Versions: restarts resume bit for bit, streams resume anywhere, a snapshot is the chain of its deltas."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import grpc
import pytest
import torch

from share_core.space import advance, empty_space, task_adapter, update_adapter
from share_core.types import Space, SpaceSpec
from share_core.wire import decode_delta, decode_snapshot, decode_update, encode_snapshot
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.config import LimitConfig
from share_server.local import Holder, LocalHub, read_deltas, submit_header, submit_messages
from share_server.operator import named_error

Hub = hub_pb2_grpc.HubStub


def _submit(hub: Hub, spec: SpaceSpec, task: str, payload: bytes) -> hub_pb2.UpdateRecord:
    """Submit and wait until it is merged or refused."""
    header = submit_header(spec, task, payload)
    hub.Submit(submit_messages(header, payload), timeout=30)
    while True:
        record = hub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=header.update_id), timeout=30).update
        if record.state != hub_pb2.UPDATE_STATE_ACCEPTED:
            return record
        time.sleep(0.02)


def _snapshot(hub: Hub, spec: SpaceSpec, version: int = 0) -> bytes:
    parts = list(hub.FetchSnapshot(hub_pb2.FetchSnapshotRequest(space_id=spec.space_id, version=version), timeout=30))
    payload = b"".join(part.chunk for part in parts[1:])
    assert len(payload) == parts[0].header.payload_size
    return payload


def _follow(hub: Hub, spec: SpaceSpec, since: int, upto: int) -> Iterator[tuple[int, bytes]]:
    request = hub_pb2.FollowVersionsRequest(space_id=spec.space_id, since_version=since)
    stream = hub.FollowVersions(request, timeout=60)
    for version, payload in read_deltas(stream):
        yield version, payload
        if version == upto:
            stream.cancel()
            return


def _replay(spec: SpaceSpec, space: Space, deltas: Iterator[tuple[int, bytes]]) -> Space:
    for _, payload in deltas:
        space = advance(space, decode_delta(payload, spec))
    return space


def _assert_same(one: Space, other: Space) -> None:
    """Equal to the bit, in bases and cores."""
    assert one.version == other.version
    assert one.bases.keys() == other.bases.keys()
    for site, basis in one.bases.items():
        assert torch.equal(basis.left, other.bases[site].left)
        assert torch.equal(basis.right, other.bases[site].right)
    assert one.cores.keys() == other.cores.keys()
    for task, cores in one.cores.items():
        assert cores.keys() == other.cores[task].keys()
        for site, core in cores.items():
            assert torch.equal(core.out, other.cores[task][site].out)
            assert torch.equal(core.in_, other.cores[task][site].in_)


@pytest.fixture(scope="module")
def alice(shared_hub: LocalHub) -> Holder:
    return shared_hub.enrol("acme/alice")


def test_a_restarted_hub_holds_the_same_bits_and_goes_on(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    server = new_hub()
    server.start()
    holder = server.enrol("acme/alice")
    compactions = 0
    with server.hub(holder) as hub:
        for number in range(9):
            assert _submit(hub, toy_spec, f"acme/t{number}", make_payload(number)).version == number + 1
        compactions = hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30).compactions
        before = {version: _snapshot(hub, toy_spec, version) for version in range(1, 10)}
        tasks = hub.ListTasks(hub_pb2.ListTasksRequest(), timeout=30)
        status = hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
        base3 = decode_snapshot(before[3], toy_spec)
    assert compactions >= 2, "the test means to cross compactions"
    server.kill()
    server.start()
    with server.hub(holder) as hub:
        after = {version: _snapshot(hub, toy_spec, version) for version in range(1, 10)}
        assert after == before
        assert hub.ListTasks(hub_pb2.ListTasksRequest(), timeout=30) == tasks
        again = hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
        assert (again.version, again.merged, again.compactions) == (9, 9, compactions)
        for now, then in zip(again.traffic, status.traffic, strict=True):
            assert now.up == then.up
            assert now.down_snapshots >= then.down_snapshots > 0
        record = _submit(hub, toy_spec, "acme/stale", make_payload(40, base3))
        assert (record.state, record.version, record.staleness) == (hub_pb2.UPDATE_STATE_MERGED, 10, 6)
        assert dict(_follow(hub, toy_spec, 8, 10)).keys() == {9, 10}
    assert server.stop() == 0


def test_a_stale_update_is_lifted_in_the_bases_it_was_trained_in(
    shared_hub: LocalHub, alice: Holder, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    with shared_hub.hub(alice) as hub:
        start = hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30).version
        _submit(hub, toy_spec, "acme/base", make_payload(100))
        base = decode_snapshot(_snapshot(hub, toy_spec, start + 1), toy_spec)
        _submit(hub, toy_spec, "acme/between", make_payload(101))
        payload = make_payload(102, base)
        record = _submit(hub, toy_spec, "acme/lifted", payload)
        assert record.staleness == 1
        stored = task_adapter(decode_snapshot(_snapshot(hub, toy_spec, record.version), toy_spec), "acme/lifted")
    meant = update_adapter(decode_update(payload, toy_spec), base.bases)
    wrong = 0.0
    total = 0.0
    for site, factors in meant.items():
        expected = factors.out @ factors.in_.T
        got = stored[site].out.double() @ stored[site].in_.double().T
        wrong += float((expected - got).square().sum())
        total += float(expected.square().sum())
    assert (wrong / total) ** 0.5 <= record.relative_error + 1e-5
    assert record.relative_error <= toy_spec.tau + 1e-6


def test_following_from_anywhere_gives_the_same_versions(
    shared_hub: LocalHub, alice: Holder, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    with shared_hub.hub(alice) as hub:
        for number in range(3):
            newest = _submit(hub, toy_spec, f"acme/f{number}", make_payload(200 + number)).version
        whole = dict(_follow(hub, toy_spec, 0, newest))
        assert list(whole) == list(range(1, newest + 1))
        for since in range(newest):
            assert dict(_follow(hub, toy_spec, since, newest)) == {v: whole[v] for v in range(since + 1, newest + 1)}
        chain = _replay(toy_spec, empty_space(toy_spec), iter(whole.items()))
        _assert_same(chain, decode_snapshot(_snapshot(hub, toy_spec), toy_spec))


def test_a_waiting_reader_gets_new_versions_and_is_counted(
    shared_hub: LocalHub, alice: Holder, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    reader = shared_hub.enrol("reading/reader", "reader")
    with shared_hub.hub(alice) as hub, shared_hub.hub(reader) as reading:
        newest = hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30).version
        request = hub_pb2.FollowVersionsRequest(space_id=toy_spec.space_id, since_version=newest)
        stream = reading.FollowVersions(request, timeout=60)
        deltas = read_deltas(stream)
        received = 0
        for number in range(3):
            record = _submit(hub, toy_spec, f"acme/w{number}", make_payload(300 + number))
            version, payload = next(deltas)
            assert version == record.version
            received += len(payload)
        status = reading.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
        assert status.subscribers == 1
        assert [(row.member, row.down_deltas) for row in status.traffic] == [("reading/reader", received)]
        stream.cancel()
        snapshot = _snapshot(reading, toy_spec)
        status = reading.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
        assert status.traffic[0].down_snapshots == len(snapshot)


@pytest.mark.parametrize(
    ("space_id", "version", "expected"),
    [("sha256:0", 0, "SpaceMismatchError"), (None, 10**6, "VersionError"), (None, -1, "RequestError")],
)
def test_streams_refuse_what_this_hub_never_had(
    shared_hub: LocalHub, alice: Holder, toy_spec: SpaceSpec, space_id: str | None, version: int, expected: str
) -> None:
    wanted = space_id or toy_spec.space_id
    with shared_hub.hub(alice) as hub:
        follow = hub_pb2.FollowVersionsRequest(space_id=wanted, since_version=version)
        fetch = hub_pb2.FetchSnapshotRequest(space_id=wanted, version=version)
        for call in (hub.FollowVersions(follow, timeout=30), hub.FetchSnapshot(fetch, timeout=30)):
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert type(named_error(caught.value, "hub")).__name__ == expected


def test_an_empty_space_can_be_fetched_and_followed(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    server = new_hub()
    server.start()
    with server.hub(server.enrol("acme/alice")) as hub:
        assert _snapshot(hub, toy_spec) == encode_snapshot(empty_space(toy_spec))
        stream = hub.FollowVersions(hub_pb2.FollowVersionsRequest(space_id=toy_spec.space_id), timeout=60)
        _submit(hub, toy_spec, "acme/first", make_payload(1))
        assert next(read_deltas(stream))[0] == 1
        # Stopping ends the stream with a named, retryable error instead of a broken connection.
        assert server.stop() == 0
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert type(named_error(caught.value, "hub")).__name__ == "UnavailableError"


def test_an_expired_right_ends_an_open_stream(new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec) -> None:
    server = new_hub(limits=LimitConfig(recheck_s=0.2))
    server.start()
    holder = server.enrol("acme/alice")
    with server.hub(holder) as hub:
        stream = hub.FollowVersions(hub_pb2.FollowVersionsRequest(space_id=toy_spec.space_id), timeout=60)
        hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
        server.enrol("acme/alice")  # with another key: the first certificate is replaced
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert type(named_error(caught.value, "hub")).__name__ == "CertificateError"
        with pytest.raises(grpc.RpcError) as caught:
            hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
        assert type(named_error(caught.value, "hub")).__name__ == "CertificateError"
