"""What a client signs: no two statements share their bytes, and every byte of a statement and a signature counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from share_core.errors import CertificateError, SignatureError
from share_core.identity import (
    Identity,
    UpdateStatement,
    check_update_signature,
    make_authority,
    make_csr,
    make_signer,
    new_private_key_pem,
    public_key_pem,
    sign_csr,
    sign_update,
    statement_of,
)
from share_core.identity import statement as module
from share_proto.v1 import hub_pb2

NOW = datetime.now(UTC)
AUTHORITY = make_authority("test", NOW)
KEY = new_private_key_pem()
CERTIFICATE = sign_csr(*AUTHORITY, make_csr(KEY), Identity("trainer", "acme", "alice"), NOW, 1)
STATEMENT = UpdateStatement(
    space_id="sha256:5",
    task_id="acme/t",
    update_id="0a" * 16,
    member="acme/alice",
    sequence=7,
    payload_sha256="ab" * 32,
    payload_size=900,
    create=True,
    open=True,
    organisations=("bolt", "east"),
    schema_sha256="cd" * 32,
    rows=12,
    lease_id="ef" * 16,
    privacy='{"clip":1.0}',
)
OTHER: dict[str, Any] = {
    "sequence": 8,
    "payload_size": 901,
    "create": False,
    "open": False,
    "organisations": ("bolt",),
    "rows": 13,
}

_text = st.text(max_size=6)
_statements = st.builds(
    UpdateStatement,
    space_id=_text,
    task_id=_text,
    update_id=_text,
    member=_text,
    sequence=st.integers(1, 20),
    payload_sha256=_text,
    payload_size=st.integers(1, 20),
    create=st.booleans(),
    open=st.booleans(),
    organisations=st.lists(_text, max_size=3).map(tuple),
    schema_sha256=_text,
    rows=st.integers(0, 20),
    lease_id=_text,
    privacy=_text,
)


@settings(max_examples=200, deadline=None)
@given(_statements, _statements)
def test_two_statements_never_give_the_same_bytes(one: UpdateStatement, other: UpdateStatement) -> None:
    assert (one.to_bytes() == other.to_bytes()) == (one == other)


def test_the_bytes_are_those_of_the_docstring() -> None:
    parts = ["fedshare update 1", "sha256:5", "acme/t", "0a" * 16, "acme/alice", "7", "ab" * 32, "900", "1", "1", "2"]
    parts += ["bolt", "east", "cd" * 32, "12", "ef" * 16, '{"clip":1.0}']
    assert STATEMENT.to_bytes() == b"".join(len(part).to_bytes(8, "big") + part.encode() for part in parts)


def changed(name: str) -> UpdateStatement:
    return replace(STATEMENT, **{name: OTHER.get(name, f"{getattr(STATEMENT, name)}x")})


def refused(statement: UpdateStatement, signature: bytes, signer: bytes = CERTIFICATE) -> bool:
    try:
        check_update_signature(signer, statement, signature)
    except SignatureError as error:
        assert statement.update_id in str(error) or "sequence" in str(error)
        return True
    return False


def test_signed_with_the_key_of_the_certificate() -> None:
    signature = sign_update(KEY, STATEMENT)
    assert not refused(STATEMENT, signature)
    assert not refused(STATEMENT, signature, public_key_pem(KEY))


@pytest.mark.parametrize("name", [field.name for field in fields(UpdateStatement)])
def test_no_field_can_be_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(changed(name), sign_update(KEY, STATEMENT))
    # The planted bug: a field that is not signed.
    honest = UpdateStatement.to_bytes
    same = getattr(STATEMENT, name)
    monkeypatch.setattr(UpdateStatement, "to_bytes", lambda self: honest(replace(self, **{name: same})))
    assert not refused(changed(name), sign_update(KEY, STATEMENT)), "the assertion above would fail"


def test_every_byte_of_a_signature_counts() -> None:
    signature = sign_update(KEY, STATEMENT)
    for at in range(len(signature)):
        for bit in (0, 7):
            broken = signature[:at] + bytes([signature[at] ^ 1 << bit]) + signature[at + 1 :]
            assert refused(STATEMENT, broken), f"byte {at}"
    assert refused(STATEMENT, signature + b"\0")
    assert refused(STATEMENT, signature[:-1])


@pytest.mark.parametrize("sequence", [0, -1, 2**63])
def test_numbers_begin_at_one(sequence: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(STATEMENT, sequence=sequence)
    with pytest.raises(SignatureError, match="sequence must be from 1"):
        sign_update(KEY, wrong)
    monkeypatch.setattr(module, "check_sequence", lambda sequence: None)
    signature = sign_update(KEY, wrong)
    assert not refused(wrong, signature), "without the guard it would be taken"
    monkeypatch.undo()
    assert refused(wrong, signature)


def strangers() -> dict[str, Callable[[], bytes]]:
    """Return what else could be shown instead of the sender's certificate."""
    return {
        "another key": lambda: public_key_pem(new_private_key_pem()),
        "no certificate": lambda: b"",
        "the hub's signer": lambda: make_signer(*AUTHORITY, Identity("signer", "server", "hub"), NOW, 1)[0],
        "half a certificate": lambda: CERTIFICATE[:200],
    }


@pytest.mark.parametrize("name", strangers())
def test_other_signers_are_refused_in_one_way(name: str) -> None:
    assert refused(STATEMENT, sign_update(KEY, STATEMENT), strangers()[name]())


def test_an_unsigned_update_is_told_what_to_do() -> None:
    with pytest.raises(SignatureError, match="is not signed: every update is signed"):
        check_update_signature(CERTIFICATE, STATEMENT, b"")


def test_only_a_certificate_key_signs() -> None:
    signing = make_signer(*AUTHORITY, Identity("signer", "server", "hub"), NOW, 1)[1]
    with pytest.raises(CertificateError, match="EC P-256"):
        sign_update(signing, STATEMENT)


def test_a_header_says_all_of_it() -> None:
    """Every field of the header is signed but the two that cannot be: where an upload goes on, and the signature."""
    header = hub_pb2.SubmitHeader(
        update_id=STATEMENT.update_id,
        space_id=STATEMENT.space_id,
        task_id=STATEMENT.task_id,
        create=True,
        payload_size=900,
        payload_sha256=STATEMENT.payload_sha256,
        lease_id=STATEMENT.lease_id,
        rows=12,
        offset=5,
        sharing=hub_pb2.TaskSharing(open=True, organisations=["east", "bolt", "east"]),
        schema_sha256=STATEMENT.schema_sha256,
        sequence=7,
        signature=b"s",
        privacy=STATEMENT.privacy,
    )
    assert len(header.ListFields()) == len(hub_pb2.SubmitHeader.DESCRIPTOR.fields), "a new field: is it signed?"
    assert statement_of(header, "acme/alice") == STATEMENT
    for field in hub_pb2.SubmitHeader.DESCRIPTOR.fields:
        without = hub_pb2.SubmitHeader()
        without.CopyFrom(header)
        without.ClearField(field.name)
        same = statement_of(without, "acme/alice") == STATEMENT
        assert same == (field.name in ("offset", "signature")), field.name
