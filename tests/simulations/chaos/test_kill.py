"""Random kills under load, in small, and the planted bugs that they must show."""

from __future__ import annotations

from pathlib import Path

import pytest

from share_core.errors import ConfigError, UnavailableError
from share_proto.v1 import hub_pb2
from share_server.hub.tensor_service import HubService
from share_server.local import LocalHub
from share_simulations.chaos.endcheck import Book, check_hub
from share_simulations.chaos.kill import KillOptions, catch, run_kill
from share_simulations.chaos.load import Crowd, Payloads, toy_space
from share_simulations.chaos.planted import BUGS, replace_step
from share_simulations.chaos.show import Meter

SHORT = KillOptions(acks=200, kills=4, per_round=100, crowd=Crowd(clients=24, twice=0.2), seed=3)


def test_nothing_acknowledged_is_lost_and_nothing_counts_twice(tmp_path: Path) -> None:
    report = run_kill(KillOptions(**{**vars(SHORT), "directory": tmp_path}))
    assert report["problems"] == []
    assert report["ok"]
    assert report["complete"]
    assert report["checked_rounds"] == report["rounds"]
    assert (report["acks"], report["kills"], report["rounds"]) == (200, 4, 2)
    assert (report["lost"], report["double"], report["updates"]) == (0, 0, 200)
    assert report["answered_duplicates"] > 0, "nothing was sent twice: the campaign proves less than it says"
    assert report["versions_followed"] == report["versions"] > 0
    assert report["recovery_p99_s"] >= report["recovery_p50_s"] > 0


@pytest.mark.parametrize(
    ("bug", "signs"),
    [
        ("ack_before_row", ("is lost",)),
        ("row_before_payload", ("does not start", "ended by itself")),
        ("lazy_commit", ("is lost",)),
        ("no_dedupe", ("nobody sent it",)),
        ("merged_twice", ("counts", "does not start")),
    ],
)
def test_a_planted_bug_is_caught(tmp_path: Path, bug: str, signs: tuple[str, ...]) -> None:
    options = KillOptions(**{**vars(SHORT), "directory": tmp_path, "kills": 2, "acks": 150})
    with Meter("test") as meter:
        problems = catch(options, bug, meter)
    assert any(sign in problem for problem in problems for sign in signs), problems


def test_a_bug_that_no_longer_fits_the_hub_is_told() -> None:
    with pytest.raises(AttributeError, match="does not fit"):
        replace_step(HubService, "NoSuchStep", None)
    assert set(BUGS) >= {"ack_before_row", "no_dedupe", "merged_twice"}


def test_the_book_remembers_what_was_said_before() -> None:
    book = Book()
    book.send("a", "1")
    book.acknowledge("a", hub_pb2.SubmitResponse(update_id="a", ingest_seq=1, entry_hash="x"))
    book.acknowledge("a", hub_pb2.SubmitResponse(update_id="a", ingest_seq=1, entry_hash="x", duplicate=True))
    book.publish(1, "one")
    book.publish(1, "one")
    assert book.broken == []
    assert book.duplicates == 1
    book.acknowledge("a", hub_pb2.SubmitResponse(update_id="a", ingest_seq=2, entry_hash="x"))
    book.publish(1, "two")
    assert len(book.broken) == 2


def test_no_two_payloads_are_the_same_and_all_can_be_read() -> None:
    from share_core.wire import decode_update

    spec = toy_space()
    payloads = Payloads(spec, 1, pool=4)
    made = [payloads.next() for _ in range(50)]
    assert len(set(made)) == 50
    assert all(decode_update(payload, spec).base_version == 0 for payload in made)


def test_a_hub_that_does_not_answer_at_the_end_is_an_error_with_its_reason(tmp_path: Path) -> None:
    server = LocalHub(tmp_path / "server", toy_space())
    with pytest.raises(UnavailableError, match="could not be asked what it kept: no hub answers"):
        check_hub(server, Book())


def test_numbers_that_make_no_campaign_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        run_kill(KillOptions(acks=0))
