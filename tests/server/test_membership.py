"""Renewal: the same key and role, once in half a life, written down, and for nobody who has lost its place."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from share_core import identity as ids
from share_core.errors import AccessError, CertificateError, ConfigError, RequestError, TokenError
from share_server.config import ServerConfig
from share_server.hub.access import Caller, Roster
from share_server.hub.engine import Engine
from share_server.hub.enrolment_service import Authority
from share_server.hub.membership import Membership
from share_server.layout import Layout
from share_server.operations.verify import verify
from share_server.provision import create_server
from share_server.store import members
from share_server.store.journal import Journal
from share_server.store.members import (
    certificates_of,
    enrol_member,
    find_member,
    key_digest,
    renew_member,
    revoke_member,
)
from share_server.store.records import MemberRow

NOW = datetime.now(UTC)
ALICE = ids.Identity("trainer", "acme", "alice")
CONFIG = ServerConfig()


class Stand:
    """A membership over an open engine, and members whose certificates have any age."""

    def __init__(self, layout: Layout, engine: Engine) -> None:
        self.authority = Authority(
            layout.ca_cert.read_bytes(), layout.ca_key.read_bytes(), layout.enrol_key.read_bytes()
        )
        self.store = engine.store
        self.roster = Roster([])
        self.looks = 0
        self.membership = Membership(self.store, CONFIG, self.authority, self.roster, self._look)

    def _look(self) -> None:
        self.looks += 1

    async def enrol(self, identity: ids.Identity = ALICE, age: float = 0.0, hosts: tuple[str, ...] = ()) -> Caller:
        """Enrol a fresh key with a certificate that is ``age`` days old."""
        own, key = self.authority, ids.new_private_key_pem()
        issued = datetime.now(UTC) - timedelta(days=age)
        days = CONFIG.certificate_days
        certificate = ids.sign_csr(own.certificate, own.key, ids.make_csr(key), identity, issued, days)
        digest = key_digest(ids.public_key_pem(key))
        row = MemberRow(identity.member, identity.role, digest, certificate, False, hosts)
        await self.store.do(lambda journal: enrol_member(journal, row, b"", digest[:32], 1))
        self.roster.put(row)
        return Caller(identity, certificate)

    async def entries(self) -> int:
        """Return the number of entries in the journal's chain."""
        return int(await self.store.do(lambda journal: journal.rows("SELECT count(*) FROM entries")[0][0]))


Work = Callable[[Stand], Awaitable[None]]


@pytest.fixture
def layout(tmp_path: Path, toy_spec: Any) -> Layout:
    made = Layout(tmp_path / "server")
    create_server(made, CONFIG, toy_spec, NOW)
    return made


@pytest.fixture
def standing(layout: Layout, run_engine: Callable[..., None]) -> Callable[[Work], None]:
    """Return a function that runs ``work`` with a stand."""
    return lambda work: run_engine(layout.store, lambda engine: work(Stand(layout, engine)))


def test_a_due_certificate_is_replaced_over_the_same_key_and_written_down(
    standing: Callable[[Work], None], layout: Layout
) -> None:
    async def work(stand: Stand) -> None:
        caller = await stand.enrol(age=4)
        answer = await stand.membership.renew(caller)
        fresh = answer.certificate_pem
        assert answer.serving_certificate_pem == b""
        assert ids.identity_of(fresh) == ALICE
        assert ids.public_key_pem_of_certificate(fresh) == ids.public_key_pem_of_certificate(caller.certificate)
        assert ids.not_after(fresh) > NOW + timedelta(days=CONFIG.certificate_days - 0.01)
        key = key_digest(ids.public_key_pem_of_certificate(fresh))
        assert await stand.store.do(lambda journal: certificates_of(journal, key)) == [caller.certificate, fresh]
        entry = await stand.store.do(lambda journal: journal.rows("SELECT * FROM entries ORDER BY seq DESC")[0])
        assert (entry["kind"], key in entry["body"]) == ("renewed", True)
        before = await stand.entries()
        for asking in (caller, Caller(ALICE, fresh)) * 20:  # lost answers, and somebody who cannot wait
            assert (await stand.membership.renew(asking)).certificate_pem == fresh
        assert await stand.entries() == before

    standing(work)
    assert verify(layout).problems == []


def test_before_half_of_its_life_is_over_the_certificate_stays(standing: Callable[[Work], None]) -> None:
    async def work(stand: Stand) -> None:
        caller = await stand.enrol(age=3)
        before = await stand.entries()
        assert (await stand.membership.renew(caller)).certificate_pem == caller.certificate
        assert await stand.entries() == before

    standing(work)


def test_a_relay_goes_on_serving_under_the_names_of_its_token(standing: Callable[[Work], None]) -> None:
    async def work(stand: Stand) -> None:
        relay = ids.Identity("relay", "acme", "relay")
        for age in (0, 4):  # the serving certificate is made anew each time: it opens no door
            caller = await stand.enrol(relay, age=age, hosts=("relay.example", "10.0.0.9"))
            serving = (await stand.membership.renew(caller)).serving_certificate_pem
            found = x509.load_pem_x509_certificate(serving).extensions
            names = found.get_extension_for_class(x509.SubjectAlternativeName).value
            assert names.get_values_for_type(x509.DNSName) == ["relay.example"]
            assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.9"]
            assert ids.public_key_pem_of_certificate(serving) == ids.public_key_pem_of_certificate(caller.certificate)
            with pytest.raises(CertificateError, match="client authentication"):
                ids.identity_of(serving)

    standing(work)


