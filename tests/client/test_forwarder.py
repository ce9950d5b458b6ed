"""The loopback forwarder and the signed deactivate call, against a gateway that demands a client certificate."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import socket
import ssl
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from share_client.egress import EgressLog, read_egress
from share_client.fleet.deactivate import deactivate
from share_client.fleet.forwarder import Forwarder
from share_client.member import ClientLayout
from share_core.durable import write_atomic
from share_core.errors import StorageError
from share_core.identity import Identity, identity_of, make_authority, make_csr, new_private_key_pem, sign_csr


class Gateway:
    """An HTTPS server that tells who called it."""

    def __init__(self, root: Path, layout: ClientLayout, authority: bytes, authority_key: bytes, port: int) -> None:
        now = datetime.now(UTC)
        key = new_private_key_pem()
        server = Identity("hub", "fedshare", "hub")
        write_atomic(root / "server.key", key)
        write_atomic(
            root / "server.pem",
            sign_csr(authority, authority_key, make_csr(key), server, now, 1, ["127.0.0.1"]),
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(root / "server.pem", root / "server.key")
        context.load_verify_locations(layout.authority)
        context.verify_mode = ssl.CERT_REQUIRED
        self.requests: list[tuple[str, dict[str, str], bytes, str]] = []
        self.status = 200
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert isinstance(self.connection, ssl.SSLSocket)
                der = self.connection.getpeercert(binary_form=True)
                assert der is not None
                headers = {name.lower(): value for name, value in self.headers.items()}
                gateway.requests.append((self.path, headers, body, identity_of(der).member))
                self.send_response(gateway.status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def gateway(tmp_path: Path, offline: tuple[ClientLayout, bytes, bytes]) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path, *offline, port=0)
    yield gateway
    gateway.close()


@pytest.fixture
def forwarder(gateway: Gateway, offline: tuple[ClientLayout, bytes, bytes]) -> Iterator[Forwarder]:
    forwarder = Forwarder(offline[0], f"127.0.0.1:{gateway.port}", datetime.now(UTC))
    forwarder.start()
    yield forwarder
    forwarder.stop()


def local_client(forwarder: Forwarder) -> httpx.Client:
    context = ssl.create_default_context(cafile=str(forwarder.authority))
    return httpx.Client(verify=context, trust_env=False, base_url=f"https://127.0.0.1:{forwarder.port}", timeout=30)


def test_bytes_go_through_with_our_certificate(gateway: Gateway, forwarder: Forwarder) -> None:
    large = bytes(range(256)) * 8192
    with local_client(forwarder) as client:
        for body in (b"small", large, b""):
            answer = client.post("/v1/fleet/pull-messages", content=body)
            assert (answer.status_code, answer.content) == (200, body)
    assert {member for _, _, _, member in gateway.requests} == {"org/one"}


def test_a_gateway_that_is_down_is_a_503_and_not_a_failed_handshake(
    tmp_path: Path, gateway: Gateway, forwarder: Forwarder, offline: tuple[ClientLayout, bytes, bytes]
) -> None:
    gateway.close()
    with local_client(forwarder) as client:
        answer = client.post("/v1/fleet/push-object", content=b"x" * 5_000_000)
        assert answer.status_code == 503
        assert not {"ssl", "tls", "certificate"} & set(answer.text.lower().split()), "Flower takes these for fatal"
        assert f"127.0.0.1:{gateway.port}" in forwarder.trouble
        again = Gateway(tmp_path, *offline, port=gateway.port)
        try:
            assert client.post("/v1/fleet/push-object", content=b"back").content == b"back"
            assert forwarder.trouble == ""
        finally:
            again.close()


def test_a_stop_leaves_no_connection_that_the_gateway_will_not_end(
    tmp_path: Path, gateway: Gateway, offline: tuple[ClientLayout, bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway never answers the end of TLS; a connection that nobody closes is reported when it is collected."""
    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: seen.append(found.exc_value))
    with socket.create_server(("127.0.0.1", 0)) as listener, warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
        forwarder = Forwarder(offline[0], f"127.0.0.1:{listener.getsockname()[1]}", datetime.now(UTC))
        forwarder.start()
        trusting = ssl.create_default_context(cafile=str(forwarder.authority))
        plain = socket.create_connection(("127.0.0.1", forwarder.port), timeout=30)
        client = trusting.wrap_socket(plain, server_hostname="127.0.0.1")
        client.sendall(b"hello")
        silent = context.wrap_socket(listener.accept()[0], server_side=True)
        assert silent.recv(5) == b"hello"
        client.close()
        silent.settimeout(30)
        assert silent.recv(1) == b""  # the forwarder is closing, and waits for an answer
        forwarder.stop()
        del forwarder
        gc.collect()
        silent.close()
    assert seen == []


