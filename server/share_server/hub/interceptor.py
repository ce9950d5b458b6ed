"""The door in front of every RPC: room first, then access, then the handler, then errors in the words of the contract.

A call that stays open is looked at again and again while it runs, whatever it does: who may not call any more is cut
off in the middle of it.

Calls are counted here and not by gRPC, whose own limit answers without a word on when to try again. That one is set a
little higher and only stands behind this one.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from grpc import aio

from share_core.errors import (
    ERROR_KEY,
    RETRY_KEY,
    FedshareError,
    OverloadError,
    RequestError,
    UnavailableError,
)
from share_server.hub import log
from share_server.hub.chunks import DECODERS, Unreadable, bounded
from share_server.hub.metrics import Metrics

SHED_RETRY_MS = 1000
"""Hint for a call that found no room."""

_LONGEST_SENTENCE = 1500
_ALWAYS_ADMITTED = "/grpc.health.v1.Health/Check"
_WATCH = "/grpc.health.v1.Health/Watch"
_LOG_EVERY_S = 1.0
_QUIET_LOOKS = 10
_LOOK_S = 0.05
_LAST_CALLS_S = 1.0
_NEWCOMERS_S = 2.0

Context = aio.ServicerContext[Any, Any]

Recheck = Callable[[], None]
"""Checks an open call again and raises a FedshareError to end it."""

Admit = Callable[[str, Context], Recheck | None]
"""Checks one call and raises a FedshareError to refuse it; returns what to ask again while it is open, if anything."""


@dataclass(eq=False)
class _Open:
    """A call in progress."""

    recheck: Recheck
    scope: asyncio.Timeout
    """Ends the handler when it is over."""
    ended: FedshareError | None = None
    """Why the call was ended from outside."""


def backstop(most_calls: int) -> int:
    """Return gRPC's own limit for a door that lets ``most_calls`` in: room for those that are being refused."""
    return most_calls + max(64, most_calls // 4)


class Door(aio.ServerInterceptor):
    """Wraps all four kinds of handlers. ``admit`` runs before the handler sees anything."""

    def __init__(
        self, admit: Admit, write_timeout_s: float, most_calls: int = 0, metrics: Metrics | None = None
    ) -> None:
        """Let at most ``most_calls`` in at once (0: any number); count refusals in ``metrics``."""
        self._admit = admit
        self._write_timeout_s = write_timeout_s
        self._most_calls = most_calls
        self._refusals = Refusals(metrics)
        self.open_calls = 0
        """Calls in progress, streams included."""
        self.watching = 0
        """Those of them that only watch the health."""
        self.newcomers = 0
        """Calls that have come since :meth:`shut`."""
        self._opened: asyncio.Event | None = None
        self._open: set[_Open] = set()

    def look(self) -> None:
        """End every open call whose caller may not call any more."""
        for call in list(self._open):
            if call.ended is None:
                try:
                    call.recheck()
                except FedshareError as error:
                    call.ended = error
                    call.scope.reschedule(asyncio.get_running_loop().time())

    async def keep_looking(self, every_s: float) -> None:
        """Look every ``every_s`` seconds, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            self.look()

    def shut(self) -> None:
        """Let no call in any more; those that come wait until :meth:`turn_away`. Only the health is still answered."""
        self._opened = asyncio.Event()

    def turn_away(self) -> None:
        """Answer those that wait before the shut door: the server is stopping."""
        if self._opened is not None:
            self._opened.set()

    async def _pass(self, method: str) -> None:
        """Return at once while the door is open; else wait and refuse."""
        if self._opened is None or method in (_ALWAYS_ADMITTED, _WATCH):
            return
        self.newcomers += 1
        await self._opened.wait()
        raise UnavailableError("the server is stopping: connect again in a moment")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler of the method, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        decode = handler.request_deserializer
        codec = (DECODERS.get(method) or (decode and bounded(decode)), handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._single(method, handler.unary_unary), *codec)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._single(method, handler.stream_unary), *codec)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._many(method, handler.unary_stream), *codec)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(self._many(method, handler.stream_stream), *codec)
        return None

    def _single(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def guarded(request: Any, context: Context) -> Any:
            try:
                await self._pass(method)
                with self._room(method):
                    async with self._watched(self._admit(method, context)):
                        _require_readable(request)
                        return await behaviour(request, context)
            except Exception as error:
                await self._refusals.refuse(method, context, error)

        return guarded

    def _many(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def guarded(request: Any, context: Context) -> None:
            try:
                await self._pass(method)
                with self._room(method):
                    async with self._watched(self._admit(method, context)):
                        _require_readable(request)
                        await self._answer(behaviour(request, context), context)
            except Exception as error:
                await self._refusals.refuse(method, context, error)

        return guarded

    async def _answer(self, answer: Any, context: Context) -> None:
        """Send what a handler of many messages yields, or wait until it has sent them itself."""
        if not isinstance(answer, AsyncGenerator):
            await answer
            return
        async with aclosing(answer):
            async for message in answer:
                await self._write(context, message)

    @asynccontextmanager
    async def _watched(self, recheck: Recheck | None) -> AsyncIterator[None]:
        """Let :meth:`look` end what the block does; raises what it found."""
        if recheck is None:
            yield
            return
        call = _Open(recheck, asyncio.timeout(None))
        self._open.add(call)
        try:
            async with call.scope:
                yield
        except TimeoutError:
            if call.ended is None:
                raise
            raise call.ended from None
        finally:
            self._open.discard(call)

    @contextmanager
    def _room(self, method: str) -> Iterator[None]:
        """Count a call while it runs; a probe of health is always let in, or overload would look like death."""
        if self._most_calls and self.open_calls >= self._most_calls and method != _ALWAYS_ADMITTED:
            raise OverloadError(
                f"{self._most_calls} calls are in progress, which is the most: try again in {SHED_RETRY_MS} ms",
                SHED_RETRY_MS,
            )
        watches = method == _WATCH
        self.open_calls += 1
        self.watching += watches
        try:
            yield
        finally:
            self.open_calls -= 1
            self.watching -= watches

    async def _write(self, context: aio.ServicerContext[Any, Any], message: Any) -> None:
        """Send one message; a reader that does not take it in time is cut and costs nothing any more."""
        try:
            # Not wait_for: before Python 3.12 it forgets a cancellation that comes with the end of the write, and the
            # handler of a caller that is gone would wait on for the next version.
            async with asyncio.timeout(self._write_timeout_s):
                await context.write(message)
        except TimeoutError as error:
            raise UnavailableError(
                f"nothing was read for {self._write_timeout_s:g} s: connect again and read faster"
            ) from error


def _require_readable(request: Any) -> None:
    if isinstance(request, Unreadable):
        raise RequestError(request.reason)


async def stop_in_order(server: aio.Server, door: Door, grace_s: float) -> None:
    """Stop ``server``: calls in progress have ``grace_s``; those that watch the health end with the last other one.

    The watchers would never end by themselves. Calls that gRPC has let in and no handler has taken yet are cut without
    a word when the server stops. So the door is shut first and newcomers are kept waiting, which also keeps their
    callers from coming again; when no more come, the server stops, and then they are told.
    """
    door.shut()
    await _none_for_a_while(lambda: door.newcomers, _NEWCOMERS_S if grace_s else 0.0)
    stopping = asyncio.create_task(server.stop(grace_s))
    await asyncio.sleep(_LOOK_S)
    door.turn_away()

    async def release() -> None:
        quiet = 0
        while quiet < _QUIET_LOOKS:
            quiet = quiet + 1 if door.open_calls == door.watching else 0
            await asyncio.sleep(_LOOK_S)
        await server.stop(_LAST_CALLS_S)

    await asyncio.gather(stopping, release())


async def _none_for_a_while(count: Callable[[], int], most_s: float) -> None:
    """Return when ``count`` has not changed for a few looks, at the latest after ``most_s``."""
    seen, quiet, looks = count(), 0, 0
    while quiet < _QUIET_LOOKS and looks * _LOOK_S < most_s:
        await asyncio.sleep(_LOOK_S)
        quiet, looks = (quiet + 1 if count() == seen else 0), looks + 1
        seen = count()


class Refusals:
    """Ends calls in errors, counts them, and writes them down."""

    def __init__(self, metrics: Metrics | None) -> None:
        self._metrics = metrics
        self._unwritten = 0
        self._written_at = -_LOG_EVERY_S

    async def refuse(self, method: str, context: Context, error: Exception) -> NoReturn:
        """End a call with ``error``: its status, its sentence, and its class name under ``ERROR_KEY``.

        Anything that is not a FedshareError is a fault of ours: the caller learns only a number under which the
        operator finds the traceback in the log.
        """
        if isinstance(error, aio.AbortError):
            raise error
        if isinstance(error, FedshareError):
            name, code, sentence = type(error).__name__, grpc.StatusCode[error.grpc_code], str(error)
            self._write_down(method, context, error)
        else:
            number = secrets.token_hex(4)
            name, code = FedshareError.__name__, grpc.StatusCode.INTERNAL
            sentence = f"the hub failed on this call; its log has the reason under {number}"
            log.failure("call failed", error, method=method, number=number)
        if self._metrics is not None:
            self._metrics.refused(name)
        trailing = [(ERROR_KEY, name)]
        if isinstance(error, OverloadError):
            trailing.append((RETRY_KEY, str(error.retry_after_ms)))
        await context.abort(code, sentence[:_LONGEST_SENTENCE], tuple(trailing))
        raise AssertionError("abort always raises")

    def _write_down(self, method: str, context: Context, error: FedshareError) -> None:
        """Log a refusal; of refusals for overload one each second, or writing them would be the next overload."""
        more = {}
        if isinstance(error, OverloadError):
            now = time.monotonic()
            if now - self._written_at < _LOG_EVERY_S:
                self._unwritten += 1
                return
            more = {"unwritten": self._unwritten} if self._unwritten else {}
            self._written_at, self._unwritten = now, 0
        log.warning(
            "refused", method=method, peer=context.peer(), error=type(error).__name__, reason=str(error), **more
        )
