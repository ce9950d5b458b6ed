"""A member directory whose files are damaged: the message names the file and the way out, and the way out works."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from share_client.enrol import enrol, make_node_key
from share_client.join import ensure_member
from share_client.link import HubLink
from share_client.member import ClientLayout, check_node_key, load_credentials, load_member
from share_core.durable import write_atomic
from share_core.errors import CertificateError, ConfigError, FedshareError
from share_core.identity import certificate_fingerprint, new_private_key_pem, public_key_pem

NOW = datetime.now(UTC)

FILES: dict[str, Callable[[ClientLayout, datetime], object]] = {
    "key.pem": load_credentials,
    "cert.pem": load_credentials,
    "ca.pem": load_credentials,
    "node.key": lambda layout, now: check_node_key(layout),
    "node.pub": lambda layout, now: check_node_key(layout),
}


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x15]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": cut,
    "flipped": flipped,
    "zeros": lambda data: bytes(len(data)),
    "binary": lambda data: bytes(range(256)) * 4,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name: str, damage: str, offline: Any) -> None:
    layout: ClientLayout = offline[0]
    load_credentials(layout, NOW)
    check_node_key(layout)
    path = layout.identity / name
    write_atomic(path, DAMAGES[damage](path.read_bytes()))
    with pytest.raises(CertificateError) as raised:
        FILES[name](layout, NOW)
    assert str(path) in str(raised.value)
    assert "new token" in str(raised.value), "the sentence says what to do"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, offline: Any) -> None:
    layout: ClientLayout = offline[0]
    (layout.identity / name).unlink()
    with pytest.raises(ConfigError, match=f"{name}.*new token"):
        FILES[name](layout, NOW)


def test_keys_that_do_not_belong_together(offline: Any) -> None:
    layout: ClientLayout = offline[0]
    write_atomic(layout.key, new_private_key_pem())
    with pytest.raises(CertificateError, match=r"key.pem is not the key that .*cert.pem was issued for"):
        load_credentials(layout, NOW)
    write_atomic(layout.node_key, make_node_key()[0])
    with pytest.raises(CertificateError, match=r"node.key is not the key of .*node.pub"):
        check_node_key(layout)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"member": 5}'])
def test_a_damaged_member_file_is_named(text: str, offline: Any) -> None:
    layout: ClientLayout = offline[0]
    layout.member.write_text(text)
    with pytest.raises(ConfigError, match=r"member\.json"):
        load_member(layout)


@pytest.mark.parametrize("name", ["key.pem", "cert.pem", "node.key"])
@pytest.mark.parametrize("gone", [False, True], ids=["damaged", "gone"])
def test_a_new_token_repairs_it(gone: bool, name: str, hub: Any, tmp_path: Path) -> None:
    member = f"repair-{name.replace('.', '-')}-{gone}/main".lower()
    layout = ClientLayout(tmp_path / "c")
    before = enrol(hub.token(member), layout, NOW)
    path = layout.identity / name
    if gone:
        path.unlink()
    else:
        write_atomic(path, b"damaged")
    told: list[str] = []
    with pytest.raises(FedshareError, match=name):
        ensure_member(layout, None, NOW, told.append)
    after = ensure_member(layout, hub.token(member), NOW, told.append)
    assert after.member == before.member
    assert told == [f"enrolled again as {member}"]
    with HubLink(after.hub_address, load_credentials(layout, NOW)) as link:
        assert link.describe().spec.space_id == after.space_id
    check_node_key(layout)
    if not gone and name != "cert.pem":
        assert (layout.identity / f"{name}.damaged").read_bytes() == b"damaged"


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_changes_who_we_are(name: str, offline: Any) -> None:
    """Every byte of every file, one bit each: told, with the file's name, or without any consequence."""
    layout: ClientLayout = offline[0]
    path = layout.identity / name
    good = path.read_bytes()

    def meaning() -> tuple[object, ...]:
        credentials = load_credentials(layout, NOW)
        key = public_key_pem(credentials.key)
        certificates = [certificate_fingerprint(pem) for pem in (credentials.certificate, credentials.authority)]
        check_node_key(layout)
        node = serialization.load_ssh_private_key(layout.node_key.read_bytes(), None).public_key()
        public = serialization.load_pem_public_key(layout.node_public_key.read_bytes())
        return key, *certificates, node, public

    before, told = meaning(), 0
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ (1 << position % 7)]) + good[position + 1 :])
        try:
            assert meaning() == before, f"bit {position % 7} of byte {position} changed who we are, unnoticed"
        except CertificateError as error:
            assert str(path) in str(error)
            told += 1
    assert told > len(good) * 0.8, "most bytes matter"
