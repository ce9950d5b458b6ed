"""Signed once, sent however often; a new key signs anew; a directory that was restored finds free numbers again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from share_client import sending as module
from share_client.enrol import enrol
from share_client.link import HubLink
from share_client.member import Credentials, load_credentials, load_member
from share_client.outbox import Outbox, Training, list_outbox
from share_client.records import Records
from share_client.sending import Sender
from share_client.session_log import SessionLog
from share_client.signing import SubmissionSigner
from share_core.errors import ConfigError, UnavailableError
from share_core.space import empty_space
from share_core.wire import encode_update
from share_proto.v1 import hub_pb2
from share_server.local import member_of_no_hub

TRAINING = Training("task", "hash", base_version=0, loss=0.1, steps=1, seconds=1.0, rows=5)


def credentials_of(member: str, role: str = "trainer") -> Credentials:
    holder = member_of_no_hub(member, role)
    return Credentials(holder.key, holder.certificate, b"")


class Client:
    """The outbox of an enrolled directory with its sender."""

    def __init__(self, layout: Any, spec: Any, fake: Any) -> None:
        self.layout, self.spec, self.fake = layout, spec, fake
        self.organisation = load_member(layout).organisation
        self.outbox = Outbox(layout.outbox)
        self.log = SessionLog(layout.session_log)

    def put(self, seed: int) -> str:
        payload = encode_update(self.fake.make_update(empty_space(self.spec), seed))
        task = f"{self.organisation}/t{seed}"
        entry = self.outbox.put(payload, b"", TRAINING, space_id=self.spec.space_id, task_id=task, create=True)
        return entry.update_id

    def send(self, link: HubLink) -> None:
        """Make one pass, as a session does that has just started."""
        signer = SubmissionSigner(self.layout.sequence, lambda: link.credentials)
        records = Records(self.layout.tasks)
        Sender(link, self.outbox, records, signer, self.log, threading.Event()).pass_once()

    def last(self) -> int:
        return int(json.loads(self.layout.sequence.read_bytes())["last"])


@pytest.fixture
def client(hub: Any, spec: Any, fake: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
    organisation = request.node.name.split("[")[0].replace("_", "-").removeprefix("test-")[:40].strip("-")
    made = Client(hub.client(tmp_path / "c", f"{organisation}/one"), spec, fake)
    yield made
    made.log.close()


def records_of(link: HubLink) -> dict[str, hub_pb2.UpdateRecord]:
    return {one.update_id: one for one in link.hub.ListUpdates(hub_pb2.ListUpdatesRequest(), timeout=30).updates}


def test_an_update_keeps_its_signature_until_it_is_there(client: Client, connect: Callable[..., HubLink]) -> None:
    class Lost(HubLink):
        def submit_until_answered(self, *arguments: Any, **options: Any) -> Any:
            super().submit_until_answered(*arguments, **options)
            raise UnavailableError("the answer was lost")

    link = connect(client.layout)
    update_id = client.put(1)
    with Lost(link.address, link.credentials) as broken:
        client.send(broken)
    (signed,) = list_outbox(client.layout.outbox)[0]
    assert (signed.submission.sequence, signed.acknowledged, client.last()) == (1, False, 1)
    client.send(link)
    record = records_of(link)[update_id]
    assert (record.sequence, bytes(record.signature).hex()) == (1, signed.submission.signature)
    assert (record.signer, client.last()) == (signed.submission.signer, 1)


def test_after_another_enrolment_what_waits_is_signed_anew(
    client: Client, hub: Any, connect: Callable[..., HubLink]
) -> None:
    first, second = client.put(1), client.put(2)
    old = load_credentials(client.layout, datetime.now(UTC))
    signer = SubmissionSigner(client.layout.sequence, lambda: old)
    for entry in client.outbox.entries():
        client.outbox.sign(entry, signer.sign(entry.submission))
    client.layout.key.unlink()  # a new machine, or a key that was lost
    enrol(hub.token(load_member(client.layout).member), client.layout, datetime.now(UTC))
    link = connect(client.layout)
    client.send(link)
    rows = records_of(link)
    assert {rows[name].sequence for name in (first, second)} == {3, 4}
    assert len({row.signer for row in rows.values()}) == 1


@pytest.mark.parametrize("planted", [False, True], ids=["real", "planted"])
def test_a_directory_restored_from_a_copy_counts_past_what_it_forgot(
    planted: bool, client: Client, connect: Callable[..., HubLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = connect(client.layout)
    for seed in range(6):
        client.put(10 * planted + seed)
        client.send(link)
    assert client.last() == 6
    client.layout.sequence.unlink()
    if planted:
        monkeypatch.setattr(module, "_MOST_SIGNATURES", 0)
    late = client.put(10 * planted + 7)
    for _ in range(5):
        client.send(link)
    if planted:
        assert late not in records_of(link), "so the assertion below would fail"
    else:
        assert records_of(link)[late].sequence > 6


def test_numbers_go_on_over_every_life(tmp_path: Path) -> None:
    submission = Outbox(tmp_path / "o").put(b"p", b"", TRAINING, space_id="s", task_id="a/t", create=True).submission
    numbers = [
        SubmissionSigner(tmp_path / "sequence.json", lambda: credentials_of("a/one")).sign(submission).sequence
        for _ in range(3)
    ]
    assert numbers == [1, 2, 3]


def test_whose_signature_it_is_is_known(tmp_path: Path) -> None:
    own, other = credentials_of("a/one"), credentials_of("a/one", "contributor")
    signer = SubmissionSigner(tmp_path / "sequence.json", lambda: own)
    submission = Outbox(tmp_path / "o").put(b"p", b"", TRAINING, space_id="s", task_id="a/t", create=True).submission
    signed = signer.sign(submission)
    assert signer.has_signed(signed)
    assert not signer.has_signed(submission)
    assert not signer.has_signed(replace(signed, signature=""))
    assert not SubmissionSigner(tmp_path / "sequence.json", lambda: other).has_signed(signed)


@pytest.mark.parametrize("content", ["", "{}", '{"last": "7"}', '{"last": -1}', "[]", "7"])
def test_a_damaged_count_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "sequence.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="remove it"):
        SubmissionSigner(path, lambda: credentials_of("a/one")).move(1)
