"""Uploads that break and go on, over real connections with mutual TLS, and the clients that would do it wrong."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from share_client import link as link_module
from share_client import uploading
from share_client.channel import CHUNK_BYTES
from share_client.egress_check import look
from share_client.link import HubLink, patiently
from share_client.member import load_credentials, load_member
from share_client.signing import sign_submission
from share_client.uploading import Submission, upload
from share_core.errors import (
    GO_AHEAD_KEY,
    DigestError,
    FedshareError,
    OverloadError,
    RequestError,
    UnavailableError,
    UpdateConflictError,
)
from share_core.types import Factors, SiteUpdate, SpaceSpec, Update
from share_core.wire import encode_update
from share_proto.v1 import hub_pb2

NEVER = threading.Event()
MIB = CHUNK_BYTES
PAYLOAD = bytes(range(256)) * (5 * MIB // 256) + b"the last bytes"
SUBMISSION = Submission(
    update_id="ab" * 16,
    space_id="s",
    task_id="org/task",
    create=True,
    payload_size=len(PAYLOAD),
    payload_sha256=hashlib.sha256(PAYLOAD).hexdigest(),
)


@dataclass
class Attempt:
    """One Submit call as the hub saw it."""

    offset: int
    received: int = 0


@dataclass
class Intake:
    """A hub that keeps what arrived, and breaks as planned: one entry of ``plan`` for each attempt.

    A number breaks the connection once the staging file has that many bytes; ``lost`` loses the answer;
    ``overwritten`` damages what was staged; an error refuses. One that does not resume is of an older release: it gives
    no go-ahead either.
    """

    plan: list[int | str | FedshareError] = field(default_factory=list)
    resumes: bool = True
    attempts: list[Attempt] = field(default_factory=list)
    questions: int = 0
    staged: bytearray = field(default_factory=bytearray)
    done: bool = False

    def Submit(self, request_iterator: Iterator[hub_pb2.SubmitRequest], context: Any) -> hub_pb2.SubmitResponse:
        header = next(request_iterator).header
        attempt = Attempt(header.offset)
        self.attempts.append(attempt)
        fault = self.plan.pop(0) if self.plan else None
        if isinstance(fault, FedshareError):
            self._refuse(context, fault)
        if header.offset > len(self.staged):
            self._refuse(context, RequestError(f"nothing is known up to {header.offset}"))
        if self.resumes:
            context.send_initial_metadata(((GO_AHEAD_KEY, "1"),))
        del self.staged[header.offset :]
        for message in request_iterator:
            self.staged += message.chunk
            attempt.received += len(message.chunk)
            if isinstance(fault, int) and len(self.staged) >= fault:
                context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset by peer")
        if fault == "overwritten":
            self.staged[0] ^= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset by peer")
        if hashlib.sha256(self.staged).hexdigest() != header.payload_sha256:
            self.staged.clear()
            self._refuse(context, DigestError("the payload is not what was announced"))
        self.done = True
        if fault == "lost":
            context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset by peer")
        return self._receipt(header.update_id)

    def GetUpload(self, request: hub_pb2.GetUploadRequest, context: Any) -> hub_pb2.GetUploadResponse:
        self.questions += 1
        if not self.resumes:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        if self.done:
            return hub_pb2.GetUploadResponse(receipt=self._receipt(request.update_id, duplicate=True))
        return hub_pb2.GetUploadResponse(offset=len(self.staged))

    def _receipt(self, update_id: str, duplicate: bool = False) -> hub_pb2.SubmitResponse:
        return hub_pb2.SubmitResponse(update_id=update_id, ingest_seq=7, duplicate=duplicate)

    def _refuse(self, context: Any, error: FedshareError) -> None:
        trailing = [("share-error", type(error).__name__)]
        if isinstance(error, OverloadError):
            trailing.append(("grpc-retry-pushback-ms", str(error.retry_after_ms)))
        context.set_trailing_metadata(tuple(trailing))
        context.abort(grpc.StatusCode[error.grpc_code], str(error))


def sent(link: HubLink, submission: Submission = SUBMISSION) -> hub_pb2.SubmitResponse:
    receipt = link.submit_until_answered(submission, PAYLOAD, NEVER)
    assert receipt is not None
    return receipt


def offsets(hub: Intake) -> list[int]:
    return [attempt.offset for attempt in hub.attempts]


@pytest.mark.usefixtures("waits")
def test_only_the_rest_is_sent_after_a_broken_connection(serving: Callable[..., HubLink]) -> None:
    hub = Intake([2 * MIB, 4 * MIB])
    assert sent(serving(hub)).ingest_seq == 7
    assert offsets(hub) == [0, 2 * MIB, 4 * MIB]
    assert sum(attempt.received for attempt in hub.attempts) == len(PAYLOAD)
    assert hub.questions == 2, "the first attempt asks nothing"
    assert bytes(hub.staged) == PAYLOAD


def test_planted_bug_always_from_the_beginning(
    serving: Callable[..., HubLink], waits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "_known", lambda hub, update_id: hub_pb2.GetUploadResponse())
    hub = Intake([2 * MIB, 4 * MIB])
    sent(serving(hub))
    assert sum(attempt.received for attempt in hub.attempts) > len(PAYLOAD), "so the test above would fail"


@pytest.mark.usefixtures("waits")
def test_planted_bug_the_whole_payload_behind_the_offset(serving: Callable[..., HubLink]) -> None:
    """A client that announces the offset and then sends everything is refused, never believed."""
    hub = Intake([2 * MIB])

    class Wrong(HubLink):
        def submit(self, submission: Submission, payload: bytes, offset: int = 0) -> hub_pb2.SubmitResponse:
            return super().submit(submission, b"x" * offset + payload, offset)

    link = serving(hub)
    link.__class__ = Wrong
    sent(link)
    assert offsets(hub) == [0, 2 * MIB, 0], "only the attempt from the beginning was accepted"


@pytest.mark.usefixtures("waits")
def test_a_lost_answer_is_asked_for_and_nothing_is_sent_again(serving: Callable[..., HubLink]) -> None:
    hub = Intake(["lost"])
    receipt = sent(serving(hub))
    assert (receipt.ingest_seq, receipt.duplicate) == (7, True)
    assert offsets(hub) == [0]


@pytest.mark.parametrize(
    ("plan", "resumes", "expected"),
    [
        ([2 * MIB], False, [0, 0]),
        (["overwritten"], True, [0, len(PAYLOAD), 0]),
        ([2 * MIB, RequestError("unknown offset")], True, [0, 2 * MIB, 0]),
        ([2 * MIB, UnavailableError("no")], True, [0, 2 * MIB, 2 * MIB]),
        ([0], True, [0, MIB]),
        ([len(PAYLOAD)], True, [0, len(PAYLOAD)]),
        ([DigestError("damaged")], True, [0, 0]),
    ],
    ids=["no-resume", "damaged-staging", "refused-offset", "away-twice", "one-chunk", "all-but-the-answer", "damaged"],
)
@pytest.mark.usefixtures("waits")
def test_where_the_next_attempt_begins(
    plan: list[Any],
    resumes: bool,
    expected: list[int],
    serving: Callable[..., HubLink],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not resumes:
        monkeypatch.setattr(link_module, "_PATIENCE_S", 0.2)
    hub = Intake(list(plan), resumes)
    assert sent(serving(hub)).ingest_seq == 7
    assert offsets(hub) == expected
    assert bytes(hub.staged) == PAYLOAD


@pytest.mark.usefixtures("waits")
def test_what_arrives_damaged_three_times_is_told(serving: Callable[..., HubLink]) -> None:
    hub = Intake([2 * MIB, DigestError("damaged"), DigestError("damaged"), DigestError("damaged")])
    link = serving(hub)
    with pytest.raises(DigestError):
        upload(link, SUBMISSION, PAYLOAD, NEVER)
    assert offsets(hub) == [0, 2 * MIB, 0, 0]


@pytest.mark.parametrize("error", [UpdateConflictError("other bytes"), RequestError("no")])
def test_a_refusal_of_the_whole_is_raised_at_once(error: FedshareError, serving: Callable[..., HubLink]) -> None:
    hub = Intake([error])
    with pytest.raises(type(error)):
        sent(serving(hub))
    assert offsets(hub) == [0]


def test_a_busy_hub_is_given_the_time_it_asks_for(serving: Callable[..., HubLink], waits: list[Any]) -> None:
    hub = Intake([OverloadError("too much at once", 2500), MIB])
    sent(serving(hub))
    assert [type(wait) for wait in waits] == [OverloadError, UnavailableError]
    assert (str(waits[0]), waits[0].retry_after_ms) == ("too much at once", 2500)


def test_harmless_calls_give_it_too(waits: list[Any]) -> None:
    answers: list[Any] = [OverloadError("busy", 900), "done"]

    def call() -> str:
        answer = answers.pop(0)
        if isinstance(answer, FedshareError):
            raise answer
        return str(answer)

    assert patiently(call, NEVER) == "done"
    assert [wait.retry_after_ms for wait in waits] == [900]


@pytest.mark.parametrize("killed", [False, True], ids=["line cut", "line cut and hub killed"])
def test_a_real_hub_goes_on_where_the_line_was_cut(
    killed: bool, own_hub: Any, line: Callable[..., Any], tmp_path: Path, spec: SpaceSpec
) -> None:
    """The connection is cut three times in an upload of 12 MiB: every byte the hub has kept stays."""
    layout = own_hub.client(tmp_path / "c", "org/one")
    wire = line(load_member(layout).hub_address)
    head = {"weight": torch.randn(3, MIB, generator=torch.Generator().manual_seed(1))}
    sites = {"one": SiteUpdate(residual=Factors(torch.ones(12, 1), torch.ones(8, 1)))}
    payload = encode_update(Update(base_version=0, sites=sites, head=head))
    digest = hashlib.sha256(payload).hexdigest()
    submission = replace(SUBMISSION, space_id=spec.space_id, payload_size=len(payload), payload_sha256=digest)
    waited: list[FedshareError] = []

    def on_wait(error: FedshareError) -> None:
        waited.append(error)
        if killed and len(waited) == 2:
            own_hub.kill()
            own_hub.start()
        wire.cut_after = 4 * MIB if len(waited) < 3 else None

    wire.cut_after = 4 * MIB
    with HubLink(wire.address, load_credentials(layout, datetime.now(UTC))) as link:
        signed = sign_submission(submission, link.credentials, 1)
        receipt = link.submit_until_answered(signed, payload, NEVER, on_wait)
        assert receipt is not None
        assert link.get_update(submission.update_id).payload_sha256 == digest
        sent = look(layout, None, link)
    assert (sent.problems, sent.updates) == ([], 1)
    offsets = [one["offset"] for one in sent.lines if one["event"] == "upload"]
    assert offsets[0] == 0 < offsets[-1], "what was sent again is a line again"
    assert len(waited) >= 3
    # What was on the way when the line was cut is sent twice; from the beginning each time it would be all of it.
    assert killed or wire.forwarded < len(payload) + 3 * 4 * MIB - 2 * MIB


class Watched(bytes):
    """A payload that tells how large the pieces are that are copied out of it."""

    largest = 0

    def __getitem__(self, key: Any) -> Any:
        piece = super().__getitem__(key)
        if isinstance(piece, bytes):
            Watched.largest = max(Watched.largest, len(piece))
        return piece


@pytest.mark.usefixtures("waits")
def test_no_attempt_copies_the_payload(serving: Callable[..., HubLink]) -> None:
    hub = Intake([2 * MIB, 4 * MIB])
    Watched.largest = 0
    link = serving(hub)
    assert link.submit_until_answered(SUBMISSION, Watched(PAYLOAD), NEVER) is not None
    assert 0 < Watched.largest <= MIB
