"""Enrolment over its own listener: one token, one key, one member."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from share_core import identity as ids
from share_core.errors import CertificateError, OverloadError, RequestError, TokenError, UnavailableError
from share_proto.v1 import enrolment_pb2, enrolment_pb2_grpc, fleet_pb2, fleet_pb2_grpc, hub_pb2
from share_server.config import LimitConfig
from share_server.hub.enrolment_service import (
    WRONG_PER_PEER,
    RateLimit,
    WrongTokens,
    canonical_node_key,
    peer_network,
)
from share_server.local import LocalHub
from share_server.operator import CHANNEL_OPTIONS, named_error
from share_server.provision import invite_member


def _node_key() -> bytes:
    return ids.public_key_pem(ids.new_private_key_pem())


def test_a_token_gives_a_certificate_that_works(shared_hub: LocalHub) -> None:
    holder = shared_hub.enrol("acme/alice", "contributor")
    assert ids.identity_of(holder.certificate) == ids.Identity("contributor", "acme", "alice")
    with shared_hub.hub(holder) as hub:
        assert hub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=30).space_id == shared_hub.spec.space_id


def test_the_authority_is_shown_to_strangers_and_is_the_one_in_the_token(shared_hub: LocalHub) -> None:
    token = ids.token_decode(shared_hub.invite("acme/carol"))
    roots = grpc.ssl_channel_credentials(shared_hub.layout.ca_cert.read_bytes())
    with grpc.secure_channel(token.address, roots, CHANNEL_OPTIONS) as channel:
        stub = enrolment_pb2_grpc.EnrolmentStub(channel)
        answer = stub.GetAuthority(enrolment_pb2.GetAuthorityRequest(), timeout=30)
    assert ids.certificate_fingerprint(answer.ca_pem) == token.ca_sha256


def test_a_token_works_once_but_a_lost_answer_may_be_asked_for_again(shared_hub: LocalHub) -> None:
    token, key = shared_hub.invite("acme/dora"), ids.new_private_key_pem()
    first = shared_hub.enrol_with(token, key)
    again = shared_hub.enrol_with(token, key)
    for holder in (first, again):
        with shared_hub.hub(holder) as hub:
            hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
    with pytest.raises(TokenError, match="used already"):
        shared_hub.enrol_with(token, ids.new_private_key_pem())


def test_enrolling_again_replaces_certificate_and_node_key(shared_hub: LocalHub) -> None:
    keys = [_node_key(), _node_key()]
    old = shared_hub.enrol("acme/erin", node_key=keys[0])
    new = shared_hub.enrol("acme/erin", node_key=keys[1])
    with shared_hub.hub(old) as hub, pytest.raises(grpc.RpcError) as caught:
        hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
    assert isinstance(named_error(caught.value, "hub"), CertificateError)
    with shared_hub.channel(new) as channel:
        node = fleet_pb2_grpc.FleetStub(channel).GetNode(fleet_pb2.GetNodeRequest(), timeout=30).node
    assert (node.member, node.public_key_pem, node.node_id) == ("acme/erin", keys[1], 0)


@pytest.mark.parametrize("case", ["expired", "forged", "damaged", "operator"])
def test_tokens_that_must_not_work(shared_hub: LocalHub, case: str) -> None:
    now = datetime.now(UTC)
    alice = ids.Identity("trainer", "acme", "mallory")
    address, fingerprint = shared_hub.config.enrol_address, "ab" * 32
    key = shared_hub.layout.enrol_key.read_bytes()
    soon = now + timedelta(hours=1)
    operator = ids.Identity("operator", "acme", "mallory")
    tokens = {
        "expired": ids.token_encode(key, address, fingerprint, alice, now - timedelta(minutes=1), "aa" * 16),
        "forged": ids.token_encode(b"guesses!" * 4, address, fingerprint, alice, soon, "bb" * 16),
        "damaged": shared_hub.invite("acme/mallory")[:-9],
        "operator": ids.token_encode(key, address, fingerprint, operator, soon, "cc" * 16),
    }
    with pytest.raises(TokenError):
        shared_hub.enrol_with(tokens[case], ids.new_private_key_pem())


def test_requests_that_prove_nothing_are_refused_and_leave_the_token_unused(shared_hub: LocalHub) -> None:
    token, key = shared_hub.invite("acme/frank"), ids.new_private_key_pem()
    roots = grpc.ssl_channel_credentials(shared_hub.layout.ca_cert.read_bytes())
    bad = [
        (enrolment_pb2.EnrolRequest(token=token, csr_pem=b"rubbish"), CertificateError),
        (
            enrolment_pb2.EnrolRequest(token=token, csr_pem=ids.make_csr(key), node_public_key_pem=b"rubbish"),
            RequestError,
        ),
    ]
    with grpc.secure_channel(shared_hub.config.enrol_address, roots, CHANNEL_OPTIONS) as channel:
        stub = enrolment_pb2_grpc.EnrolmentStub(channel)
        for request, expected in bad:
            with pytest.raises(grpc.RpcError) as caught:
                stub.Enrol(request, timeout=30)
            assert isinstance(named_error(caught.value, "hub"), expected)
    assert shared_hub.enrol_with(token, key)


def test_enrolment_survives_a_kill_and_used_tokens_stay_used(new_hub: Callable[..., LocalHub]) -> None:
    server = new_hub()
    server.start()
    token = server.invite("acme/grace")
    holder = server.enrol_with(token, ids.new_private_key_pem())
    server.kill()
    server.start()
    with server.hub(holder) as hub:
        hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)
    with pytest.raises(TokenError):
        server.enrol_with(token, ids.new_private_key_pem())


def test_too_many_calls_from_one_address_are_told_to_wait(new_hub: Callable[..., LocalHub]) -> None:
    server = new_hub(limits=LimitConfig(enrolments_per_minute=3))
    server.start()
    for number in range(3):
        server.enrol(f"acme/m{number}")
    with pytest.raises(UnavailableError, match="enrolment calls per minute"):
        server.enrol("acme/m3")


def test_the_rate_limit_refills_and_keeps_addresses_apart() -> None:
    limit = RateLimit(60)
    for _ in range(60):
        limit.take("a", 100.0)
    with pytest.raises(UnavailableError):
        limit.take("a", 100.5)
    limit.take("b", 100.5)
    limit.take("a", 101.5)


def _told(wrong: WrongTokens, network: str, count: int, now_s: float = 100.0) -> int:
    """Show ``count`` wrong tokens; return of how many it is told what is wrong."""
    told = 0
    for _ in range(count):
        try:
            with wrong.counted(network, now_s):
                raise TokenError("forged")
        except TokenError:
            told += 1
        except OverloadError:
            pass
    return told


@pytest.mark.parametrize("counts", [True, False], ids=["real", "planted"])
def test_wrong_tokens_are_counted_for_each_peer_and_for_all(counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second case is a planted bug: nobody counts."""
    if not counts:
        monkeypatch.setattr(RateLimit, "take", lambda self, name, now_s: None)
    wrong = WrongTokens(per_peer=10, overall=25)
    told = [_told(wrong, network, 20) for network in ("a", "b", "c")]
    assert (told == [10, 10, 5]) is counts
    assert (_told(wrong, "d", 5) == 0) is counts, "the share of all is used up"
    with wrong.counted("a", 100.0):
        pass  # a right token is let through, even from there
    assert (_told(wrong, "a", 20, now_s=112.0) == 2) is counts, "a fifth of a minute later"