@pytest.mark.parametrize("checked", [True, False], ids=["real", "planted"])
@pytest.mark.parametrize("lost", ["shut out", "replaced"])
def test_who_has_lost_its_place_is_not_renewed(
    standing: Callable[[Work], None], monkeypatch: pytest.MonkeyPatch, lost: str, checked: bool
) -> None:
    """The second case is a planted bug: what was true when the call began is not asked again when it is recorded."""
    if not checked:
        monkeypatch.setattr(members, "check_standing", lambda row, identity, key: row)

    async def work(stand: Stand) -> None:
        caller = await stand.enrol(age=4)
        if lost == "shut out":
            await stand.store.do(lambda journal: revoke_member(journal, caller.member, True, 1))
        else:
            await stand.enrol()
        with pytest.raises((AccessError, CertificateError), match=lost):
            await stand.membership.renew(caller)
        key = key_digest(ids.public_key_pem_of_certificate(caller.certificate))

        def record(journal: Journal) -> None:
            renew_member(journal, caller.identity, key, b"fresh", 1)

        with contextlib.nullcontext() if not checked else pytest.raises((AccessError, CertificateError), match=lost):
            await stand.store.do(record)
        row = await stand.store.do(lambda journal: find_member(journal, caller.member))
        assert row is not None
        assert (row.certificate == b"fresh") is not checked

    standing(work)


def test_revoking_is_told_to_the_open_calls_and_can_be_undone(standing: Callable[[Work], None], layout: Layout) -> None:
    async def work(stand: Stand) -> None:
        caller = await stand.enrol()
        key = key_digest(ids.public_key_pem_of_certificate(caller.certificate))
        await stand.membership.revoke("acme/alice", undo=False)
        assert stand.looks == 1
        with pytest.raises(AccessError):
            stand.roster.check(ALICE, key)
        entries = await stand.entries()
        await stand.membership.revoke("acme/alice", undo=False)
        assert await stand.entries() == entries
        await stand.membership.revoke("acme/alice", undo=True)
        stand.roster.check(ALICE, key)
        with pytest.raises(RequestError, match="no member 'acme/bob'"):
            await stand.membership.revoke("acme/bob", undo=False)
        await stand.membership.revoke("acme/alice", undo=False)

    standing(work)
    assert verify(layout).problems == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("revoked = 1", "shut out, which was not chained"),
        ("certificate = x'00'", "another certificate than was chained"),
        ("hosts = 'evil.example'", "other names than it enrolled with"),
    ],
)
def test_verify_sees_what_was_not_chained(
    standing: Callable[[Work], None], layout: Layout, change: str, problem: str
) -> None:
    def edit(journal: Journal) -> None:
        with journal.transaction():
            journal.change(f"UPDATE members SET {change}")

    async def work(stand: Stand) -> None:
        await stand.membership.renew(await stand.enrol(age=4))
        await stand.store.do(edit)

    standing(work)
    assert [problem in line for line in verify(layout).problems] == [True]


def _row(key: str, **changes: Any) -> MemberRow:
    return replace(MemberRow("acme/alice", "trainer", key * 64, b"certificate", False), **changes)


@pytest.mark.parametrize("asked_again", [True, False], ids=["real", "planted"])
def test_a_replayed_enrolment_changes_nothing(
    standing: Callable[[Work], None], monkeypatch: pytest.MonkeyPatch, asked_again: bool
) -> None:
    """The second case is a planted bug: a replay counts whatever has become of the member since."""
    if not asked_again:
        monkeypatch.setattr(members, "_asked_again", lambda *arguments: True)

    async def work(stand: Stand) -> None:
        def enrol(row: MemberRow, token: str, node_key: bytes = b"") -> MemberRow | None:
            try:
                return enrol_member(journal[0], row, node_key, token, 1)
            except TokenError:
                return None

        journal: list[Journal] = []

        def story(opened: Journal) -> list[MemberRow | None]:
            journal.append(opened)
            first = enrol(_row("a"), "token 1")
            again = enrol(_row("a", certificate=b"another"), "token 1")
            assert again == first == find_member(opened, "acme/alice")
            assert opened.rows("SELECT count(*) FROM entries")[0][0] == 1
            assert enrol(_row("b"), "token 1") is None
            assert enrol(_row("b"), "token 2") == _row("b")
            taken_back = enrol(_row("a"), "token 1")  # by whoever has the old key and the old token
            other_role = enrol(_row("b", role="reader"), "token 2")
            other_node = enrol(_row("b"), "token 2", b"another node")
            assert find_member(opened, "acme/alice") == _row("b")
            return [taken_back, other_role, other_node]

        answers = await stand.store.do(story)
        assert (answers == [None, None, None]) is asked_again

    standing(work)


def test_an_enrolment_key_that_was_cut_short_opens_no_hub(layout: Layout) -> None:
    whole = layout.enrol_key.read_bytes()
    for damaged in (b"", whole[:16], whole + b"x"):
        with pytest.raises(ConfigError, match="expected 32: restore it from a backup"):
            Authority(b"", b"", damaged)
    Authority(b"", b"", whole)
