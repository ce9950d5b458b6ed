"""The hub checks who has signed an update before it takes a byte of it, and takes no number twice."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from share_core.errors import FedshareError, SignatureError, StorageError
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.hub import intake
from share_server.hub.engine import Engine
from share_server.local import Holder, member_of_no_hub, sign_header, submit_header
from share_server.store import updates
from share_server.store.journal import Journal
from share_server.store.records import NewUpdate, Sharing
from share_server.store.updates import accept_update, accept_updates, find_update, list_updates

ALICE, EVE = member_of_no_hub("acme/alice"), member_of_no_hub("acme/eve")


class Call:
    """One submission and how much of it the hub read."""

    def __init__(self, header: hub_pb2.SubmitHeader, payload: bytes) -> None:
        self.header, self.payload, self.chunks = header, payload, 0

    async def __call__(self, engine: Engine, sender: Holder) -> Any:
        return await engine.intake.receive(sender.caller, self._messages())

    async def _messages(self) -> AsyncIterator[hub_pb2.SubmitRequest]:
        yield hub_pb2.SubmitRequest(header=self.header)
        self.chunks += 1
        yield hub_pb2.SubmitRequest(chunk=self.payload)


def _nothing_taken(engine: Engine, call: Call) -> bool:
    staging = list((engine.store.root / "staging").iterdir())
    return call.chunks == 0 and not staging and engine.intake.quota.bytes_in_flight == 0


LIES: dict[str, Callable[[hub_pb2.SubmitHeader], hub_pb2.SubmitHeader]] = {
    "unsigned": lambda header: header,
    "signed by another member": lambda header: sign_header(header, EVE),
    "signed by nobody": lambda header: _with(sign_header(header, ALICE), signature=secrets.token_bytes(70)),
    "signed before it was changed": lambda header: _with(sign_header(header, ALICE), rows=9),
    "number zero": lambda header: _with(sign_header(header, ALICE), sequence=0),
    "number below zero": lambda header: _with(sign_header(header, ALICE), sequence=-1),
}


def _with(header: hub_pb2.SubmitHeader, **changes: Any) -> hub_pb2.SubmitHeader:
    for name, value in changes.items():
        setattr(header, name, value)
    return header


async def _lie(engine: Engine, spec: SpaceSpec, payload: bytes, name: str) -> bool:
    """Return whether a lie is refused before anything is taken."""
    call = Call(LIES[name](submit_header(spec, "acme/task", payload)), payload)
    try:
        await call(engine, ALICE)
    except SignatureError:
        return _nothing_taken(engine, call)
    except FedshareError:
        return False
    return False


def test_a_lie_is_refused_before_a_byte_is_taken(
    tmp_path: Path,
    run_engine: Callable[..., None],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(engine: Engine) -> None:
        for name in LIES:
            assert await _lie(engine, toy_spec, make_payload(1), name), name
        assert await engine.store.do(lambda journal: list_updates(journal, 0, 10)) == []
        call = Call(sign_header(submit_header(toy_spec, "acme/task", make_payload(1)), ALICE, 5), make_payload(1))
        row, duplicate = await call(engine, ALICE)
        assert not duplicate and call.chunks == 1
        assert (row.new.signer, row.new.sequence) == (ALICE.caller.signer, 5)
        assert row.new.signature == call.header.signature
        found = await engine.store.do(lambda journal: find_update(journal, row.new.update_id))
        assert found == row, "what was accepted is what is read back"
        # The planted bug: nobody looks at the signature.
        monkeypatch.setattr(intake, "check_update_signature", lambda *arguments: None)
        assert not await _lie(engine, toy_spec, make_payload(2), "signed by another member")

    run_engine(tmp_path / "store", work)


def test_sent_again_it_gets_its_first_receipt_also_with_a_new_key(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    payload = make_payload(1)
    renewed = member_of_no_hub("acme/alice", "contributor")
    assert renewed.caller.member == ALICE.caller.member and renewed.key != ALICE.key

    async def work(engine: Engine) -> None:
        header = sign_header(submit_header(toy_spec, "acme/task", payload), ALICE)
        first, _ = await Call(header, payload)(engine, ALICE)
        again = Call(header, payload)
        assert await again(engine, ALICE) == (first, True)
        anew = Call(sign_header(_with(_copy(header), sequence=0), renewed), payload)
        assert await anew(engine, renewed) == (first, True), "the answer to the first one was lost"
        assert again.chunks == anew.chunks == 0
        old = Call(header, payload)
        with pytest.raises(SignatureError, match="another key"):
            await old(engine, renewed)

    run_engine(tmp_path / "store", work)


def test_no_number_is_taken_twice(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    async def work(engine: Engine) -> None:
        one, two = make_payload(1), make_payload(2)
        await Call(sign_header(submit_header(toy_spec, "acme/a", one), ALICE, 3), one)(engine, ALICE)
        second = Call(sign_header(submit_header(toy_spec, "acme/b", two), ALICE, 3), two)
        with pytest.raises(SignatureError, match="sequence 3 signs update"):
            await second(engine, ALICE)
        assert _nothing_taken(engine, second)
        await Call(sign_header(submit_header(toy_spec, "acme/c", two), EVE, 3), two)(engine, EVE)
        # Two at once: neither is in the journal when the other one is looked at.
        calls = [Call(sign_header(submit_header(toy_spec, f"acme/{n}", one), ALICE, 9), one) for n in "xy"]
        answers = await asyncio.gather(*(call(engine, ALICE) for call in calls), return_exceptions=True)
        assert sorted(type(answer).__name__ for answer in answers) == ["SignatureError", "tuple"]
        assert not engine.store.failed.is_set()

    run_engine(tmp_path / "store", work)


def _new(number: int, **changes: Any) -> NewUpdate:
    made = NewUpdate(
        update_id=secrets.token_hex(16),
        member="acme/alice",
        task_id="acme/task",
        create=True,
        base_version=0,
        sha256=f"{number:064x}",
        size=10,
        coefficients=0,
        directions=10,
        heads=0,
        envelope=0,
        lease_id="",
        rows=0,
        sharing=Sharing(open=True, organisations=("bolt",)),
        schema_sha256="5c" * 32,
        signer="ab" * 32,
        sequence=number,
        signature=b"s",
    )
    return replace(made, **changes)


def test_a_number_twice_in_one_group_concerns_that_update_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal.db", "sha256:s")
    accept_update(journal, _new(1), 1)
    group = [_new(2), _new(2), _new(1), _new(3), _new(2, signer="cd" * 32)]
    answers = accept_updates(journal, group, 2)
    assert [isinstance(answer, SignatureError) for answer in answers] == [False, True, True, False, False]
    assert [row.new.sequence for row in list_updates(journal, 0, 10)] == [1, 2, 3, 2]
    assert group[0].update_id in str(answers[1]), "the refusal names the other one"
    # The planted bug: only the index is left, and it ends the journal for everybody.
    monkeypatch.setattr(updates, "require_fresh", lambda *arguments: None)
    with pytest.raises(StorageError, match="UNIQUE"):
        accept_updates(journal, [_new(4), _new(2)], 3)
    journal.close()


def test_what_was_signed_is_chained_and_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db", "sha256:s")
    new = _new(1)
    row, _ = accept_update(journal, new, 1)
    assert find_update(journal, new.update_id) == row
    assert row.new.statement("sha256:s") == new.statement("sha256:s")
    ((_, body, _),) = [entry for entry in journal.verify_chain().values() if entry[0] == "update"]
    assert (body["signer"], body["sequence"], body["signature"]) == (new.signer, 1, b"s".hex())
    assert "bolt" in body["terms"]
    journal.close()


def _copy(header: hub_pb2.SubmitHeader) -> hub_pb2.SubmitHeader:
    copied = hub_pb2.SubmitHeader()
    copied.CopyFrom(header)
    return copied
