"""Every kind of certificate against every path of the gateway: what may pass passes, and nothing else reaches Flower.

Every stranger sends the node key of the member whom it wants to be taken for, so that only its certificate can stop it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from share_core.identity import public_key_pem
from share_server.fleet import guards, node_table
from share_server.fleet.hub_link import EnrolledNode
from share_server.store.members import key_digest

PUBLISHED = sorted(path.decode() for path in guards.ROUTES)
HIDDEN = (
    "/",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/../control/start-run",
    f"{PUBLISHED[0]}/",
    f"{PUBLISHED[0]}?a=1",
)


@pytest.fixture(autouse=True)
def _reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway reads its table again for each stranger, without the pause that spares the hub."""
    monkeypatch.setattr(node_table, "MISS_SECONDS", 0.0)


@pytest.fixture(scope="module")
def kinds(stand: Any, certificates: Any, probe: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Callers by kind; the enrolled ones are in the gateway's table."""
    layout, folder = stand.layout, tmp_path_factory.mktemp("kinds")

    def own(name: str) -> Any:
        return certificates.Pair(layout.key(name).read_bytes(), layout.certificate(name).read_bytes())

    federation = certificates.make_federation(
        certificates.Pair(layout.ca_key.read_bytes(), layout.ca_cert.read_bytes()),
        own("server"),
        certificates.Pair(layout.signing_key.read_bytes(), layout.signing_certificate.read_bytes()),
    )
    alice, gone = probe.new_node_key(), probe.new_node_key()
    for member, node_key, pair, revoked in (
        ("acme/alice", alice, federation.enrolled, False),
        ("acme/gone", gone, federation.revoked, True),
    ):
        stand.nodes.append(EnrolledNode(member, node_key, 7, revoked, key_digest(public_key_pem(pair.key))))
    shown = {"good": federation.enrolled, **certificates.stranger_kinds(federation)}
    shown |= {"operator's": own("operator"), "fleet's": own("fleet"), "TLS 1.2": federation.enrolled}
    callers: dict[str, Any] = {}
    for name, pair in shown.items():
        path = None
        if pair is not None:
            path = folder / f"{len(callers)}.pem"
            path.write_bytes(pair.certificate + pair.key)
        callers[name] = probe.caller(gone if name == "revoked" else alice, path)
    return callers


def answers(stand: Any, probe: Any, name: str, caller: Any, paths: Sequence[str]) -> list[int | None]:
    """Return the status of every path; None where there was no connection."""
    highest = ssl.TLSVersion.TLSv1_2 if name == "TLS 1.2" else ssl.TLSVersion.TLSv1_3
    connection: ssl.SSLSocket | None = None
    found: list[int | None] = []
    with contextlib.ExitStack() as stack:
        for path in paths:
            status = None
            with contextlib.suppress(OSError):
                connection = connection or stack.enter_context(stand.connect(caller, highest))
                status = probe.exchange(connection, probe.post(caller, path))
            connection = None if status is None else connection
            found.append(status)
    return found


def matrix(
    stand: Any, probe: Any, kinds: Mapping[str, Any], paths: Sequence[str] = (*PUBLISHED, *HIDDEN)
) -> dict[str, tuple[list[int | None], int]]:
    """Return the statuses of every kind, and how many of its requests reached Flower."""
    found = {}
    for name, caller in kinds.items():
        before = len(stand.seen)
        found[name] = answers(stand, probe, name, caller, paths), len(stand.seen) - before
    return found


def test_only_the_right_one_reaches_flower_and_only_on_published_paths(
    stand: Any, probe: Any, kinds: dict[str, Any], certificates: Any
) -> None:
    assert len(kinds) >= 30
    found = matrix(stand, probe, kinds)
    assert found.pop("good") == ([200] * len(PUBLISHED) + [404] * len(HIDDEN), len(PUBLISHED))
    for name, (statuses, reached) in found.items():
        # OpenSSL speaks Ed25519, which gRPC's TLS does not, and is strict about the usage of an authority's key.
        by_tls = certificates.REFUSED_BY_TLS ^ {"signer's", "authority with a name"} | {"TLS 1.2"}
        refused = [None] * len(statuses) if name in by_tls else [401] * len(PUBLISHED) + [404] * len(HIDDEN)
        assert (statuses, reached) == (refused, 0), name


def test_without_tls_there_is_nothing(stand: Any, probe: Any, kinds: dict[str, Any]) -> None:
    before, answer = len(stand.seen), b""
    with socket.create_connection(("127.0.0.1", stand.config.gateway_port), 20) as plain:
        plain.sendall(probe.post(kinds["good"], PUBLISHED[0]))
        with contextlib.suppress(ConnectionResetError):
            answer = plain.recv(1000)
    assert not answer.startswith(b"HTTP/")
    assert len(stand.seen) == before


PLANTED: dict[str, set[str]] = {
    "check_identity": {"other member role", "would-be operator", "would-be fleet"},
    "check_enrolment": {"revoked"},
    "check_certificate": {"same name, own key", "replaced", "p384 key"},
}


@pytest.mark.parametrize("guard", PLANTED)
def test_each_guard_is_the_one_that_bites(
    stand: Any, probe: Any, kinds: dict[str, Any], monkeypatch: pytest.MonkeyPatch, guard: str
) -> None:
    monkeypatch.setattr(guards, guard, lambda *_: None)
    wrong = {
        name for name, (_, reached) in matrix(stand, probe, kinds, PUBLISHED[:1]).items() if reached and name != "good"
    }
    assert wrong == PLANTED[guard]
