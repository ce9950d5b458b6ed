"""What becomes of an update for every error the hub may answer with."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from share_client import session_log
from share_client.link import HubLink
from share_client.member import Credentials
from share_client.outbox import Outbox, Training, list_outbox
from share_client.records import MOST_RETRAININGS, Records
from share_client.sending import Sender
from share_client.session_log import SessionLog, sentence
from share_client.signing import SubmissionSigner
from share_client.uploading import Submission
from share_core.errors import FedshareError, IdentityError, OverloadError, RebaseError, error_classes
from share_proto.v1 import hub_pb2
from share_server.local import member_of_no_hub

SENDER = member_of_no_hub("org/one")
CREDENTIALS = Credentials(SENDER.key, SENDER.certificate, b"")
TRAINING = Training("task", "hash", base_version=0, loss=0.1, steps=1, seconds=1.0, rows=5)

STAYS = {
    "FedshareError",
    "UnknownUpdateError",
    "SignatureError",
    "UnavailableError",
    "OverloadError",
    "StorageError",
    "ConfigError",
    "AdapterError",
    "UnsupportedAdapterError",
}
AGAIN = {"VersionError", "RebaseError", "UnknownTaskError", "DigestError"}
RAISED = {"IdentityError", "TokenError", "CertificateError"}


class Link:
    """Answers as a test says."""

    def __init__(self, error: FedshareError | None = None, state: Any = hub_pb2.UPDATE_STATE_ACCEPTED) -> None:
        self.error = error
        self.state = state
        self.reason = ""
        self.known = True
        self.asked = 0
        self.sent: list[str] = []

    def submit_until_answered(
        self, submission: Submission, payload: bytes, stop: threading.Event, on_wait: Callable[[Any], None]
    ) -> Any:
        if self.error is not None:
            raise self.error
        self.sent.append(submission.update_id)
        return SimpleNamespace(ingest_seq=1, entry_hash="ab", duplicate=False)

    def get_update(self, update_id: str) -> Any:
        self.asked += 1
        if not self.known:
            raise error_classes()["UnknownUpdateError"]("no such update")
        return SimpleNamespace(
            state=self.state, reason=self.reason, version=7, staleness=1, relative_error=0.0, update_id=update_id
        )


class Bench:
    """An outbox with a sender and a link that answers as told."""

    def __init__(self, root: Path, link: Link) -> None:
        self.root = root
        self.link = link
        self.outbox = Outbox(root / "outbox")
        self.records = Records(root / "tasks")
        self.log = SessionLog(root / "session.jsonl")
        self.signer = SubmissionSigner(root / "sequence.json", lambda: CREDENTIALS)
        self.sender = self.make_sender()

    def make_sender(self) -> Sender:
        link = cast(HubLink, self.link)
        return Sender(link, self.outbox, self.records, self.signer, self.log, threading.Event())

    def put(self) -> str:
        return self.outbox.put(b"payload", b"head", TRAINING, space_id="s", task_id="org/task", create=True).update_id

    def wants(self) -> bool:
        return self.records.get("task").wants("hash")


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    made: list[Bench] = []

    def make(link: Link) -> Bench:
        made.append(Bench(tmp_path, link))
        return made[-1]

    yield make
    for one in made:
        one.log.close()


@pytest.mark.parametrize("name", sorted(error_classes()))
def test_every_error_has_one_consequence(name: str, bench: Any) -> None:
    tried = bench(Link(error_classes()[name]("the reason")))
    update_id = tried.put()
    if name in RAISED:
        with pytest.raises(IdentityError):
            tried.sender.pass_once()
    else:
        tried.sender.pass_once()
    waiting, refused = list_outbox(tried.root / "outbox")
    if name in STAYS | RAISED:
        assert [entry.update_id for entry in waiting] == [update_id]
        assert refused == []
    else:
        assert waiting == []
        assert [(entry.update_id, reason) for entry, reason in refused] == [(update_id, f"{name}: the reason")]
        assert tried.wants() == (name in AGAIN)
        assert (tried.sender.refused == 0) == (name in AGAIN)


def test_trained_again_a_limited_number_of_times(bench: Any) -> None:
    tried = bench(Link(RebaseError("too old")))
    for number in range(MOST_RETRAININGS):
        assert tried.wants(), f"given up after {number} trainings"
        tried.put()
        tried.sender.pass_once()
    assert not tried.wants()
    assert "times in a row" in tried.records.get("task").refused_reason


def test_refused_at_the_merge(bench: Any) -> None:
    tried = bench(Link(state=hub_pb2.UPDATE_STATE_REFUSED))
    tried.put()
    tried.link.reason = "RebaseError: too old"
    tried.sender.pass_once()
    assert tried.wants()
    tried.put()
    tried.link.reason = "TensorShapeError: odd"
    tried.sender.pass_once()
    assert not tried.wants()
    assert tried.records.get("task").refused_reason == "REFUSED: TensorShapeError: odd"


def test_an_update_that_waits_for_the_operator_holds_nothing_up(bench: Any) -> None:
    link = Link(state=hub_pb2.UPDATE_STATE_QUARANTINED)
    link.reason = "far from all others"
    tried = bench(link)
    tried.put()
    for _ in range(3):
        state = tried.sender.pass_once(version=4)
        assert (state.unsettled, state.certain, state.set_aside) == (0, True, {"task"})
    assert link.asked == 1, "asked again only after a while, or when a version arrives that may hold it"
    assert (tried.root / "session.jsonl").read_text().count('"set_aside"') == 1
    tried.sender.pass_once(version=5)
    assert link.asked == 2
    link.state = hub_pb2.UPDATE_STATE_MERGED
    state = tried.sender.pass_once(version=6)
    assert (state.unsettled, state.set_aside) == (0, frozenset())
    assert not tried.wants()


def test_a_busy_hub_is_left_alone_as_long_as_it_says(bench: Any) -> None:
    tried = bench(Link(OverloadError("busy", 50_000)))
    tried.put()
    before = time.monotonic()
    assert not tried.sender.pass_once().certain
    assert tried.sender._not_before >= before + 50


def test_a_merge_is_recorded_once_and_then_the_entry_goes(bench: Any) -> None:
    tried = bench(Link(state=hub_pb2.UPDATE_STATE_MERGED))
    update_id = tried.put()
    assert tried.sender.pass_once().unsettled == 0
    assert not tried.wants()
    assert [line["update_id"] for line in tried.records.history("task")] == [update_id]
    assert tried.records.get("task").heads[0].version == 7


def test_a_hub_that_forgot_gets_it_again_under_the_same_id(bench: Any) -> None:
    link = Link()
    tried = bench(link)
    update_id = tried.put()
    assert tried.sender.pass_once().certain
    link.known = False
    state = tried.sender.pass_once()
    assert (state.unsettled, state.certain) == (1, False)
    link.known, link.state = True, hub_pb2.UPDATE_STATE_MERGED
    again = tried.make_sender()
    assert again.pass_once().unsettled == 0
    assert link.sent == [update_id, update_id]


def test_every_event_has_a_sentence() -> None:
    sources = Path(session_log.__file__).parent.glob("*.py")
    written = {event for path in sources for event in re.findall(r'log\.write\(\s*"(\w+)"', path.read_text())}
    assert {"training", "trained", "version", "failed"} <= written, "the search finds what is known to be there"
    assert written <= set(session_log._SENTENCES)


def test_a_sentence_holds_what_the_event_says() -> None:
    line = {"event": "evaluation", "task": "t", "metric": "accuracy", "value": 0.5, "version": 3, "rows": 9}
    assert sentence(line) == "t: accuracy 0.5000 at version 3 on 9 rows"
    assert sentence({"event": "strange", "x": 1}) == '{"event": "strange", "x": 1}'
