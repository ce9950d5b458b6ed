"""A loopback listener that adds the member's certificate, the newest there is at each connection.

Flower's SuperNode can verify a server but has no client certificate to show, and the gateway demands one. The
forwarder accepts TLS on 127.0.0.1 with a throw-away authority that only our SuperNode trusts, opens mutual TLS 1.3 to
the gateway for each connection, and copies bytes.

SuperNode takes any failed handshake for fatal and retries a 503 for ever. So the local handshake never depends on the
gateway: when that cannot be reached, the request is read and answered with 503 here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path

from share_client.durable import make_private_directory
from share_client.egress import EgressLog
from share_client.member import ClientLayout
from share_core.durable import write_atomic
from share_core.errors import StorageError, UnavailableError
from share_core.identity import Identity, make_authority, make_csr, new_private_key_pem, sign_csr

_CONNECT_S = 10.0
_CLOSE_S = 2.0
_LOCAL_DAYS = 3650
_LARGEST_HEAD = 64 << 10
_LARGEST_BODY = 64 << 20
_PIECE = 64 << 10


def make_loopback_identity(directory: Path, now: datetime) -> tuple[Path, Path, Path]:
    """Write a new throw-away authority and certificate; return the paths (authority, certificate, key)."""
    make_private_directory(directory)
    authority, authority_key = make_authority("fedshare loopback", now)
    key = new_private_key_pem()
    identity = Identity("hub", "loopback", "loopback")
    certificate = sign_csr(
        authority, authority_key, make_csr(key), identity, now, _LOCAL_DAYS, ["127.0.0.1", "localhost"]
    )
    paths = directory / "loopback-ca.pem", directory / "loopback.pem", directory / "loopback.key"
    for path, data in zip(paths, (authority, certificate, key), strict=True):
        write_atomic(path, data)
    return paths


class Forwarder:
    """Runs in a thread of its own. :meth:`start`, then :attr:`port`, then :meth:`stop`."""

    def __init__(self, layout: ClientLayout, gateway_address: str, now: datetime) -> None:
        host, _, port = gateway_address.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._gateway, self._egress = gateway_address, EgressLog(layout.egress)
        self.authority, certificate, key = make_loopback_identity(layout.fleet, now)
        self._local = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._local.minimum_version = ssl.TLSVersion.TLSv1_3
        self._local.load_cert_chain(certificate, key)
        self._layout = layout
        self._remote = _remote_context(layout)
        self._shown = layout.certificate.read_bytes()
        self._thread = threading.Thread(target=self._run, name="forwarder", daemon=True)
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._failure: OSError | None = None
        self.port = 0
        """The loopback port, once started."""
        self.trouble = ""
        """Why the gateway could not be reached last; empty when it can."""

    def start(self) -> None:
        """Listen on a free loopback port.

        Raises:
            UnavailableError: no port could be opened.
        """
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise UnavailableError(f"the forwarder cannot listen on 127.0.0.1: {self._failure}") from self._failure

    def stop(self) -> None:
        """Close the listener and every connection."""
        if self._loop is not None and self._end is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._end = loop, end = asyncio.get_running_loop(), asyncio.Event()
        connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if end.is_set():  # its handshake ended while we were stopping
                _drop(writer)
                return
            task = loop.create_task(self._connection(reader, writer))
            connections[task] = writer
            task.add_done_callback(lambda done: connections.pop(done, None))

        try:
            server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=self._local)
        except OSError as error:
            self._failure = error
            self._ready.set()
            return
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await end.wait()
        server.close()
        open_now = dict(connections)
        for task in open_now:
            task.cancel()
        await asyncio.gather(*open_now, return_exceptions=True)
        for writer in open_now.values():  # a task cancelled before its first step has closed nothing
            _drop(writer)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await self._open_upstream()
            if upstream is None:
                await _answer_unavailable(reader, writer)
            else:
                await _join(reader, writer, *upstream, self._write_down)
        except (OSError, StorageError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            self.trouble = f"connection lost: {error}"
        finally:
            await _close(writer)

    def _newest(self) -> ssl.SSLContext:
        """Return the context of the next connection: with the certificate in the file, which may have been renewed.

        One that cannot be used leaves the old one in force; every other reader of the file says what is wrong with it.
        """
        with contextlib.suppress(OSError):  # ssl.SSLError is one
            found = self._layout.certificate.read_bytes()
            if found != self._shown:
                self._remote, self._shown = _remote_context(self._layout), found
        return self._remote

    async def _write_down(self, piece: bytes) -> None:
        """Write a piece into the egress log before it leaves; on a thread, since it waits for the disk."""
        await asyncio.to_thread(self._egress.fleet, self._gateway, piece)

    async def _open_upstream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        try:
            async with asyncio.timeout(_CONNECT_S):
                opened = await asyncio.open_connection(
                    self._host, self._port, ssl=self._newest(), server_hostname=self._host
                )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            self.trouble = f"the gateway at {self._host}:{self._port} cannot be reached: {error or 'timeout'}"
            return None
        self.trouble = ""
        return opened


def _remote_context(layout: ClientLayout) -> ssl.SSLContext:
    """Return the side of us that the gateway sees: TLS 1.3 with the member's certificate, this federation or nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(layout.authority)
    context.load_cert_chain(layout.certificate, layout.key)
    return context


async def _join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    up_reader: asyncio.StreamReader,
    up_writer: asyncio.StreamWriter,
    before: Callable[[bytes], Awaitable[None]],
) -> None:
    """Copy both ways until either side ends; then both end, for TLS has no half-open connections worth keeping."""
    tasks = {asyncio.create_task(_copy(reader, up_writer, before)), asyncio.create_task(_copy(up_reader, writer))}
    try:
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    finally:  # also when a stop cancels the wait for the copies
        await _close(up_writer)


async def _copy(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    before: Callable[[bytes], Awaitable[None]] | None = None,
) -> None:
    while piece := await reader.read(_PIECE):
        if before is not None:
            await before(piece)
        writer.write(piece)
        await writer.drain()


async def _answer_unavailable(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read one request whole, or the answer might be lost to a reset, and answer it with 503."""
    async with asyncio.timeout(_CONNECT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        left = min(_content_length(head[:_LARGEST_HEAD]), _LARGEST_BODY)
        while left and (piece := await reader.read(min(left, _PIECE))):
            left -= len(piece)
    body = b"the gateway cannot be reached"
    writer.write(
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nconnection: close\r\n"
        b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )
    await writer.drain()


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return int(value)
    return 0


def _drop(writer: asyncio.StreamWriter) -> None:
    """End a connection without a word."""
    with contextlib.suppress(AttributeError):  # Python 3.11.2 (Debian 12) raises it where TLS has ended already
        writer.transport.abort()


async def _close(writer: asyncio.StreamWriter) -> None:
    """Close in order; a side that does not answer the end of TLS is left, now or when the forwarder stops."""
    writer.close()
    try:
        async with asyncio.timeout(_CLOSE_S):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        pass
    finally:
        _drop(writer)
