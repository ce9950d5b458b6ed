"""Certificates are renewed in time, by whoever looks first, and used without a restart."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from share_client import cli, renewal
from share_client.channel import refusal_from_rpc
from share_client.link import HubLink
from share_client.member import ClientLayout, load_credentials
from share_client.renewal import kept_renewed, renew_if_due
from share_core import identity as ids
from share_core.durable import write_atomic
from share_core.errors import CertificateError, FedshareError, UnavailableError
from share_proto.v1 import hub_pb2

ONE = ids.Identity("trainer", "org", "one")


def now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Issuer:
    """Signs what it is asked for and remembers with which certificate it was called."""

    authority: bytes
    authority_key: bytes
    identity: ids.Identity = ONE
    key: bytes = b""
    """Certify this key instead of the caller's."""
    away: bool = False
    shown: list[bytes] = field(default_factory=list)
    following: threading.Event = field(default_factory=threading.Event)

    def _note(self, context: grpc.ServicerContext) -> bytes:
        found: Any = context.auth_context()["x509_pem_cert"]
        self.shown.append(found[0])
        return self.shown[-1]

    def Renew(self, request: hub_pb2.RenewRequest, context: grpc.ServicerContext) -> hub_pb2.RenewResponse:
        if self.away:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        shown = self._note(context)
        if self.key:
            fresh = ids.sign_csr(self.authority, self.authority_key, ids.make_csr(self.key), self.identity, now(), 7)
        elif self.identity != ONE:
            other = ids.new_private_key_pem()
            fresh = ids.sign_csr(self.authority, self.authority_key, ids.make_csr(other), self.identity, now(), 7)
        else:
            fresh = ids.reissue(self.authority, self.authority_key, shown, now(), 7)
        return hub_pb2.RenewResponse(certificate_pem=fresh)

    def ListTasks(self, request: hub_pb2.ListTasksRequest, context: grpc.ServicerContext) -> hub_pb2.ListTasksResponse:
        self._note(context)
        return hub_pb2.ListTasksResponse()

    def FollowVersions(self, request: hub_pb2.FollowVersionsRequest, context: grpc.ServicerContext) -> Any:
        over = threading.Event()
        context.add_callback(over.set)
        self.following.set()
        over.wait(60)
        yield from ()


@pytest.fixture
def issuer(offline: tuple[ClientLayout, bytes, bytes]) -> Issuer:
    return Issuer(*offline[1:])


def age(offline: tuple[ClientLayout, bytes, bytes], days: float, life: float = 7) -> bytes:
    """Give the directory a certificate over its own key that was issued ``days`` ago; return it."""
    layout, authority, authority_key = offline
    csr = ids.make_csr(layout.key.read_bytes())
    certificate = ids.sign_csr(authority, authority_key, csr, ONE, now() - timedelta(days=days), life)
    write_atomic(layout.certificate, certificate)
    return certificate


def shown_by(link: HubLink, issuer: Issuer) -> bytes:
    """Call and return the certificate that the hub saw."""
    link.list_tasks()
    return issuer.shown[-1]


def test_half_of_a_life_is_left_alone_and_the_other_half_renewed(
    offline: tuple[ClientLayout, bytes, bytes], issuer: Issuer, serving: Callable[..., HubLink]
) -> None:
    layout, link = offline[0], serving(issuer)
    young = age(offline, 3.4)
    assert not renew_if_due(layout, link, now())
    assert layout.certificate.read_bytes() == young
    assert issuer.shown == []
    age(offline, 3.6)
    assert renew_if_due(layout, link, now())
    assert ids.not_after(load_credentials(layout, now()).certificate) > now() + timedelta(days=6.9)
    assert not renew_if_due(layout, link, now())


@pytest.mark.parametrize("wrong", ["name", "key", "authority", "away"])
def test_what_is_not_ours_is_not_kept(
    offline: tuple[ClientLayout, bytes, bytes], issuer: Issuer, serving: Callable[..., HubLink], wrong: str
) -> None:
    layout, link, present = offline[0], serving(issuer), age(offline, 5)
    if wrong == "name":
        issuer.identity = ids.Identity("operator", "org", "one")
    elif wrong == "key":
        issuer.key = ids.new_private_key_pem()
    elif wrong == "authority":
        issuer.authority, issuer.authority_key = ids.make_authority("test", now())
    issuer.away = wrong == "away"
    with pytest.raises(UnavailableError if wrong == "away" else CertificateError):
        renew_if_due(layout, link, now())
    assert layout.certificate.read_bytes() == present


