"""Enrolment against a real server."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_private_key

from share_client.enrol import enrol
from share_client.join import ensure_member, only_join
from share_client.member import ClientLayout, load_credentials, load_member
from share_core.errors import CertificateError, ConfigError, FedshareError, TokenError, UnavailableError
from share_core.identity import certificate_fingerprint


def now() -> datetime:
    return datetime.now(UTC)


def test_a_token_becomes_a_member(hub: Any, tmp_path: Path, spec: Any) -> None:
    layout = ClientLayout(tmp_path / "c")
    member = enrol(hub.token("enrolorg/one"), layout, now())
    assert member == load_member(layout)
    assert (member.member, member.space_id) == ("enrolorg/one", spec.space_id)
    assert (member.hub_address, member.gateway_address) == (hub.config.hub_address, hub.config.gateway_address)
    private = load_ssh_private_key(layout.node_key.read_bytes(), None)
    public = load_pem_public_key(layout.node_public_key.read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert private.public_key() == public
    assert {path.stat().st_mode & 0o777 for path in (layout.key, layout.node_key)} == {0o600}
    assert layout.identity.stat().st_mode & 0o777 == 0o700


def test_another_authority_is_refused_before_the_token_is_sent(hub: Any, tmp_path: Path) -> None:
    wrong = "ab" * 32
    token = hub.token("enrolorg/two", ca_sha256=wrong)
    layout = ClientLayout(tmp_path / "c")
    with pytest.raises(CertificateError) as caught:
        enrol(token, layout, now())
    assert wrong in str(caught.value)
    assert certificate_fingerprint(hub.layout.ca_cert.read_bytes()) in str(caught.value)
    assert not layout.member.exists()


def test_a_used_token_is_refused_and_names_the_way_out(hub: Any, tmp_path: Path) -> None:
    token = hub.token("enrolorg/three")
    enrol(token, ClientLayout(tmp_path / "first"), now())
    second = ClientLayout(tmp_path / "second")
    with pytest.raises(TokenError, match="used"):
        enrol(token, second, now())
    assert not second.member.exists()


def test_an_expired_token_is_refused_here_and_there(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = hub.token("enrolorg/four", expires=int(now().timestamp()) - 60)
    with pytest.raises(TokenError, match=r"enrolorg/four expired at .* ask the operator"):
        enrol(token, ClientLayout(tmp_path / "c"), now())
    with pytest.raises(TokenError, match="expired"):  # a client with a wrong clock
        enrol(token, ClientLayout(tmp_path / "c"), datetime(2020, 1, 1, tzinfo=UTC))


def test_a_forged_token_is_refused(hub: Any, tmp_path: Path) -> None:
    token = hub.token("enrolorg/five")
    forged = token[:-12] + ("A" if token[-12] != "A" else "B") + token[-11:]
    with pytest.raises(FedshareError):
        enrol(forged, ClientLayout(tmp_path / "c"), now())


def test_nobody_there(hub: Any, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=f"{address}.*is it running"):
            enrol(hub.token("enrolorg/six", address=address), ClientLayout(tmp_path / "c"), now())


def test_an_interrupted_enrolment_continues_with_the_same_token(hub: Any, tmp_path: Path) -> None:
    layout = ClientLayout(tmp_path / "c")
    token = hub.token("enrolorg/seven")
    member = enrol(token, layout, now())
    before = layout.key.read_bytes(), layout.node_key.read_bytes()
    layout.member.unlink()  # as if the process had died just before its last step
    assert enrol(token, layout, now()) == member
    assert (layout.key.read_bytes(), layout.node_key.read_bytes()) == before


def test_coming_back_needs_no_token(hub: Any, tmp_path: Path, later: datetime) -> None:
    layout = ClientLayout(tmp_path / "c")
    told: list[str] = []
    with pytest.raises(ConfigError, match="give a join token"):
        ensure_member(layout, None, now(), told.append)
    member = ensure_member(layout, hub.token("enrolorg/eight"), now(), told.append)
    assert ensure_member(layout, None, now(), told.append) == member
    assert ensure_member(layout, hub.token("enrolorg/eight"), now(), told.append) == member
    assert "was not used" in told[-1]
    with pytest.raises(CertificateError, match="expired"):
        load_credentials(layout, later)


def test_another_members_token_does_not_take_over_a_directory(hub: Any, tmp_path: Path) -> None:
    layout = ClientLayout(tmp_path / "c")
    enrol(hub.token("enrolorg/nine"), layout, now())
    with pytest.raises(ConfigError, match="enrolorg/nine"):
        enrol(hub.token("enrolorg/ten"), layout, now())


def test_one_join_at_a_time(tmp_path: Path) -> None:
    layout = ClientLayout(tmp_path / "c")
    with only_join(layout), pytest.raises(ConfigError, match="another share-client join"), only_join(layout):
        raise AssertionError("the second join got in")
    with only_join(layout):
        pass
