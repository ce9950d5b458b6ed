"""One gRPC call over a bare HTTP/2 connection, whose message is ready, as the wire wants it, before the clock runs.

gRPC's own client compresses while the call runs: of a large message that is a tenth of a second, which says nothing of
the hub. Here is just enough of HTTP/2 (RFC 9113) to send one small request with mutual TLS and to read how it ended.
"""

from __future__ import annotations

import gzip
import re
import socket
import ssl
import struct
import tempfile
import time
from dataclasses import dataclass
from io import BufferedRWPair
from pathlib import Path

import grpc

from share_core.errors import UnavailableError
from share_server.local import Holder

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _CONTINUATION = 0, 1, 3, 4, 6, 7, 9
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_STREAM = 1
_FRAME, _WINDOW = 2**14, 65_535
"""Bytes of one frame and of all data that every receiver takes without having said so."""
_STATUS = re.compile(rb"grpc-status(.)(\d{1,2})", re.DOTALL)
"""In the first headers of a connection every name and value is spelt out, and gRPC's encoder uses no Huffman code."""


@dataclass(frozen=True)
class Answer:
    """How a call ended."""

    status: str
    """Name of gRPC's status."""
    since: float
    """When its first byte was about to be sent, by ``time.monotonic()``."""


def framed(message: bytes, compress: bool) -> bytes:
    """Return a message as gRPC sends it: a flag, its length, and its bytes, by gzip where that is asked for."""
    data = gzip.compress(message) if compress else message
    return struct.pack(">BI", compress, len(data)) + data


def call(address: str, authority: bytes, holder: Holder, method: str, message: bytes, timeout_s: float) -> Answer:
    """Connect as a member, call a method with one message, and wait for the end of the answer.

    Args:
        address: ``host:port`` of a hub.
        authority: certificate of its authority, PEM.
        holder: the member's key and certificate.
        method: ``/package.Service/Method``.
        message: made by :func:`framed`, at most 65,535 bytes.
        timeout_s: longest wait for bytes.

    Raises:
        UnavailableError: the hub ended the connection, or answered in a way that is not read here.
    """
    assert len(message) <= _WINDOW, "a longer message has to wait for the receiver's leave"
    host, _, port = address.rpartition(":")
    context = _context(authority, holder)
    with (
        socket.create_connection((host, int(port)), timeout_s) as unsecured,
        context.wrap_socket(unsecured, server_hostname=host) as secured,
        secured.makefile("rwb") as stream,
    ):
        secured.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # nothing waits for another's acknowledgement
        _write(stream, _PREFACE + _frame(_SETTINGS, 0, b"", stream=0))
        _read(stream)  # the hub's settings, which are answered: the connection is ready
        pieces = [message[start : start + _FRAME] for start in range(0, len(message), _FRAME)]
        sent = _frame(_HEADERS, _END_HEADERS, _request(method, host, "gzip" if message[0] else "identity"))
        sent += b"".join(_frame(_DATA, _END_STREAM * (piece is pieces[-1]), piece) for piece in pieces)
        since = time.monotonic()
        _write(stream, sent)
        return Answer(_status(stream), since)


def _context(authority: bytes, holder: Holder) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.decode())
    context.set_alpn_protocols(["h2"])
    with tempfile.TemporaryDirectory() as folder:
        key, certificate = Path(folder) / "key", Path(folder) / "certificate"
        key.write_bytes(holder.key)
        certificate.write_bytes(holder.certificate)
        context.load_cert_chain(certificate, key)
    return context


def _frame(kind: int, flags: int, payload: bytes, stream: int = _STREAM) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _request(method: str, host: str, encoding: str) -> bytes:
    """Return the headers of a call as literals that enter no table (RFC 7541, section 6.2.2)."""
    headers = {
        ":method": "POST",
        ":scheme": "https",
        ":path": method,
        ":authority": host,
        "te": "trailers",
        "content-type": "application/grpc",
        "grpc-encoding": encoding,
    }
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())


def _text(value: str) -> bytes:
    assert len(value) < 127, "a longer text needs a longer length"
    return bytes([len(value)]) + value.encode()


def _write(stream: BufferedRWPair, data: bytes) -> None:
    stream.write(data)
    stream.flush()


def _read(stream: BufferedRWPair) -> tuple[int, int, bytes]:
    """Return kind, flags and payload of the next frame; settings and pings are answered.

    Raises:
        UnavailableError: the connection has ended.
    """
    head = stream.read(9)
    if len(head) < 9:
        raise UnavailableError("the hub has ended a bare connection")
    kind, flags, payload = head[3], head[4], stream.read(int.from_bytes(head[:3]))
    if kind in (_SETTINGS, _PING) and not flags & _ACK:
        _write(stream, _frame(kind, _ACK, payload if kind == _PING else b"", stream=0))
    return kind, flags, payload


def _status(stream: BufferedRWPair) -> str:
    """Return the status that the answer ends with."""
    headers = b""
    while True:
        kind, flags, payload = _read(stream)
        if kind in (_RESET, _GOAWAY):
            raise UnavailableError(f"the hub has ended a bare call by a frame of kind {kind}, {payload.hex()}")
        if kind in (_HEADERS, _CONTINUATION):
            headers += payload
        found = _STATUS.search(headers)
        if found is not None and flags & _END_HEADERS and kind in (_HEADERS, _CONTINUATION):
            number = int(found[2][: found[1][0]])
            return next(status.name for status in grpc.StatusCode if status.value[0] == number)
