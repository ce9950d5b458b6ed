"""Who gets through the gateway, and how everybody else is answered. Each guard is shown to be the one that bites."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest

from share_core.errors import IdentityError
from share_server.fleet import guards, tls_listener

HEARTBEAT = "/v1/fleet/send-node-heartbeat"
MIB = 2**20


@pytest.fixture(scope="module")
def ann(stand: Any) -> Any:
    """An enrolled trainer."""
    return stand.caller("acme/ann")


@pytest.fixture(scope="module")
def bob(stand: Any) -> Any:
    """Another one."""
    return stand.caller("bolt/bob")


def messages(node_id: int, source: int) -> bytes:
    """Return a pushed message of ``node_id`` in the name of ``source``."""
    request = PushMessagesRequest()
    request.node.node_id = node_id
    request.messages_list.add().metadata.src_node_id = source
    return request.SerializeToString()


@pytest.mark.parametrize("path", sorted(path.decode() for path in guards.ROUTES))
def test_an_enrolled_trainer_reaches_every_published_path(stand: Any, ann: Any, probe: Any, path: str) -> None:
    body = messages(7, 7)
    assert stand.ask(ann, probe.post(ann, path, body)) == 200
    assert stand.seen[-1].path == path
    assert stand.seen[-1].body == body
    names = {name for name, _ in stand.seen[-1].headers}
    assert {b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"} <= names
    assert b"x-smuggled" not in names


def test_headers_of_the_superlink_stay_inside(stand: Any, ann: Any, probe: Any) -> None:
    with stand.connect(ann) as connection:
        connection.sendall(probe.post(ann, HEARTBEAT))
        assert b"x-inner" not in connection.recv(65536).lower()


def test_eight_mebibytes_go_up_chunked_and_one_more_byte_does_not(stand: Any, ann: Any, probe: Any) -> None:
    def chunked(size: int) -> bytes:
        piece = b"10000\r\n" + b"z" * 65536 + b"\r\n"
        rest = size % 65536
        last = (b"%x\r\n" % rest + b"z" * rest + b"\r\n") if rest else b""
        return piece * (size // 65536) + last + b"0\r\n\r\n"

    head = probe.post(ann, "/v1/fleet/push-object", extra="transfer-encoding: chunked\r\n")
    assert stand.ask(ann, head + chunked(8 * MIB)) == 200
    assert len(stand.seen[-1].body) == 8 * MIB
    before = len(stand.seen)
    assert stand.ask(ann, head + chunked(8 * MIB + 1)) == 413
    assert all(len(seen.body) <= 8 * MIB for seen in stand.seen[before:])


def test_strangers_do_not_get_a_connection(stand: Any, ann: Any, probe: Any) -> None:
    nobody = probe.caller(ann.key, None)
    assert stand.ask(nobody, probe.post(ann, HEARTBEAT)) is None
    foreign = stand.caller("acme/ann", enrolled=False, authority=probe.other_authority())
    assert stand.ask(foreign, probe.post(ann, HEARTBEAT)) is None
    assert stand.ask(ann, probe.post(ann, HEARTBEAT), ssl.TLSVersion.TLSv1_2) is None
    assert stand.ask(ann, probe.post(ann, HEARTBEAT)) == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/runtime/pull-messages", "/health", "/docs"),
        *(
            "/openapi.json",
            "/",
            "/v1/fleet/register-node",
            "/v1/fleet/unregister-node",
            f"{HEARTBEAT}/",
            f"/{HEARTBEAT}",
        ),
        *(
            f"{HEARTBEAT}?a=1",
            "/v1/fleet/../control/start-run",
            "/v1/fleet/%2e%2e/control/start-run",
            HEARTBEAT.upper(),
        ),
        *(
            "/v1/fleet%2fsend-node-heartbeat",
            f"{HEARTBEAT}%00",
            "/v1//fleet/send-node-heartbeat",
            "/%76%31/fleet/get-run",
        ),
    ],
)
def test_any_other_path_does_not_exist(stand: Any, ann: Any, probe: Any, path: str) -> None:
    before = len(stand.seen)
    assert stand.ask(ann, probe.post(ann, path)) in ({404} if not path.startswith("//") else {400, 404})
    assert len(stand.seen) == before


def ask_as(caller: Any, probe: Any) -> tuple[Any, bytes]:
    """Return a heartbeat of ``caller``."""
    return caller, probe.post(caller, HEARTBEAT)


Probe = Callable[[Any, Any, Any, Any], tuple[Any, bytes]]

REFUSALS: dict[str, tuple[str, int, Probe]] = {
    "unpublished path": ("check_path", 404, lambda s, a, b, p: (a, p.post(a, "/v1/control/start-run"))),
    "get": ("check_method", 405, lambda s, a, b, p: (a, p.post(a, HEARTBEAT, method="GET"))),
    "identity header twice": (
        "check_framing",
        400,
        lambda s, a, b, p: (a, p.post(a, HEARTBEAT, extra="flwr-public-key: eA==\r\n")),
    ),
    "declared too large": (
        "check_size",
        413,
        lambda s, a, b, p: (a, p.post(a, HEARTBEAT, b"z" * (guards.SMALL + 1))),
    ),
    "chunked too large": (
        "check_size",
        413,
        lambda s, a, b, p: (
            a,
            p.post(a, HEARTBEAT, extra="transfer-encoding: chunked\r\n")
            + (b"8000\r\n" + b"z" * 0x8000 + b"\r\n") * 3
            + b"0\r\n\r\n",
        ),
    ),
    "reader's certificate": (
        "check_identity",
        401,
        lambda s, a, b, p: ask_as(s.caller("acme/reader", role="reader"), p),
    ),
    "not enrolled": (
        "check_enrolment",
        401,
        lambda s, a, b, p: ask_as(s.caller("acme/new", enrolled=False), p),
    ),
    "certificate over a replaced key": (
        "check_certificate",
        401,
        lambda s, a, b, p: (old := s.caller("acme/ann", enrolled=False), p.post(old, HEARTBEAT, key=a.key)),
    ),
    "own certificate, another's key": ("check_key", 401, lambda s, a, b, p: (a, p.post(a, HEARTBEAT, key=b.key))),
    "own certificate, fresh key": (
        "check_key",
        401,
        lambda s, a, b, p: (a, p.post(a, HEARTBEAT, key=p.new_node_key())),
    ),
    "key that is no base64": ("check_key", 401, lambda s, a, b, p: (a, p.post(a, HEARTBEAT).replace(b"LS0t", b"!!!!"))),
    "reply in another's name": (
        "check_source",
        401,
        lambda s, a, b, p: (a, p.post(a, "/v1/fleet/push-messages", messages(7, 8))),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("planted", [False, True], ids=["guarded", "planted-bug"])
def test_refusals(
    stand: Any, ann: Any, bob: Any, probe: Any, monkeypatch: pytest.MonkeyPatch, name: str, planted: bool
) -> None:
    guard, status, make = REFUSALS[name]
    caller, request = make(stand, ann, bob, probe)
    if planted:
        monkeypatch.setattr(guards, guard, lambda *_: None)
        if guard == "check_enrolment":  # a gateway that forgets to ask takes whatever key is shown
            monkeypatch.setattr(guards, "check_certificate", lambda *_: None)
            monkeypatch.setattr(guards, "check_key", lambda *_: None)
            stand.nodes.append(replace(stand.nodes[0], member="acme/new", revoked=True))
    before = len(stand.seen)
    answer = stand.ask(caller, request)
    if planted:
        stand.nodes[:] = [node for node in stand.nodes if node.member != "acme/new"]
        assert answer == 200 or guard == "check_path"
        assert len(stand.seen) > before
    else:
        assert answer == status
        assert len(stand.seen) == before


@pytest.mark.parametrize(
    "extra",
    [
        "content-length: 1\r\ntransfer-encoding: chunked\r\n",
        "content-length: 1\r\ncontent-length: 2\r\n",
        "content-length: x\r\n",
        "content-length: -1\r\n",
    ],
)
def test_ambiguous_lengths_are_bad_requests(stand: Any, ann: Any, probe: Any, extra: str) -> None:
    assert stand.ask(ann, probe.post(ann, HEARTBEAT, extra=extra)) == 400


def test_a_huge_body_is_refused_before_a_byte_of_it_is_sent(stand: Any, ann: Any, probe: Any) -> None:
    request = probe.post(ann, "/v1/fleet/push-object", extra="content-length: 100000000000\r\n")
    assert stand.ask(ann, request) == 413


def test_a_head_without_end_is_refused(stand: Any, ann: Any, probe: Any) -> None:
    request = probe.post(ann, HEARTBEAT)[:-2] + b"x-long: " + b"z" * (3 * tls_listener.HEAD_BYTES)
    assert stand.ask(ann, request) == 400


def test_revoking_bites_on_an_open_connection(stand: Any, probe: Any) -> None:
    caller = stand.caller("acme/leaver")
    with stand.connect(caller) as connection:
        assert probe.exchange(connection, probe.post(caller, HEARTBEAT)) == 200
        stand.nodes[:] = [replace(n, revoked=n.member == "acme/leaver") for n in stand.nodes]
        end = time.monotonic() + 30
        while (status := probe.exchange(connection, probe.post(caller, HEARTBEAT))) == 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert status == 401


def test_expiry_bites_on_an_open_connection(stand: Any, ann: Any, probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand.connect(ann) as connection:
        assert probe.exchange(connection, probe.post(ann, HEARTBEAT)) == 200
        monkeypatch.setattr(guards, "utc_now", lambda: datetime.now(UTC) + timedelta(days=11))
        assert probe.exchange(connection, probe.post(ann, HEARTBEAT)) == 401


def test_a_certificate_that_is_due_ends_its_connections(
    stand: Any, ann: Any, probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the next request comes with the renewed one, and no request meets the end of the old one."""

    def ended() -> bool:
        with stand.connect(ann) as connection:
            assert probe.exchange(connection, probe.post(ann, HEARTBEAT)) == 200
            return probe.exchange(connection, probe.post(ann, HEARTBEAT)) is None

    assert not ended()
    monkeypatch.setattr(guards, "utc_now", lambda: datetime.now(UTC) + timedelta(days=6))
    assert ended()


