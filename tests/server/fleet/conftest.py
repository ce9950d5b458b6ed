"""A real gateway over real TLS in front of a stub SuperLink, and callers that can misbehave byte by byte."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from share_core.identity import Identity, make_authority, make_csr, new_private_key_pem, public_key_pem, sign_csr
from share_core.types import SpaceSpec
from share_server.config import ServerConfig
from share_server.fleet import superlink
from share_server.fleet.files import FleetFiles, write_superlink_address
from share_server.fleet.gateway import serve
from share_server.fleet.hub_link import EnrolledNode
from share_server.layout import Layout
from share_server.provision import create_server, free_ports
from share_server.store.members import key_digest


def new_node_key() -> bytes:
    """Return a public key as Flower sends it."""
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@dataclass
class Caller:
    """Somebody with a certificate (or none) and a node key."""

    key: bytes
    certificate: Path | None

    def context(self, highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # the server is not what these tests doubt
        context.maximum_version = highest
        if self.certificate is not None:
            context.load_cert_chain(self.certificate)
        return context


@dataclass
class Seen:
    """What reached the stub."""

    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass
class Stand:
    """One server directory with certificates, a table of nodes, a stub SuperLink and the gateway."""

    layout: Layout
    config: ServerConfig
    folder: Path
    nodes: list[EnrolledNode] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    hub_down: bool = False
    failure: BaseException | None = None
    up: threading.Event = field(default_factory=threading.Event)

    def caller(
        self,
        member: str,
        role: str = "trainer",
        enrolled: bool = True,
        authority: tuple[bytes, bytes] | None = None,
        days: float = 10.0,
    ) -> Caller:
        """Make a caller with a certificate of the federation's authority, or of another one."""
        ca, ca_key = authority or (self.layout.ca_cert.read_bytes(), self.layout.ca_key.read_bytes())
        key = new_private_key_pem()
        identity = Identity(role, *member.split("/"))
        certificate = sign_csr(ca, ca_key, make_csr(key), identity, datetime.now(UTC), days)
        path = self.folder / f"{time.monotonic_ns()}.pem"
        path.write_bytes(certificate + key)
        node_key = new_node_key()
        if enrolled:
            self.nodes.append(
                EnrolledNode(member, node_key, len(self.nodes) + 1, False, key_digest(public_key_pem(key)))
            )
        return Caller(node_key, path)

    def fetch(self) -> list[EnrolledNode]:
        from share_core.errors import UnavailableError

        if self.hub_down:
            raise UnavailableError("planned")
        return list(self.nodes)

    def connect(self, caller: Caller, highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLSocket:
        raw = socket.socket()
        raw.settimeout(20)
        connection = caller.context(highest).wrap_socket(raw)  # ssl loses one that is reset while it is wrapped
        try:
            connection.connect(("127.0.0.1", self.config.gateway_port))
        except OSError:
            connection.close()
            raise
        return connection

    def ask(self, caller: Caller, request: bytes, highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> int | None:
        """Send raw bytes on a new connection; return the status, or None if there was no answer."""
        try:
            with self.connect(caller, highest) as connection:
                return exchange(connection, request)
        except OSError:
            return None


def exchange(connection: ssl.SSLSocket, request: bytes) -> int | None:
    """Send raw bytes, read one response whole, return its status."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
        connection.sendall(request)
    head = b""
    while b"\r\n\r\n" not in head:
        piece = connection.recv(65536)
        if not piece:
            return None
        head += piece
    head, _, body = head.partition(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.lower().splitlines() if line.startswith(b"content-length")), 0
    )
    while len(body) < length:
        body += connection.recv(65536)
    return int(head.split()[1])


def post(
    caller: Caller, path: str, body: bytes = b"", *, method: str = "POST", extra: str = "", key: bytes = b""
) -> bytes:
    """Return a request as a SuperNode would send it."""
    told = base64.b64encode(key or caller.key).decode()
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/protobuf\r\n"
        f"flwr-public-key: {told}\r\nflwr-timestamp: now\r\nflwr-signature: c2ln\r\nx-smuggled: yes\r\n{extra}"
    )
    if "content-length" not in extra and "transfer-encoding" not in extra:
        head += f"content-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


@pytest.fixture(scope="session")
def probe() -> Any:
    """The functions above, for test modules, which cannot import each other."""

    class Probe:
        post = staticmethod(post)
        exchange = staticmethod(exchange)
        new_node_key = staticmethod(new_node_key)
        caller = Caller
        other_authority = staticmethod(lambda: make_authority("another", datetime.now(UTC)))

    return Probe


def stub(seen: list[Seen]) -> Callable[..., Any]:
    """A SuperLink that says yes to everything and remembers it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":  # cut off by the gateway: not a request
                return
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        seen.append(Seen(scope["path"], scope["headers"], body))
        answer = b"x" * 100_000 if scope["path"].endswith("pull-object") else b"ok"
        headers = [(b"content-type", b"application/protobuf"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, (b"x-inner", b"secret")]})
        await send({"type": "http.response.body", "body": answer})

    return app


async def _run(stand: Stand, stop: threading.Event, with_stub: bool) -> None:
    files = FleetFiles(stand.layout.fleet)
    superlink.prepare(files)
    port = free_ports(1)[0]
    write_superlink_address(files, f"127.0.0.1:{port}")
    inner = uvicorn.Server(
        uvicorn.Config(
            stub(stand.seen),
            port=port,
            ssl_certfile=files.certificate,
            ssl_keyfile=files.key,
            lifespan="off",
            ws="none",
            log_config=None,
        )
    )
    tasks = [asyncio.create_task(serve(stand.layout, stand.config, stand.fetch))]
    if with_stub:
        tasks.append(asyncio.create_task(inner.serve()))
    probing = Caller(b"", stand.folder / "fleet.pem")
    while not stop.is_set() and not tasks[0].done():
        waiting = not stand.up.is_set() and (not with_stub or inner.started)
        if waiting and await asyncio.to_thread(stand.ask, probing, post(probing, "/")) == 404:
            stand.up.set()
        await asyncio.sleep(0.05)
    inner.should_exit = True
    tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(results[0], Exception):
        stand.failure = results[0]
    stand.up.set()


@contextlib.contextmanager
def standing(folder: Path, spec: SpaceSpec, with_stub: bool = True) -> Iterator[Stand]:
    """Run a gateway in a thread. If it refuses to serve, ``failure`` says why."""
    hub, enrol, gateway = free_ports(3)
    config = ServerConfig(hub_port=hub, enrol_port=enrol, gateway_port=gateway)
    layout = Layout(folder / "server")
    create_server(layout, config, spec, datetime.now(UTC))
    stand = Stand(layout, config, folder)
    pair = layout.certificate("fleet").read_bytes() + layout.key("fleet").read_bytes()
    (folder / "fleet.pem").write_bytes(pair)
    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_run(stand, stop, with_stub)))
    thread.start()
    try:
        assert stand.up.wait(60)
        yield stand
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory, toy_spec: SpaceSpec) -> Iterator[Stand]:
    """One gateway for all tests of a module."""
    with standing(tmp_path_factory.mktemp("gateway"), toy_spec) as running:
        assert running.failure is None
        yield running


@pytest.fixture
def start_gateway(tmp_path: Path, toy_spec: SpaceSpec) -> Callable[..., Any]:
    """Start a gateway of one's own, to change how it is built."""
    return lambda **options: standing(tmp_path, toy_spec, **options)
