"""The door in front of every RPC: access first, then the handler, then errors in the words of the contract."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from grpc import aio

from share_core.errors import ERROR_KEY, RETRY_KEY, FedshareError, OverloadError, UnavailableError
from share_server.hub import log

_LONGEST_SENTENCE = 1500

Admit = Callable[[str, aio.ServicerContext[Any, Any]], None]
"""Checks one call and raises a FedshareError to refuse it."""


class Door(aio.ServerInterceptor):
    """Wraps all four kinds of handlers. ``admit`` runs before the handler sees anything."""

    def __init__(self, admit: Admit, write_timeout_s: float) -> None:
        self._admit = admit
        self._write_timeout_s = write_timeout_s

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
        codec = (handler.request_deserializer, handler.response_serializer)
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
        async def guarded(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            try:
                self._admit(method, context)
                return await behaviour(request, context)
            except Exception as error:
                await refuse(method, context, error)

        return guarded

    def _many(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def guarded(request: Any, context: aio.ServicerContext[Any, Any]) -> None:
            try:
                self._admit(method, context)
                answer = behaviour(request, context)
                if isinstance(answer, AsyncGenerator):
                    async with aclosing(answer):
                        async for message in answer:
                            await self._write(context, message)
                else:
                    await answer
            except Exception as error:
                await refuse(method, context, error)

        return guarded

    async def _write(self, context: aio.ServicerContext[Any, Any], message: Any) -> None:
        """Send one message; a reader that does not take it in time is cut and costs nothing any more."""
        try:
            await asyncio.wait_for(context.write(message), self._write_timeout_s)
        except TimeoutError as error:
            raise UnavailableError(
                f"nothing was read for {self._write_timeout_s:g} s: connect again and read faster"
            ) from error


async def refuse(method: str, context: aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """End a call with ``error``: its status, its sentence, and its class name under ``ERROR_KEY``.

    Anything that is not a FedshareError is a fault of ours: the caller learns only a number under which the operator
    finds the traceback in the log.
    """
    if isinstance(error, aio.AbortError):
        raise error
    if isinstance(error, FedshareError):
        name, code, sentence = type(error).__name__, grpc.StatusCode[error.grpc_code], str(error)
        log.warning("refused", method=method, peer=context.peer(), error=name, reason=sentence)
    else:
        number = secrets.token_hex(4)
        name, code = FedshareError.__name__, grpc.StatusCode.INTERNAL
        sentence = f"the hub failed on this call; its log has the reason under {number}"
        log.failure("call failed", error, method=method, number=number)
    trailing = [(ERROR_KEY, name)]
    if isinstance(error, OverloadError):
        trailing.append((RETRY_KEY, str(error.retry_after_ms)))
    await context.abort(code, sentence[:_LONGEST_SENTENCE], tuple(trailing))
    raise AssertionError("abort always raises")
