"""Submit: what is refused, by which name, and that the hub goes on serving."""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import grpc
import pytest
import torch

from share_core.errors import FedshareError, RequestError
from share_core.types import Factors, SiteUpdate, SpaceSpec, Update
from share_core.wire import encode_update
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.config import LimitConfig
from share_server.hub.chunks import read_submit_request
from share_server.local import Holder, LocalHub, submit_header, submit_messages
from share_server.operator import named_error

Hub = hub_pb2_grpc.HubStub


@pytest.fixture(scope="module")
def alice(shared_hub: LocalHub) -> Holder:
    return shared_hub.enrol("acme/alice")


@pytest.fixture
def hub(shared_hub: LocalHub, alice: Holder) -> Iterator[Hub]:
    with shared_hub.hub(alice) as stub:
        yield stub


def _refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, FedshareError]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    assert isinstance(error, grpc.Call)
    return error.code(), named_error(error, "hub")


def _send(hub: Hub, header: hub_pb2.SubmitHeader, payload: bytes) -> hub_pb2.SubmitResponse:
    return hub.Submit(submit_messages(header, payload), timeout=30)


def _until(hub: Hub, update_id: str) -> hub_pb2.UpdateRecord:
    """Return the record of an update once it is no longer waiting."""
    while True:
        record = hub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=update_id), timeout=30).update
        if record.state != hub_pb2.UPDATE_STATE_ACCEPTED:
            return record
        time.sleep(0.02)


def _serves(hub: Hub, spec: SpaceSpec, payload: bytes) -> None:
    header = submit_header(spec, "acme/alive", payload)
    assert _send(hub, header, payload).ingest_seq > 0
    assert _until(hub, header.update_id).state == hub_pb2.UPDATE_STATE_MERGED


def test_an_update_is_acknowledged_merged_and_counted(
    hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    payload = make_payload(1)
    header = submit_header(toy_spec, "acme/first", payload)
    before = hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
    receipt = _send(hub, header, payload)
    assert (receipt.update_id, receipt.duplicate) == (header.update_id, False)
    record = _until(hub, header.update_id)
    assert record.state == hub_pb2.UPDATE_STATE_MERGED
    assert record.member == "acme/alice"
    assert record.payload_sha256 == hashlib.sha256(payload).hexdigest()
    parts = record.bytes
    assert parts.coefficients + parts.directions + parts.heads + parts.envelope == len(payload)
    assert parts.directions > 0
    after = hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
    assert after.version == record.version > before.version
    up = {row.member: row.up.directions for row in after.traffic}
    earlier = {row.member: row.up.directions for row in before.traffic}
    assert up["acme/alice"] - earlier.get("acme/alice", 0) == parts.directions
    listed = {task.task_id: task for task in hub.ListTasks(hub_pb2.ListTasksRequest(), timeout=30).tasks}
    assert listed["acme/first"].owner == "acme/alice"
    assert listed["acme/first"].coefficients > 0


def test_the_same_update_again_gets_the_first_receipt(
    hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    payload = make_payload(2)
    header = submit_header(toy_spec, "acme/again", payload)
    first = _send(hub, header, payload)
    again = _send(hub, header, payload)
    assert (again.ingest_seq, again.entry_hash) == (first.ingest_seq, first.entry_hash)
    assert (first.duplicate, again.duplicate) == (False, True)
    version = _until(hub, header.update_id).version
    assert _send(hub, header, payload).duplicate
    assert _until(hub, header.update_id).version == version
    listed = hub.ListUpdates(hub_pb2.ListUpdatesRequest(after_seq=first.ingest_seq - 1), timeout=30).updates
    assert [row.update_id for row in listed].count(header.update_id) == 1


def test_the_same_id_with_other_bytes_is_a_conflict(
    hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    header = submit_header(toy_spec, "acme/conflict", make_payload(3))
    _send(hub, header, make_payload(3))
    other = submit_header(toy_spec, "acme/conflict", make_payload(4), update_id=header.update_id)
    code, error = _refusal(lambda: _send(hub, other, make_payload(4)))
    assert (code, type(error).__name__) == (grpc.StatusCode.ALREADY_EXISTS, "UpdateConflictError")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"update_id": "x"}, "UpdateIdError"),
        ({"space_id": "sha256:0"}, "SpaceMismatchError"),
        ({"task_id": "acme"}, "TaskNameError"),
        ({"task_id": "acme/../x"}, "TaskNameError"),
        ({"task_id": "rival/task"}, "AccessError"),
        ({"task_id": "acme/unheard-of", "create": False}, "UnknownTaskError"),
        ({"payload_size": 0}, "RequestError"),
        ({"payload_size": -1}, "RequestError"),
        ({"payload_size": 2**40}, "PayloadTooLargeError"),
        ({"payload_size": 100}, "DigestError"),
        ({"payload_size": 10**6}, "DigestError"),
        ({"payload_sha256": "0" * 64}, "DigestError"),
        ({"payload_sha256": "zz"}, "RequestError"),
        ({"lease_id": "lease"}, "RequestError"),
        ({"rows": -1}, "RequestError"),
    ],
)
def test_a_header_that_cannot_be_right_has_a_named_error(
    hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes], change: dict[str, object], expected: str
) -> None:
    payload = make_payload(5)
    header = submit_header(toy_spec, "acme/header", payload)
    for name, value in change.items():
        setattr(header, name, value)
    code, error = _refusal(lambda: _send(hub, header, payload))
    assert type(error).__name__ == expected
    assert code.name == error.grpc_code
    _serves(hub, toy_spec, payload)


