"""The parts of a relay: what it keeps, what it believes, and the tokens that make one."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from share_core import identity as ids
from share_core.errors import CertificateError, ConfigError, ManifestError, RebaseError, TokenError
from share_proto.v1 import hub_pb2
from share_server.cli import app
from share_server.config import ServerConfig
from share_server.local import LocalHub
from share_server.provision import invite_member
from share_server.relay.replica import Replica
from share_server.relay.verify import Checker


def _now() -> datetime:
    return datetime.now(UTC)


class _Signer:
    """Makes versions as a hub would, with real signatures."""

    def __init__(self) -> None:
        self.authority, authority_key = ids.make_authority("fedshare authority", _now())
        signer = ids.Identity("signer", "server", "hub")
        self.certificate, self._key = ids.make_signer(self.authority, authority_key, signer, _now(), 30)
        self.links = [""]

    def checker(self) -> Checker:
        return Checker(self.authority, self.certificate, "sha256:s")

    def _manifest(self, kind: str, version: int, previous: str, payload: bytes) -> ids.SignedManifest:
        digest = hashlib.sha256(payload).hexdigest()
        return ids.sign_manifest(self._key, ids.Manifest(kind, "sha256:s", version, previous, digest, len(payload), 1))

    def step(self, payload: bytes) -> hub_pb2.DeltaHeader:
        version = len(self.links)
        signed = self._manifest("version", version, self.links[-1], payload)
        self.links.append(signed.sha256)
        self.last = hub_pb2.Manifest(body=signed.body, signature=signed.signature)
        return hub_pb2.DeltaHeader(
            from_version=version - 1,
            version=version,
            payload_size=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            manifest=self.last,
        )

    def whole(self, payload: bytes) -> hub_pb2.SnapshotHeader:
        version = len(self.links) - 1
        signed = self._manifest("snapshot", version, self.links[version], payload)
        return hub_pb2.SnapshotHeader(
            version=version,
            payload_size=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            manifest=hub_pb2.Manifest(body=signed.body, signature=signed.signature),
            version_manifest=self.last,
        )


def test_what_a_relay_keeps_is_bounded_and_late_readers_can_always_begin(tmp_path: Path) -> None:
    async def run() -> None:
        signer = _Signer()
        checker = signer.checker()
        replica = Replica(tmp_path, kept_bytes=100_000)
        await replica.load(checker)
        for number in range(1, 60):
            payload = bytes([number]) * 10_000
            header = signer.step(payload)
            await replica.append(header, payload, checker.step(header, replica.head, replica.link))
            if number % 7 == 0:
                whole = bytes([number]) * 5000
                kept = signer.whole(whole)
                await replica.put_whole(kept, whole, checker.whole(kept))
            held = sum(path.stat().st_size for path in tmp_path.glob("*.step"))
            if replica.whole is not None:
                assert held <= 100_000 + 7 * 10_000
                assert replica.base <= replica.whole.version <= replica.head == number
                for version in range(replica.base + 1, replica.head + 1):
                    assert (await replica.step(version))[1] == bytes([version]) * 10_000
        assert replica.base > 0
        with pytest.raises(RebaseError):
            await replica.step(replica.base)
        again = Replica(tmp_path)
        await again.load(checker)
        assert again.whole is not None
        assert (again.head, again.link, again.whole.version) == (replica.head, replica.link, again.base)
        signer.step(b"one more")
        ahead = signer.whole(b"far ahead")
        await again.put_whole(ahead, b"far ahead", checker.whole(ahead))
        assert (again.base, again.head) == (60, 60)
        assert [path.name for path in tmp_path.glob("*.step")] == []

    asyncio.run(run())


@pytest.mark.parametrize("field", ["version", "from_version", "payload_size", "payload_sha256", "manifest", "none"])
def test_a_step_that_is_not_what_was_signed_is_refused(field: str) -> None:
    signer = _Signer()
    checker = signer.checker()
    first, second = signer.step(b"first"), signer.step(b"second")
    link = checker.step(first, 0, "")
    assert checker.step(second, 1, link)
    if field == "manifest":
        second.manifest.CopyFrom(first.manifest)
    elif field == "none":
        second.ClearField("manifest")
    elif field == "payload_sha256":
        second.payload_sha256 = first.payload_sha256
    else:
        setattr(second, field, getattr(second, field) + 1)
    with pytest.raises(ManifestError):
        checker.step(second, 1, link)


def test_another_history_and_another_signer_are_refused() -> None:
    signer, other = _Signer(), _Signer()
    checker = signer.checker()
    first = signer.step(b"first")
    whole = signer.whole(b"whole")
    second = signer.step(b"second")
    with pytest.raises(ManifestError, match="another history"):
        checker.step(second, 1, "ab" * 32)
    with pytest.raises(ManifestError, match="not the hub's"):
        checker.step(other.step(b"first"), 0, "")
    with pytest.raises(CertificateError):
        Checker(signer.authority, other.certificate, "sha256:s")
    assert checker.whole(whole) == checker.step(first, 0, "")
    whole.version_manifest.CopyFrom(second.manifest)
    with pytest.raises(ManifestError):
        checker.whole(whole)


def test_tokens_of_relays() -> None:
    key, now = b"k" * 32, _now() + timedelta(hours=1)
    relay = ids.Identity("relay", "acme", "one")
    arguments = (key, "hub.example:7444", "ab" * 32, relay, now, "0f" * 16)
    plain = ids.token_encode(*arguments)
    served = ids.token_encode(*arguments, ("relay.example", "10.0.0.9", "::1"))
    assert ids.token_decode(plain).hosts == ()
    assert ids.check_token(served, key, _now()).hosts == ("relay.example", "10.0.0.9", "::1")
    trainer = ids.Identity("trainer", "acme", "one")
    with pytest.raises(TokenError, match="only a relay serves"):
        ids.token_encode(key, "hub.example:7444", "ab" * 32, trainer, now, "0f" * 16, ("a",))
    for bad in (("bad host",), ("",), tuple(f"h{n}" for n in range(9))):
        with pytest.raises(TokenError, match="host names"):
            ids.token_encode(*arguments, bad)


def test_hosts_of_a_token_cannot_be_changed() -> None:
    key, now = b"k" * 32, _now() + timedelta(hours=1)
    relay = ids.Identity("relay", "acme", "one")
    served = ids.token_encode(key, "hub.example:7444", "ab" * 32, relay, now, "0f" * 16, ("a.example",))
    body = served.removeprefix(ids.TOKEN_PREFIX)
    fields = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    for hosts in (["b.example"], ["a.example", "b.example"], None):
        changed = {**fields, "hosts": hosts}
        if hosts is None:
            del changed["hosts"]
        packed = base64.urlsafe_b64encode(json.dumps(changed, separators=(",", ":")).encode()).rstrip(b"=").decode()
        with pytest.raises(TokenError, match="not made by this server"):
            ids.check_token(ids.TOKEN_PREFIX + packed, key, _now())


def test_invitations_of_relays(
    new_hub: Callable[..., LocalHub], relay_token: Callable[..., str], tmp_path: Path
) -> None:
    hub = new_hub()
    public = ServerConfig(hosts=("hub.example",))
    with pytest.raises(ConfigError, match="hub's own name"):
        identity = ids.Identity("relay", "acme", "one")
        invite_member(hub.layout, public, identity, 1.0, _now(), ("HUB.example",))
    with pytest.raises(ConfigError, match="serves nobody"):
        identity = ids.Identity("reader", "acme", "one")
        invite_member(hub.layout, public, identity, 1.0, _now(), ("a.example",))
    for arguments, message in (
        (["invite", str(hub.layout.root), "acme/one", "--role", "relay"], "with --host"),
        (["relay", hub.invite("acme/two", "reader"), "--dir", str(tmp_path / "r"), "--listen", "a:1"], "serves nobody"),
        (["relay", "--dir", str(tmp_path / "r")], "is not enrolled"),
        (["relay", "nonsense", "--dir", str(tmp_path / "r")], "is not enrolled"),
        (["relay", relay_token(hub, "acme/r"), "--dir", str(tmp_path / "r")], "say where to listen"),
        (["relay", relay_token(hub, "acme/r"), "--dir", str(tmp_path / "r"), "--listen", "here"], "is not HOST:PORT"),
    ):
        answer = CliRunner().invoke(app, arguments)
        assert answer.exit_code == 1, arguments
        assert message in answer.stderr