def test_a_gateway_of_another_federation_is_not_spoken_to(
    tmp_path: Path, offline: tuple[ClientLayout, bytes, bytes]
) -> None:
    layout = offline[0]
    stranger = Gateway(tmp_path, layout, *make_authority("other", datetime.now(UTC)), port=0)
    forwarder = Forwarder(layout, f"127.0.0.1:{stranger.port}", datetime.now(UTC))
    forwarder.start()
    try:
        with local_client(forwarder) as client:
            assert client.post("/v1/fleet/pull-messages", content=b"secret").status_code == 503
        assert stranger.requests == []
    finally:
        forwarder.stop()
        stranger.close()


def test_the_deactivate_call_is_signed_as_flower_wants(
    gateway: Gateway, forwarder: Forwarder, offline: tuple[ClientLayout, bytes, bytes]
) -> None:
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest

    layout = offline[0]
    for status in (200, 401):
        gateway.status = status
        assert deactivate(layout, forwarder.port, forwarder.authority, 2**63 + 5) == status
    path, headers, body, caller = gateway.requests[0]
    assert (path, caller) == ("/v1/fleet/deactivate-node", "org/one")
    assert DeactivateNodeRequest.FromString(body).node_id == 2**63 + 5
    public = load_pem_public_key(base64.b64decode(headers["flwr-public-key"]))
    assert isinstance(public, ec.EllipticCurvePublicKey)
    signature = base64.b64decode(headers["flwr-signature"])
    public.verify(signature, headers["flwr-timestamp"].encode(), ec.ECDSA(hashes.SHA256()))
    age = datetime.now(UTC) - datetime.fromisoformat(headers["flwr-timestamp"])
    assert 0 <= age.total_seconds() < 300
    gateway.close()
    assert deactivate(layout, forwarder.port, forwarder.authority, 5) == 503


def test_a_stop_while_the_copies_end_still_closes_the_way_to_the_gateway(
    gateway: Gateway, offline: tuple[ClientLayout, bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has gone, its two copies are being ended, and just then the forwarder is stopped."""
    opened: list[asyncio.StreamWriter] = []
    open_connection, gather = asyncio.open_connection, asyncio.gather
    copies_end = threading.Event()

    async def recorded(*arguments: Any, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await open_connection(*arguments, **options)
        opened.append(writer)
        return reader, writer

    def interrupted(*tasks: asyncio.Task[None], **options: Any) -> Any:
        if not copies_end.is_set():
            copies_end.set()
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        return gather(*tasks, **options)

    forwarder = Forwarder(offline[0], f"127.0.0.1:{gateway.port}", datetime.now(UTC))
    monkeypatch.setattr(asyncio, "open_connection", recorded)
    monkeypatch.setattr(asyncio, "gather", interrupted)
    forwarder.start()
    with local_client(forwarder) as client:
        assert client.post("/v1/fleet/pull-messages", content=b"x").content == b"x"
    assert copies_end.wait(30)
    forwarder.stop()
    assert [writer.transport.is_closing() for writer in opened] == [True]


def test_each_connection_shows_the_newest_certificate_that_can_be_used(
    gateway: Gateway, forwarder: Forwarder, offline: tuple[ClientLayout, bytes, bytes]
) -> None:
    layout, authority, authority_key = offline

    def renewed(name: str) -> bytes:
        identity = Identity("trainer", "org", name)  # another name, so that the gateway can tell
        return sign_csr(authority, authority_key, make_csr(layout.key.read_bytes()), identity, datetime.now(UTC), 1)

    called = []
    for certificate in (None, renewed("two"), b"torn", renewed("three")):
        if certificate is not None:
            write_atomic(layout.certificate, certificate)
        with local_client(forwarder) as client:
            assert client.post("/v1/fleet/pull-messages", content=b"x").content == b"x"
        called.append(gateway.requests[-1][3])
    assert called == ["org/one", "org/two", "org/two", "org/three"]


def test_what_goes_through_is_in_the_egress_log_first(
    gateway: Gateway, forwarder: Forwarder, offline: tuple[ClientLayout, bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    honest = EgressLog.fleet

    def watched(log: EgressLog, to: str, piece: bytes) -> None:
        seen.append(len(gateway.requests))
        honest(log, to, piece)

    monkeypatch.setattr(EgressLog, "fleet", watched)
    body = bytes(range(256)) * 1024
    with local_client(forwarder) as client:
        client.post("/v1/fleet/pull-messages", content=body)
    lines = [json.loads(line) for line in read_egress(offline[0].egress)]
    assert {(line["event"], line["to"]) for line in lines} == {("fleet", f"127.0.0.1:{gateway.port}")}
    assert lines[0]["request"] == "POST /v1/fleet/pull-messages"
    ((_, headers, received, _),) = gateway.requests
    assert sum(line["bytes"] for line in lines) > len(received) + sum(len(k) + len(v) for k, v in headers.items())
    assert set(seen) == {0}, "a piece left before it was written down"
    monkeypatch.setattr(EgressLog, "fleet", refuse)
    with local_client(forwarder) as client, pytest.raises(httpx.TransportError):
        client.post("/v1/fleet/pull-messages", content=b"never")
    assert len(gateway.requests) == 1


def refuse(*_: object) -> None:
    raise StorageError("the egress log cannot be written")