def _file(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _update(spec: SpaceSpec, out: torch.Tensor, in_: torch.Tensor, base: int = 0) -> bytes:
    return encode_update(Update(base, {"a": SiteUpdate(residual=Factors(out, in_))}))


def _bad_payloads(spec: SpaceSpec) -> dict[str, tuple[bytes, str]]:
    site = spec.sites["a"]
    out, in_ = torch.ones(site.d_out, 1), torch.ones(site.d_in, 1)
    nan = out.clone()
    nan[3, 0] = float("nan")
    wide = torch.ones(site.d_out, spec.rank_limit + 1), torch.ones(site.d_in, spec.rank_limit + 1)
    good = _update(spec, out, in_)
    return {
        "rubbish": (b"\x80\x04hello world, this is no tensor file", "HeaderError"),
        "header bomb": (struct.pack("<Q", 2**62) + b"{}", "HeaderError"),
        "other format": (_file({"__metadata__": {"format": "x"}}), "HeaderError"),
        "unknown site": (good.replace(b'/a"', b'/q"'), "TensorNameError"),
        "cut short": (good[:-4], "HeaderError"),
        "NaN": (_update(spec, nan, in_), "NonFiniteError"),
        "infinity": (_update(spec, out * float("inf"), in_), "NonFiniteError"),
        "wrong shape": (_update(spec, torch.ones(site.d_out + 1, 1), in_), "TensorShapeError"),
        "rank bomb": (_update(spec, *wide), "TensorShapeError"),
        "future version": (_update(spec, out, in_, base=10**9), "VersionError"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "rubbish",
        "header bomb",
        "other format",
        "unknown site",
        "cut short",
        "NaN",
        "infinity",
        "wrong shape",
        "rank bomb",
        "future version",
    ],
)
def test_a_payload_that_cannot_be_right_has_a_named_error(
    hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes], case: str
) -> None:
    payload, expected = _bad_payloads(toy_spec)[case]
    header = submit_header(toy_spec, "acme/payload", payload)
    _, error = _refusal(lambda: _send(hub, header, payload))
    assert type(error).__name__ == expected, str(error)
    code, missing = _refusal(lambda: hub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=header.update_id), timeout=30))
    assert (code, type(missing).__name__) == (grpc.StatusCode.NOT_FOUND, "UnknownUpdateError")
    _serves(hub, toy_spec, make_payload(6))


