"""The gateway as a raw ASGI application: guards, then a byte pump to the SuperLink and back.

Raw, because a framework would read the body before asking whether it may come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from share_core.errors import UnavailableError
from share_server.fleet import guards
from share_server.fleet.guards import Headers, Peer, Refusal
from share_server.fleet.node_table import NodeTable
from share_server.fleet.upstream import Upstream
from share_server.hub import log

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

PEER = "share.peer"
"""Key of the connection's :class:`~share_server.fleet.guards.Peer` among the scope's extensions."""

REQUEST_SECONDS = 50.0
"""Longest life of one request, so that none outlives the minute in which a revocation must bite. SuperNode itself gives
up after 30 s."""

_BUSY = Refusal(503, "not now, try again")


class RefusedError(Exception):
    """A guard said no. Never leaves this module."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class CallerGoneError(Exception):
    """The caller hung up. Never leaves this module."""


class Gateway:
    """The application. ``ready`` is set by the start-up self-test; before, everything is answered 503."""

    def __init__(self, table: NodeTable, upstream: Upstream) -> None:
        self.ready = False
        self.self_test: Callable[[Peer | None, Headers], bool] | None = None
        self._table = table
        self._upstream = upstream

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"gateway serves http only, got {scope['type']}")
        headers: Headers = scope["headers"]
        peer: Peer | None = scope.get("extensions", {}).get(PEER)
        if not self.ready:
            passed = self.self_test is not None and self.self_test(peer, headers)
            await _answer(send, Refusal(204, "") if passed else _BUSY, headers)
            return
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._serve(scope, headers, peer, receive, send)
        except RefusedError as error:
            member = peer.identity.member if peer and peer.identity else None
            log.warning(
                "refused",
                member=member,
                client=scope.get("client"),
                method=scope["method"],
                path=scope["raw_path"][:100].decode("latin-1"),
                status=error.refusal.status,
                reason=error.refusal.reason,
            )
            await _answer(send, error.refusal, headers)
        except (UnavailableError, TimeoutError) as error:
            log.warning("unavailable", path=scope["path"], reason=str(error) or type(error).__name__)
            await _answer(send, _BUSY, headers)
        except CallerGoneError:
            return

    async def _serve(
        self, scope: dict[str, Any], headers: Headers, peer: Peer | None, receive: Receive, send: Send
    ) -> None:
        path: bytes = scope["raw_path"]
        _demand(guards.check_path(path, scope["query_string"]))
        _demand(guards.check_method(scope["method"]))
        _demand(guards.check_framing(headers))
        _demand(guards.check_declared_size(path, headers))
        await self._admit(peer, headers)
        body: bytes | AsyncIterator[bytes] = _pieces(path, receive)
        if path == guards.PUSH_MESSAGES:
            body = b"".join([piece async for piece in _pieces(path, receive)])
            _demand(guards.check_source(body))
        passed = [(name, value) for name, value in headers if name in guards.PASSED_UP]
        response = await self._upstream.send(path.decode("ascii"), passed, body)
        try:
            await _relay(response, send, last=peer is not None and guards.utc_now() >= peer.renew_at)
        finally:
            await response.aclose()

    async def _admit(self, peer: Peer | None, headers: Headers) -> None:
        """Demand an enrolled identity with its own key; look once more before saying no for good."""
        _demand(guards.check_identity(peer, guards.utc_now()))
        if peer is None or peer.identity is None:  # only a broken guard gets here
            raise RefusedError(Refusal(401, "nobody"))
        if self._refusal(peer, peer.identity.member, headers) is not None:
            await self._table.read_again()
            _demand(self._refusal(peer, peer.identity.member, headers))

    def _refusal(self, peer: Peer, member: str, headers: Headers) -> Refusal | None:
        node = self._table.find(member)
        refusal = guards.check_enrolment(node)
        if refusal is not None or node is None:
            return refusal or Refusal(401, "not enrolled")
        return guards.check_certificate(node, peer) or guards.check_key(node, headers)


def _demand(refusal: Refusal | None) -> None:
    if refusal is not None:
        raise RefusedError(refusal)


async def _pieces(path: bytes, receive: Receive) -> AsyncIterator[bytes]:
    """Yield the body as it arrives and stop at the first byte too many."""
    size = 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise CallerGoneError
        piece: bytes = event.get("body", b"")
        size += len(piece)
        _demand(guards.check_size(path, size))
        if piece:
            yield piece
        if not event.get("more_body", False):
            return


async def _relay(response: httpx.Response, send: Send, last: bool) -> None:
    """Send the SuperLink's answer; ``last`` ends the connection, so that the next one shows a renewed certificate."""
    status = response.status_code
    if not 200 <= status < 300 and not 400 <= status < 600:
        raise UnavailableError(f"SuperLink answered {status}, which no published call does")
    kept = [(name.lower(), value) for name, value in response.headers.raw]
    kept = [(name, value) for name, value in kept if name in guards.PASSED_DOWN]
    if last:
        kept.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": kept})
    async for piece in response.aiter_raw():
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _answer(send: Send, refusal: Refusal, headers: Headers) -> None:
    """Send a refusal; hang up where a body of unknown or great length may still be on its way."""
    body = refusal.reason.encode()
    fields = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    length = guards.header(headers, b"content-length") or b"0"
    small = length.isdigit() and int(length) <= guards.SMALL
    if refusal.status == 413 or not small or guards.header(headers, b"transfer-encoding") is not None:
        fields.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