def test_a_planted_client_that_keeps_anything_is_noticed(
    offline: tuple[ClientLayout, bytes, bytes],
    issuer: Issuer,
    serving: Callable[..., HubLink],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(renewal, "check_credentials", lambda layout, credentials, now: None)
    layout, link, present = offline[0], serving(issuer), age(offline, 5)
    issuer.key = ids.new_private_key_pem()
    assert renew_if_due(layout, link, now())
    assert layout.certificate.read_bytes() != present


def test_open_connections_change_to_the_new_certificate(
    offline: tuple[ClientLayout, bytes, bytes], issuer: Issuer, serving: Callable[..., HubLink]
) -> None:
    layout, present, told = offline[0], age(offline, 5), list[str]()
    link = serving(issuer)
    link.use(load_credentials(layout, now()))
    assert shown_by(link, issuer) == present
    with kept_renewed(layout, [link, None], told.append):
        pass  # it has looked by the end of the block at the latest
    fresh = layout.certificate.read_bytes()
    assert fresh != present
    assert shown_by(link, issuer) == fresh
    assert [text.split(" until ")[0] for text in told] == ["certificate renewed"]


def test_somebody_elses_renewal_is_taken_over(
    offline: tuple[ClientLayout, bytes, bytes],
    issuer: Issuer,
    serving: Callable[..., HubLink],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(renewal, "LOOK_S", 0.01)
    layout, link = offline[0], serving(issuer)
    age(offline, 1)
    with kept_renewed(layout, [link], lambda text: None):
        fresh = age(offline, 0)  # another process, in one step
        while shown_by(link, issuer) != fresh:
            pass


def test_a_hub_that_is_away_is_mentioned_once_and_asked_again(
    offline: tuple[ClientLayout, bytes, bytes],
    issuer: Issuer,
    serving: Callable[..., HubLink],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(renewal, "LOOK_S", 0.01)
    layout, present, link, told = offline[0], age(offline, 5), serving(issuer), list[str]()
    issuer.away = True
    looks, look = [0], renewal._Keeper._look

    def counted(keeper: Any, moment: datetime) -> bool:
        looks[0] += 1
        return look(keeper, moment)

    monkeypatch.setattr(renewal._Keeper, "_look", counted)
    with kept_renewed(layout, [link], told.append):
        while looks[0] < 4:
            pass
        assert layout.certificate.read_bytes() == present
        issuer.away = False
        while layout.certificate.read_bytes() == present:
            pass
    assert ["could not be renewed yet" in text for text in told] == [True, False]


def test_a_certificate_that_ends_all_the_same_says_what_to_do(
    offline: tuple[ClientLayout, bytes, bytes], issuer: Issuer, serving: Callable[..., HubLink]
) -> None:
    link, told, ended = serving(issuer), list[str](), list[FedshareError]()
    age(offline, 5, life=4.9)
    with kept_renewed(offline[0], [link], told.append, ended.append):
        pass
    assert [str(error) for error in ended] == told
    assert "before it could be renewed: ask the operator for a new join token" in told[0]
    assert issuer.shown == []


def test_a_stream_on_the_old_connection_ends_as_if_the_line_was_cut(
    offline: tuple[ClientLayout, bytes, bytes], issuer: Issuer, serving: Callable[..., HubLink]
) -> None:
    """So that its reader opens it again, over the new one; other calls are not touched."""
    link = serving(issuer)
    stream = link.hub.FollowVersions(hub_pb2.FollowVersionsRequest())
    assert issuer.following.wait(30)
    link.use(load_credentials(offline[0], now()), grace_s=0.0)
    with pytest.raises(grpc.RpcError) as caught:
        next(iter(stream))
    assert type(refusal_from_rpc(caught.value, "following")) is UnavailableError
    link.list_tasks()


def test_a_real_hub_renews_what_a_command_finds_due(hub: Any, tmp_path: Path) -> None:
    layout = hub.client(tmp_path / "c", "renew/one")
    fresh = layout.certificate.read_bytes()
    identity = ids.Identity("trainer", "renew", "one")
    own = hub.layout
    csr = ids.make_csr(layout.key.read_bytes())
    old = ids.sign_csr(own.ca_cert.read_bytes(), own.ca_key.read_bytes(), csr, identity, now() - timedelta(days=5), 7)
    write_atomic(layout.certificate, old)
    done = CliRunner().invoke(cli.app, ["tasks", "--dir", str(layout.root), "--json"])
    assert done.exit_code == 0, done.output
    assert layout.certificate.read_bytes() == fresh, "the hub gives its newest one, which this directory had lost"