def test_more_bytes_than_the_limit_are_not_even_read(
    hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    header = submit_header(toy_spec, "acme/huge", b"x")
    header.payload_size = 2**31
    sent = 0

    def endless() -> Iterator[hub_pb2.SubmitRequest]:
        nonlocal sent
        yield hub_pb2.SubmitRequest(header=header)
        while sent < 2**31:
            sent += 2**20
            yield hub_pb2.SubmitRequest(chunk=bytes(2**20))

    code, error = _refusal(lambda: hub.Submit(endless(), timeout=60))
    assert (code, type(error).__name__) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PayloadTooLargeError")
    assert sent < 2**27
    _serves(hub, toy_spec, make_payload(6))


def test_messages_out_of_order_have_a_named_error(
    hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    payload = make_payload(7)
    header = submit_header(toy_spec, "acme/order", payload)
    first = hub_pb2.SubmitRequest(header=header)
    orders: list[list[hub_pb2.SubmitRequest]] = [
        [],
        [hub_pb2.SubmitRequest(chunk=payload)],
        [hub_pb2.SubmitRequest()],
        [first, first],
        [first, hub_pb2.SubmitRequest(chunk=bytes(2**20 + 1))],
    ]
    for messages in orders:
        _, error = _refusal(lambda messages=messages: hub.Submit(iter(messages), timeout=30))  # type: ignore[misc]
        assert type(error).__name__ == "RequestError"
    _serves(hub, toy_spec, payload)


def test_a_message_over_four_mebibytes_is_refused_by_the_transport(
    hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    message = hub_pb2.SubmitRequest(chunk=bytes(5 * 2**20))
    code, _ = _refusal(lambda: hub.Submit(iter([message]), timeout=30))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    _serves(hub, toy_spec, make_payload(6))


def test_other_organisations_see_nothing_and_write_nothing(
    shared_hub: LocalHub, hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    payload = make_payload(8)
    header = submit_header(toy_spec, "acme/ours", payload)
    _send(hub, header, payload)
    _until(hub, header.update_id)
    with shared_hub.hub(shared_hub.enrol("rival/eve")) as eve:
        report = hub_pb2.Evaluation(task_id="acme/ours", version=1, metric="accuracy", value=0.0)
        refusals = [
            _refusal(lambda: _send(eve, submit_header(toy_spec, "acme/ours", payload), payload)),
            _refusal(lambda: _send(eve, header, payload)),
            _refusal(lambda: eve.GetUpdate(hub_pb2.GetUpdateRequest(update_id=header.update_id), timeout=30)),
            _refusal(lambda: eve.ReportEvaluation(hub_pb2.ReportEvaluationRequest(evaluations=[report]), timeout=30)),
        ]
        names = [type(error).__name__ for _, error in refusals]
        assert names == ["AccessError", "AccessError", "UnknownUpdateError", "AccessError"]
        stolen = submit_header(toy_spec, "rival/x", payload, update_id=header.update_id)
        _, error = _refusal(lambda: _send(eve, stolen, payload))
        assert type(error).__name__ == "UpdateConflictError"
        assert not eve.ListUpdates(hub_pb2.ListUpdatesRequest(), timeout=30).updates
        assert not eve.GetStatus(hub_pb2.GetStatusRequest(), timeout=30).traffic


def test_a_colleague_of_the_owner_may_submit_to_the_task(
    shared_hub: LocalHub, hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    payload = make_payload(9)
    header = submit_header(toy_spec, "acme/shared", payload)
    _send(hub, header, payload)
    _until(hub, header.update_id)
    with shared_hub.hub(shared_hub.enrol("acme/bob", "contributor")) as bob:
        newer = make_payload(10)
        second = submit_header(toy_spec, "acme/shared", newer, create=False)
        _send(bob, second, newer)
        assert _until(bob, second.update_id).state == hub_pb2.UPDATE_STATE_MERGED
        tasks = {row.task_id: row for row in bob.ListTasks(hub_pb2.ListTasksRequest(), timeout=30).tasks}
    assert (tasks["acme/shared"].updates, tasks["acme/shared"].owner) == (2, "acme/alice")


def test_evaluations_are_checked_replaced_and_listed(
    hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    payload = make_payload(11)
    header = submit_header(toy_spec, "acme/measured", payload)
    _send(hub, header, payload)
    version = _until(hub, header.update_id).version

    def report(number: float, **change: object) -> None:
        one = hub_pb2.Evaluation(task_id="acme/measured", version=version, metric="accuracy", value=number, rows=10)
        for name, item in change.items():
            setattr(one, name, item)
        hub.ReportEvaluation(hub_pb2.ReportEvaluationRequest(evaluations=[one]), timeout=30)

    report(0.25)
    report(0.75)
    for change, expected in (
        ({"version": 10**6}, "VersionError"),
        ({"metric": "A B"}, "RequestError"),
        ({"rows": -1}, "RequestError"),
        ({"value": float("nan")}, "RequestError"),
        ({"task_id": "acme/never"}, "UnknownTaskError"),
    ):
        _, error = _refusal(lambda change=change: report(0.5, **change))  # type: ignore[misc]
        assert type(error).__name__ == expected
    listed = hub.ListEvaluations(hub_pb2.ListEvaluationsRequest(), timeout=30).evaluations
    ours = [(row.version, row.metric, row.value, row.rows) for row in listed if row.task_id == "acme/measured"]
    assert ours == [(version, "accuracy", 0.75, 10)]


def test_unknown_updates_have_a_named_error(hub: Hub) -> None:
    request = hub_pb2.GetUpdateRequest(update_id=secrets.token_hex(16))
    code, error = _refusal(lambda: hub.GetUpdate(request, timeout=30))
    assert (code, type(error).__name__) == (grpc.StatusCode.NOT_FOUND, "UnknownUpdateError")


def test_errors_name_no_path_of_the_server(
    shared_hub: LocalHub, hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    _, error = _refusal(lambda: _send(hub, submit_header(toy_spec, "acme/p", b"x" * 20), b"x" * 20))
    assert str(shared_hub.layout.root) not in str(error)
    assert "Traceback" not in str(error)


def test_one_organisation_cannot_hold_all_upload_slots(
    shared_hub: LocalHub, hub: Hub, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    """Stalled uploads of one organisation fill its share; the next one is turned away, others are served."""
    payload = make_payload(3)
    release = threading.Event()

    def stalled(name: str) -> Iterator[hub_pb2.SubmitRequest]:
        yield hub_pb2.SubmitRequest(header=submit_header(toy_spec, f"acme/{name}", payload))
        release.wait(60)

    def upload(name: str) -> FedshareError:
        return _refusal(lambda: hub.Submit(stalled(name), timeout=60))[1]

    share = LimitConfig().concurrent_uploads // 4
    with ThreadPoolExecutor(share + 1) as pool:
        calls = [pool.submit(upload, f"slow{number}") for number in range(share + 1)]
        try:
            done, held = wait(calls, return_when=FIRST_COMPLETED)
            assert ["in progress, its share" in str(call.result()) for call in done] == [True]
            assert len(held) == share
            with shared_hub.hub(shared_hub.enrol("other/bob")) as other:
                header = submit_header(toy_spec, "other/task", payload)
                assert _send(other, header, payload).ingest_seq > 0
        finally:
            release.set()
        assert {type(call.result()).__name__ for call in held} == {"DigestError"}, "the payloads never came"
    _serves(hub, toy_spec, payload)


def test_chunks_are_read_without_protobuf_and_everything_else_with_it() -> None:
    """The quick reader gives what protobuf gives, whatever the bytes; odd encodings take the slow way."""
    request = hub_pb2.SubmitRequest
    for size in (0, 1, 127, 128, 300, 2**20):
        chunk = bytes(range(256)) * (size // 256) + bytes(size % 256)
        read = read_submit_request(request(chunk=chunk).SerializeToString())
        assert isinstance(read, memoryview)
        assert bytes(read) == chunk
    twice = request(chunk=b"first").SerializeToString() + request(chunk=b"second").SerializeToString()
    with_header = request(chunk=b"x").SerializeToString() + request(header={"update_id": "u"}).SerializeToString()
    padded = b"\x12\x83\x00abc"  # a length in two bytes where one would do
    for data in (twice, with_header, b"", request(header={"rows": 3}).SerializeToString()):
        read = read_submit_request(data)
        assert isinstance(read, request)
        assert read == request.FromString(data)
    read = read_submit_request(padded)
    assert (bytes(read) if isinstance(read, memoryview) else read.chunk) == request.FromString(padded).chunk
    for broken in (b"\x12", b"\x12\x05abc", b"\x12\xff\xff\xff\xff\xff\xff", b"\x12\xff"):
        with pytest.raises(RequestError, match="neither"):
            read_submit_request(broken)