def test_a_new_member_is_known_at_once(stand: Any, probe: Any) -> None:
    caller = stand.caller("acme/late")
    assert stand.ask(caller, probe.post(caller, HEARTBEAT)) == 200


def test_while_the_hub_is_down_the_last_table_holds_and_nobody_is_sent_away_for_good(
    stand: Any, ann: Any, probe: Any
) -> None:
    late = stand.caller("acme/later")
    stand.nodes.pop()
    stand.hub_down = True
    try:
        assert stand.ask(ann, probe.post(ann, HEARTBEAT)) == 200
        assert stand.ask(late, probe.post(late, HEARTBEAT)) == 503
    finally:
        stand.hub_down = False


def test_without_a_superlink_nodes_are_told_to_try_again(start_gateway: Any, probe: Any) -> None:
    with start_gateway(with_stub=False) as lonely:
        caller = lonely.caller("acme/ann")
        assert lonely.ask(caller, probe.post(caller, HEARTBEAT)) == 503


def test_it_refuses_to_serve_when_the_certificate_does_not_reach_the_guards(
    start_gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_listener, "peer_of", lambda certificate: None)
    with start_gateway() as broken:
        assert isinstance(broken.failure, IdentityError)
        assert "does not reach" in str(broken.failure)


@pytest.mark.parametrize("fault", ["no certificate asked for", "old protocol allowed"])
def test_a_weakened_listener_is_seen(
    start_gateway: Any, probe: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    honest = tls_listener.tls_context

    def weak(*paths: Any) -> ssl.SSLContext:
        context = honest(*paths)
        if fault == "old protocol allowed":
            context.minimum_version = ssl.TLSVersion.TLSv1_2
        else:
            context.verify_mode = ssl.CERT_OPTIONAL
        return context

    monkeypatch.setattr(tls_listener, "tls_context", weak)
    with start_gateway() as weakened:
        if fault == "old protocol allowed":
            caller = weakened.caller("acme/ann")
            assert weakened.ask(caller, probe.post(caller, HEARTBEAT), ssl.TLSVersion.TLSv1_2) == 200
        else:
            assert isinstance(weakened.failure, IdentityError)
            assert "let in" in str(weakened.failure)
