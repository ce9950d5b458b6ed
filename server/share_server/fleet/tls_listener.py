"""A TLS 1.3 listener on uvicorn that demands a client certificate and shows it to the application.

uvicorn does not hand the peer's certificate on, so the protocol class does. ``HttpToolsProtocol`` and its callbacks
are uvicorn's internals: the gateway's start-up self-test refuses to serve when they no longer work as used here.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import uvicorn
from cryptography import x509
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from share_core.errors import CertificateError
from share_core.identity import identity_of, public_key_pem_of_certificate, renewal_moment
from share_server.config import ServerConfig
from share_server.fleet.gateway_app import PEER
from share_server.fleet.guards import Peer
from share_server.hub.tls import PairFile
from share_server.layout import Layout
from share_server.store.members import key_digest

HEAD_BYTES = 32 * 2**10
"""Longest request line with all headers. Flower's take about 1 KB."""


def peer_of(certificate: bytes) -> Peer:
    """Return who a verified client certificate (DER) names; without identity if it is none of ours."""
    loaded = x509.load_der_x509_certificate(certificate)
    life = loaded.not_valid_before_utc, loaded.not_valid_after_utc, renewal_moment(certificate)
    try:
        return Peer(identity_of(certificate), key_digest(public_key_pem_of_certificate(certificate)), *life)
    except CertificateError:
        return Peer(None, "", *life)


class PeerProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with the peer in every scope and a bound on the head of a request."""

    _peer: Peer | None = None
    _in_head = False
    _head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Read the certificate once for the connection."""
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(True) if tls is not None else None
        self._peer = peer_of(certificate) if certificate else None

    def on_message_begin(self) -> None:
        """Attach the peer to the scope of each request."""
        super().on_message_begin()
        extensions: dict[str, Any] = {PEER: self._peer}
        self.scope["extensions"] = extensions
        self._in_head, self._head = True, 0

    def on_headers_complete(self) -> None:
        """Note that the head has ended."""
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Refuse a head that does not end: the parser itself would keep all of it."""
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self.send_400_response("Request head too large.")


def tls_context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """Return the listener's context: TLS 1.3 only, a client certificate of ``authority`` or no connection.

    Each handshake is given the newest pair that lies in the files and can be used; see :class:`PairFile`.
    """
    pair = PairFile(key, certificate, authority.read_bytes())
    given = pair.current()
    newest = context = _context(certificate, key, authority)

    def look(tls: ssl.SSLObject | ssl.SSLSocket, name: str | None, first: ssl.SSLContext) -> None:
        nonlocal given, newest
        if (now := pair.current()) != given:
            newest, given = _context(certificate, key, authority), now
        tls.context = newest

    context.sni_callback = look  # called at every handshake, also without a name
    return context


def _context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def listener(app: Any, layout: Layout, config: ServerConfig) -> uvicorn.Server:
    """Return a server for ``app`` on the gateway's port; it is not started here."""
    certificate, key = layout.certificate("server"), layout.key("server")
    settings = uvicorn.Config(
        app,
        host=config.listen.strip("[]"),
        port=config.gateway_port,
        http=PeerProtocol,
        ws="none",
        lifespan="off",
        ssl_context_factory=lambda _config, _default: tls_context(certificate, key, layout.ca_cert),
        timeout_keep_alive=15,
        limit_concurrency=512,
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(settings)