def test_a_right_token_is_taken_from_where_wrong_ones_came(new_hub: Callable[..., LocalHub]) -> None:
    server = new_hub()
    server.start()
    refused: list[type[Exception]] = []
    right, key = server.invite("acme/alice"), ids.new_private_key_pem()
    wrong = ids.token_encode(
        b"guesses!" * 4,
        server.config.enrol_address,
        "ab" * 32,
        ids.Identity("trainer", "acme", "alice"),
        datetime.now(UTC) + timedelta(hours=1),
        "aa" * 16,
    )
    for _ in range(WRONG_PER_PEER + 20):
        with pytest.raises((TokenError, OverloadError)) as caught:
            server.enrol_with(wrong, key)
        refused.append(caught.type)
    assert refused[:WRONG_PER_PEER] == [TokenError] * WRONG_PER_PEER
    assert OverloadError in refused[WRONG_PER_PEER:]
    assert server.enrol_with(right, key)


def test_a_used_token_brings_nobody_back(shared_hub: LocalHub) -> None:
    token, key = shared_hub.invite("acme/ivan"), ids.new_private_key_pem()
    first = shared_hub.enrol_with(token, key)
    assert shared_hub.enrol_with(token, key).certificate == first.certificate, "the same request gets the same answer"
    for other in ((ids.new_private_key_pem(), b""), (key, _node_key())):
        with pytest.raises(TokenError, match="used already"):
            shared_hub.enrol_with(token, *other)
    newer = shared_hub.enrol("acme/ivan")
    with pytest.raises(TokenError, match="used already"):  # whoever stole the old key may have the old token as well
        shared_hub.enrol_with(token, key)
    with shared_hub.hub(newer) as hub:
        hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=30)


def test_only_trainers_have_a_node(shared_hub: LocalHub) -> None:
    with pytest.raises(RequestError, match="a reader has no Flower node"):
        shared_hub.enrol("acme/judy", "reader", _node_key())


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("ipv4:203.0.113.9:5000", "203.0.113.9"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:5000", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:ffff::1]:5000", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::/64"),
        ("ipv6:%5B::ffff:203.0.113.9%5D:5000", "203.0.113.9"),
        ("unix:/run/x:1", "/run/x"),
    ],
)
def test_callers_are_counted_by_what_one_of_them_has(peer: str, network: str) -> None:
    assert peer_network(peer) == network


def test_node_keys_have_one_form() -> None:
    key = _node_key()
    assert canonical_node_key(key.replace(b"\n", b"\r\n")) == key
    assert canonical_node_key(b"") == b""
    with pytest.raises(RequestError):
        canonical_node_key(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")


def test_secrets_are_in_no_log_and_no_readable_file(shared_hub: LocalHub) -> None:
    token = shared_hub.invite("acme/heidi")
    shared_hub.enrol_with(token, ids.new_private_key_pem())
    with pytest.raises(TokenError):
        shared_hub.enrol_with(token, ids.new_private_key_pem())
    log = shared_hub.log_file.read_text()
    assert "acme/heidi" in log
    assert token not in log
    assert ids.token_decode(token).mac not in log
    for path in (shared_hub.layout.enrol_key, shared_hub.layout.ca_key, shared_hub.layout.key("server")):
        assert path.stat().st_mode & 0o077 == 0


def test_nobody_can_be_invited_as_the_server_itself(shared_hub: LocalHub) -> None:
    from share_core.errors import ConfigError

    now = datetime.now(UTC)
    for identity in (ids.Identity("operator", "acme", "x"), ids.Identity("trainer", "server", "x")):
        with pytest.raises(ConfigError):
            invite_member(shared_hub.layout, shared_hub.config, identity, 1, now)
