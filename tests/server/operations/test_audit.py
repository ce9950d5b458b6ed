"""Who contributed what: the same of a running hub, of a stopped one and of a backup; and no signature is believed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from share_core.errors import AccessError
from share_core.identity import Identity, make_authority, make_csr, new_private_key_pem, sign_csr
from share_core.spec_file import read_spec
from share_proto.v1 import hub_pb2
from share_server.layout import Layout
from share_server.local import LocalHub
from share_server.operations import signatures
from share_server.operations.audit import Filter, audit, row_of
from share_server.operations.verify import verify
from share_server.operator import named_error
from share_server.store.journal import Journal
from share_server.store.members import all_certificates
from share_server.store.records import UpdateRow
from share_server.store.recovery import all_updates

Rewrite = Callable[[Path, str], None]


def _foreign_certificate(member: str) -> bytes:
    authority = make_authority("somebody else", datetime.now(UTC))
    request = make_csr(new_private_key_pem())
    return sign_csr(*authority, request, Identity("trainer", *member.split("/")), datetime.now(UTC), 30)


DAMAGE: dict[str, tuple[str, str]] = {
    "signature": ("UPDATE updates SET signature = zeroblob(70) WHERE ingest_seq = 2", "the signature is not one of"),
    "number": ("UPDATE updates SET sequence = sequence - 1 WHERE ingest_seq = 2", "the signature is not one of"),
    "rows": ("UPDATE updates SET rows = 5 WHERE ingest_seq = 2", "the signature is not one of"),
    "lease": ("UPDATE updates SET lease_id = 'x' WHERE ingest_seq = 2", "the signature is not one of"),
    "terms": (
        """UPDATE updates SET terms = replace(terms, '"open":false', '"open":true') WHERE ingest_seq = 2""",
        "the signature is not one of",
    ),
    "another signer": (
        "UPDATE updates SET signer = (SELECT signer FROM updates WHERE member = 'bolt/bob') WHERE ingest_seq = 2",
        "was issued to acme/alice",
    ),
    "certificate gone": ("DELETE FROM certificates WHERE member = 'acme/alice'", "was issued to acme/alice"),
    "foreign certificate": (
        f"UPDATE certificates SET certificate = x'{_foreign_certificate('acme/alice').hex()}' "
        "WHERE member = 'acme/alice'",
        "not one of this federation's authority",
    ),
    "certificate of another": (
        "UPDATE certificates SET certificate = (SELECT certificate FROM certificates WHERE member = 'bolt/bob') "
        "WHERE member = 'acme/alice'",
        "is one of bolt/bob",
    ),
    "unsigned": (
        "UPDATE updates SET signature = x'', signer = '', sequence = 0 WHERE ingest_seq = 2",
        "is not signed, and earlier ones are",
    ),
}


def problems_of(damage: str, server: Path, rewrite: Rewrite) -> list[str]:
    statement, expected = DAMAGE[damage]
    rewrite(server, statement)
    return [problem for problem in verify(Layout(server)).problems if expected in problem]


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_what_the_signatures_do_not_say(damage: str, server: Path, rewrite: Rewrite) -> None:
    assert problems_of(damage, server, rewrite)


@pytest.mark.parametrize(("damage", "guard"), [("rows", "check_update_signature"), ("foreign certificate", "_problem")])
def test_planted_bugs_are_caught(
    damage: str, guard: str, server: Path, rewrite: Rewrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = signatures if hasattr(signatures, guard) else signatures.SignatureChecker
    monkeypatch.setattr(owner, guard, lambda *arguments: "")
    assert problems_of(damage, server, rewrite) == [], "so the test above would fail"


def test_a_sound_store_has_as_many_good_signatures_as_updates(server: Path) -> None:
    report = verify(Layout(server))
    assert (report.problems, report.signatures, report.updates) == ([], 11, 11)


@pytest.mark.parametrize("name", ["store-2"])
def test_updates_of_older_releases_are_named_and_no_problem(name: str, older_server: Callable[[str], Path]) -> None:
    root = older_server(name)
    report = verify(Layout(root))
    assert (report.problems, report.signatures) == ([], 0)
    assert any("12 updates were taken by a release that did not sign" in note for note in report.notes), report.notes
    assert {line.signature for line in audit(Layout(root)).updates} == {"none"}


def test_who_contributed_what_to_which_version(server: Path, history: tuple[Path, dict[str, str]]) -> None:
    found = audit(Layout(server))
    assert {line.update_id: line.payload_sha256 for line in found.updates} == history[1]
    assert [line.ingest_seq for line in found.updates] == list(range(1, 12))
    assert {line.signature for line in found.updates} == {"valid"}
    assert len({line.certificate_serial for line in found.updates}) == 2, "two members, a certificate each"
    assert [one.version for one in found.versions] == list(range(1, 12))
    shared = audit(Layout(server), Filter(task="acme/shared"))
    assert [(line.member, line.state) for line in shared.updates] == [("acme/alice", "MERGED"), ("bolt/bob", "MERGED")]
    of_bob = audit(Layout(server), Filter(member="bolt/bob"))
    assert of_bob.updates == audit(Layout(server), Filter(member="bolt")).updates
    assert [one.members for one in of_bob.versions] == [["bolt/bob"]] * 2
    (only,) = audit(Layout(server), Filter(version=11)).updates
    assert only.version == 11


def _shown(row: UpdateRow) -> UpdateRow:
    """Return a row as far as the hub's answers tell it."""
    return replace(row, entry_hash="", original_sha256=None, original_size=0, released=False)


def test_a_running_hub_says_the_same(server: Path, reopen: Callable[..., LocalHub]) -> None:
    stopped = audit(Layout(server))
    layout = Layout(server)
    journal = Journal(layout.store / "journal.db", read_spec(layout.space).space_id)
    rows, certificates = all_updates(journal), all_certificates(journal)
    journal.close()
    hub = reopen(server)
    hub.start()
    assert audit(layout) == stopped
    with hub.hub(hub.own("operator")) as stub:
        answer = stub.ListUpdates(hub_pb2.ListUpdatesRequest(), timeout=30)
        assert [row_of(record) for record in answer.updates] == [_shown(row) for row in rows]
        listed: list[hub_pb2.IssuedCertificate] = []
        while page := stub.ListCertificates(
            hub_pb2.ListCertificatesRequest(after=listed[-1].number if listed else 0, limit=1), timeout=30
        ).certificates:
            assert len(page) == 1
            listed += page
        assert [(one.number, one.member) for one in listed] == [(row.number, row.member) for row in certificates]
    with hub.hub(hub.enrol("acme/alice")) as stub, pytest.raises(grpc.RpcError) as caught:
        stub.ListCertificates(hub_pb2.ListCertificatesRequest(), timeout=30)
    assert isinstance(named_error(caught.value, "hub"), AccessError)


def test_the_command(
    server: Path, run_command: Callable[..., subprocess.CompletedProcess[str]], rewrite: Rewrite
) -> None:
    done = run_command("audit", str(server), "--task", "acme/shared", "--json")
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["signatures"] == {"valid": 2, "invalid": 0, "unsigned": 0}
    assert [one["members"] for one in said["versions"]] == [["acme/alice"], ["bolt/bob"]]
    rewrite(server, DAMAGE["rows"][0])
    done = run_command("audit", str(server))
    assert done.returncode == 1
    assert "acme/alice" in done.stdout and "the signature is not one of acme/alice" in done.stdout
