"""The egress log: everything that leaves is in it, before it leaves, and nobody can change it unseen.

Bytes are compared with what a server received, and updates with the receipts of a real hub. Planted bugs are found.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from share_client import egress
from share_client.cli import app
from share_client.egress import EgressLog, egress_files, read_egress
from share_client.egress_check import chain_problems, look, read_since
from share_client.enrol import enrol
from share_client.link import HubLink
from share_client.member import ClientLayout
from share_client.session import SessionOptions, run_session
from share_client.uploading import Submission
from share_core.errors import ConfigError, StorageError, UnavailableError
from share_core.wire import encode_update
from share_proto.v1 import hub_pb2

RUNNER = CliRunner()
OPTIONS = SessionOptions(linger_s=1.0, poll_s=0.02, lock_s=5.0)
NEVER = threading.Event()


def lines_of(layout: ClientLayout, event: str = "") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in read_egress(layout.egress)]
    return [line for line in found if event in ("", line["event"])]


@pytest.fixture(scope="module")
def worked(hub: Any, fake: Any, tmp_path_factory: pytest.TempPathFactory) -> ClientLayout:
    """A client that has trained two tasks; one upload leaves in a run that plants nothing."""
    layout = hub.client(tmp_path_factory.mktemp("egress") / "c", "egressorg/main")
    path = layout.root / "tasks.json"
    path.write_text(json.dumps({"first": "data one", "second": "data two"}))
    run_session(layout.root, path, trainer=fake.FakeTrainer(path), options=OPTIONS)
    assert isinstance(layout, ClientLayout)
    return layout


@pytest.fixture
def kept(worked: ClientLayout) -> Iterator[ClientLayout]:
    """The same, put back as it was in the end."""
    before = {path: path.read_bytes() for path in egress_files(worked.egress)}
    yield worked
    for path in egress_files(worked.egress):
        path.unlink()
    for path, data in before.items():
        path.write_bytes(data)


def test_the_log_is_what_the_hub_received(worked: ClientLayout, connect: Callable[..., HubLink]) -> None:
    found = look(worked, None, connect(worked))
    assert found.problems == []
    assert found.updates == 2
    uploads = [line for line in found.lines if line["event"] == "upload"]
    assert [line["task"] for line in uploads] == ["egressorg/first", "egressorg/second"]
    for line in uploads:
        assert line["bytes"] == line["payload_bytes"] > sum(tensor["bytes"] for tensor in line["tensors"]) > 0
        assert {tensor["name"] for tensor in line["tensors"]} >= {"A/one", "B/one", "A/two", "B/two"}
        assert line["tensors"][0].keys() == {"name", "dtype", "shape", "bytes"}
    assert len([line for line in found.lines if line["event"] == "receipt"]) == 2


def test_enrolment_and_metrics_are_in_it(worked: ClientLayout) -> None:
    calls = {line["method"].rpartition("/")[2]: line for line in lines_of(worked, "call")}
    enrolled = calls["Enrol"]["fields"]
    assert set(enrolled) == {"token", "csr_pem", "node_public_key_pem"}
    assert set(enrolled["token"]) == {"bytes", "sha256"}, "a token is a secret"
    assert "fs1." not in b"".join(read_egress(worked.egress)).decode()
    (reported, *_) = calls["ReportEvaluation"]["fields"]["evaluations"]
    assert reported["metric"] == "accuracy"
    assert 0 < reported["value"] < 1
    assert calls["Submit"]["fields"]["payload_sha256"]


class Counting:
    """A hub that counts what it receives, and breaks the first uploads."""

    def __init__(self, breaks: int = 0) -> None:
        self.breaks = breaks
        self.calls: list[int] = []
        self.payload = 0

    def Submit(self, requests: Iterator[hub_pb2.SubmitRequest], context: Any) -> hub_pb2.SubmitResponse:
        header = next(requests).header
        self.calls.append(header.ByteSize())
        context.send_initial_metadata((("share-go-ahead", "1"),))
        self.payload += sum(len(request.chunk) for request in requests)
        if self.breaks:
            self.breaks -= 1
            raise RuntimeError("the connection breaks after the payload")
        return hub_pb2.SubmitResponse(update_id=header.update_id, ingest_seq=1, entry_hash="ab" * 32)

    def GetUpload(self, request: hub_pb2.GetUploadRequest, context: Any) -> hub_pb2.GetUploadResponse:
        self.calls.append(request.ByteSize())
        return hub_pb2.GetUploadResponse()

    def ReportEvaluation(self, request: Any, context: Any) -> hub_pb2.ReportEvaluationResponse:
        self.calls.append(request.ByteSize())
        return hub_pb2.ReportEvaluationResponse()

    def ListTasks(self, request: Any, context: Any) -> hub_pb2.ListTasksResponse:
        self.calls.append(request.ByteSize())
        return hub_pb2.ListTasksResponse()


def submission_of(payload: bytes, fake: Any) -> Submission:
    return Submission("ab" * 16, "sha256:0", "org/task", True, len(payload), egress._sha256(payload))


def talk(link: HubLink, fake: Any, spec: Any) -> int:
    """Make some calls; return the size of the payload."""
    from share_core.space import empty_space

    payload = encode_update(fake.make_update(empty_space(spec), 1))
    assert link.submit_until_answered(submission_of(payload, fake), payload, NEVER) is not None
    link.report([hub_pb2.Evaluation(task_id="org/task", version=3, metric="accuracy", value=0.75, rows=9)])
    link.list_tasks()
    return len(payload)


def missing_bytes(layout: ClientLayout, server: Counting) -> tuple[int, int]:
    """Return how many bytes the server received that the log does not tell: (of calls, of payloads)."""
    calls = sum(line["bytes"] for line in lines_of(layout, "call"))
    return sum(server.calls) - calls, server.payload - sum(line["bytes"] for line in lines_of(layout, "upload"))


@pytest.mark.usefixtures("waits")
def test_every_byte_that_a_server_received_is_in_it(
    serving: Callable[..., HubLink], offline: Any, fake: Any, spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two uploads break after their payload arrived: it left three times, and the log says so."""
    server = Counting(breaks=2)
    size = talk(serving(server), fake, spec)
    assert server.payload == 3 * size
    assert missing_bytes(offline[0], server) == (0, 0)
    assert list(chain_problems(read_egress(offline[0].egress))) == []
    monkeypatch.setattr(EgressLog, "upload", lambda *_: None)
    talk(serving(server), fake, spec)
    assert missing_bytes(offline[0], server) == (0, size), "an upload that is not logged was not noticed"


def test_what_cannot_be_written_down_is_not_sent(
    serving: Callable[..., HubLink], offline: Any, fake: Any, spec: Any
) -> None:
    server = Counting()
    link = serving(server)
    offline[0].egress.write_text("a file where the directory should be")
    with pytest.raises(StorageError, match="nothing is sent without it"):
        link.list_tasks()
    with pytest.raises(UnavailableError):
        link.submit(submission_of(b"p" * 10, fake), b"p" * 10)
    assert (server.calls, server.payload) == ([], 0)


def drop(layout: ClientLayout, event: str) -> None:
    (path,) = egress_files(layout.egress)
    raw = path.read_bytes().split(b"\n")
    place = next(n for n, line in enumerate(raw) if f'"event":"{event}"'.encode() in line)
    path.write_bytes(b"\n".join(raw[:place] + raw[place + 1 :]))


def change(layout: ClientLayout, event: str) -> None:
    (path,) = egress_files(layout.egress)
    raw = path.read_bytes().split(b"\n")
    place = next(n for n, line in enumerate(raw) if f'"event":"{event}"'.encode() in line)
    raw[place] = raw[place].replace(b'"bytes":', b'"bytes":1', 1)
    path.write_bytes(b"\n".join(raw))


def forge(layout: ClientLayout, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Rewrite the log with a chain that is right again, as its owner could."""
    lines = edit(lines_of(layout))
    previous, text = egress.START, b""
    for number, line in enumerate(lines, start=1):
        raw = json.dumps({**line, "number": number, "previous": previous}, separators=(",", ":")).encode()
        previous, text = egress._sha256(raw), text + raw + b"\n"
    (path,) = egress_files(layout.egress)
    path.write_bytes(text)


def last_upload(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return [line for line in lines if line["event"] == "upload"][-1]


@pytest.mark.parametrize("event", ["upload", "receipt", "call"])
@pytest.mark.parametrize("damage", [drop, change])
def test_a_line_that_was_changed_or_taken_out_is_found(damage: Any, event: str, kept: ClientLayout) -> None:
    damage(kept, event)
    assert any("of the egress log" in problem for problem in look(kept, None).problems)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda lines: [line for line in lines if line is not last_upload(lines)], "does not hold all of its bytes"),
        (
            lambda lines: [{**line, **({"offset": 5} if line is last_upload(lines) else {})} for line in lines],
            "not hold",
        ),
        (
            lambda lines: [{**line, **({"bytes": 5} if line is last_upload(lines) else {})} for line in lines],
            "received",
        ),
        (
            lambda lines: [
                {**line, **({"payload_sha256": "0" * 64} if line is last_upload(lines) else {})} for line in lines
            ],
            "the hub received",
        ),
        (
            lambda lines: [{**line, **({"task": "o/x"} if line is last_upload(lines) else {})} for line in lines],
            "received",
        ),
        (
            lambda lines: [
                {**line, **({"entry_hash": "0" * 64} if line["event"] == "receipt" else {})} for line in lines
            ],
            "another receipt",
        ),
        (
            lambda lines: [
                *lines,
                {"event": "receipt", "to": "", "bytes": 0, "update_id": "0" * 32, "time": lines[0]["time"]},
            ],
            "the hub does not list it",
        ),
    ],
)
def test_a_log_with_a_right_chain_is_compared_with_the_hub(
    edit: Any, says: str, kept: ClientLayout, connect: Callable[..., HubLink]
) -> None:
    forge(kept, edit)
    assert look(kept, None).problems == [], "the chain was made right again"
    problems = look(kept, None, connect(kept)).problems
    assert problems
    assert all(says in problem for problem in problems)


def test_files_are_begun_anew_and_kept(tmp_path: Path) -> None:
    log = EgressLog(tmp_path / "egress", largest=1500)
    for number in range(20):
        log.record("call", "a:1", number, method="m" * 100)
    files = egress_files(tmp_path / "egress")
    assert len(files) > 3
    assert all(path.stat().st_size <= 1500 for path in files)
    raw = read_egress(tmp_path / "egress")
    assert [json.loads(line)["bytes"] for line in raw] == list(range(20))
    assert list(chain_problems(raw)) == []
    files[1].unlink()
    assert list(chain_problems(read_egress(tmp_path / "egress")))


def test_many_writers_make_one_chain(tmp_path: Path) -> None:
    logs = [EgressLog(tmp_path / "egress", largest=4000) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: logs[n % 4].record("call", "a:1", n), range(60)))
    raw = read_egress(tmp_path / "egress")
    assert sorted(json.loads(line)["bytes"] for line in raw) == list(range(60))
    assert list(chain_problems(raw)) == []


@pytest.mark.parametrize("cut", ["torn", "begun"])
def test_after_a_crash_in_a_line_the_chain_goes_on(cut: str, tmp_path: Path) -> None:
    EgressLog(tmp_path / "egress").record("call", "a:1", 1)
    (path,) = egress_files(tmp_path / "egress")
    if cut == "torn":
        path.write_bytes(path.read_bytes() + b'{"number":2,"prev')
    else:
        path.with_name("00000002.jsonl").touch()
    EgressLog(tmp_path / "egress").record("call", "a:1", 2)
    raw = read_egress(tmp_path / "egress")
    assert [json.loads(line)["bytes"] for line in raw] == [1, 2]
    assert list(chain_problems(raw)) == []


def test_the_command_shows_and_proves(kept: ClientLayout) -> None:
    shown = RUNNER.invoke(app, ["egress", "--dir", str(kept.root), "--verify"])
    assert shown.exit_code == 0, shown.output
    assert "2 updates are what the hub received" in shown.output
    answer = RUNNER.invoke(app, ["egress", "--dir", str(kept.root), "--json"])
    found = json.loads(answer.stdout)
    assert (found["problems"], len(found["lines"])) == ([], len(lines_of(kept)))
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    none = RUNNER.invoke(app, ["egress", "--dir", str(kept.root), "--json", "--since", later])
    assert json.loads(none.stdout)["lines"] == []
    drop(kept, "upload")
    broken = RUNNER.invoke(app, ["egress", "--dir", str(kept.root)])
    assert broken.exit_code == 1
    assert "problem: line" in broken.output
    with pytest.raises(ConfigError, match="expected a moment"):
        read_since("yesterday")


def test_enrolling_is_written_down_before_it_is_tried(hub: Any, tmp_path: Path) -> None:
    layout = ClientLayout(tmp_path / "c")
    token = hub.token("egress-enrol/main")
    (layout.root / "egress").parent.mkdir()
    layout.egress.write_text("in the way")
    with pytest.raises(StorageError):
        enrol(token, layout, datetime.now(UTC))
    layout.egress.unlink()
    assert enrol(token, layout, datetime.now(UTC)).member == "egress-enrol/main", "the token was not sent before"
