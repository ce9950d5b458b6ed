"""Failures of calls become our errors, all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from share_client.backoff import Backoff
from share_client.channel import error_from_rpc
from share_core.errors import FedshareError, OverloadError, PayloadTooLargeError, UnavailableError, error_classes


class Failure(grpc.RpcError):
    """A failed call as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(details)
        self._answer = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str:
        return self._answer[1]

    def trailing_metadata(self) -> Any:
        return self._answer[2]


@pytest.mark.parametrize("name", sorted(error_classes()))
def test_a_named_refusal_keeps_class_and_sentence(name: str) -> None:
    cls = error_classes()[name]
    failure = Failure(grpc.StatusCode[cls.grpc_code], "the sentence", (("other", "x"), ("share-error", name)))
    error = error_from_rpc(failure, "asking")
    assert type(error) is cls
    assert str(error) == "the sentence"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_without_a_name_is_an_error_that_says_what_we_did(code: grpc.StatusCode) -> None:
    error = error_from_rpc(Failure(code, "why"), "asking for the moon")
    assert type(error) is not FedshareError
    assert str(error) == f"asking for the moon: {code.name}: why"


LOADS = ("Concurrent RPC limit exceeded!", "Stream removed (RST_STREAM (Received RST_STREAM with error code 11))")
TOO_LARGE = (
    "SERVER: Received message larger than max (2000000 vs. 1048576)",
    "CLIENT: Sent message larger than max (5000000 vs. 4194304)",
    "Stream removed (CLIENT: Received message larger than max (5000000 vs. 4194304))",
    "received metadata size exceeds hard limit (value length 20000 vs. 16384)",
)


@pytest.mark.parametrize("details", LOADS + TOO_LARGE)
def test_exhausted_means_load_or_size(details: str) -> None:
    error = error_from_rpc(Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, details), "asking")
    assert type(error) is (OverloadError if details in LOADS else PayloadTooLargeError)


@contextmanager
def raw_server(answer: Callable[[str], bytes], most_calls: int | None = None) -> Iterator[Any]:
    """Serve every method of plain bytes by ``answer(method)``; give a channel. Requests above 1 MiB are refused."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: answer(details.method))

    options = [("grpc.max_receive_message_length", 1 << 20)]
    server = grpc.server(ThreadPoolExecutor(4), [Handler()], options=options, maximum_concurrent_rpcs=most_calls)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            yield channel
    finally:
        server.stop(None).wait()


def failed(channel: Any, method: str, request: bytes = b"") -> type[FedshareError]:
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(method)(request, timeout=30)
    return type(error_from_rpc(raised.value, "testing"))


def test_this_grpc_sheds_in_these_words() -> None:
    """The sentences above are those of the installed release."""
    release, arrived = threading.Event(), threading.Event()

    def answer(method: str) -> bytes:
        arrived.set()
        release.wait(30)
        return b""

    with raw_server(answer, most_calls=1) as channel:
        try:
            waiting = channel.unary_unary("/test/wait").future(b"", timeout=30)
            assert arrived.wait(30)
            assert failed(channel, "/test/shed") is OverloadError
        finally:
            release.set()
        assert waiting.result() == b""


def test_this_grpc_refuses_sizes_in_these_words() -> None:
    with raw_server(lambda method: b"x" * 5_000_000) as channel:
        assert failed(channel, "/test/large-request", b"x" * 2_000_000) is PayloadTooLargeError
        assert failed(channel, "/test/large-answer") is PayloadTooLargeError


@pytest.mark.parametrize(
    ("hint", "expected"), [("2500", 2500), ("0", 0), ("", 1000), ("soon", 1000), ("-9223372036854775808", 1000)]
)
def test_the_hint_of_an_overload(hint: str, expected: int) -> None:
    metadata = (("share-error", "OverloadError"), ("grpc-retry-pushback-ms", hint))
    error = error_from_rpc(Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", metadata), "asking")
    assert isinstance(error, OverloadError)
    assert error.retry_after_ms == expected


def test_the_wait_is_at_least_the_hint_and_spread_and_never_longer_than_a_minute() -> None:
    backoff = Backoff(first=0.2, longest=0.2, seed=3)
    waits = [backoff.next_wait(OverloadError("busy", 5000)) for _ in range(50)]
    assert all(5.0 <= wait <= 7.5 for wait in waits)
    assert len(set(waits)) == 50, "clients sent away together must not return together"
    assert {backoff.next_wait(OverloadError("busy", 10**9)) for _ in range(9)} == {60.0}
    assert backoff.next_wait(OverloadError("busy", 0)) <= 0.2
    assert Backoff(first=9.0, seed=1).next_wait(OverloadError("busy", 100)) >= 4.5, "its own step still counts"
    assert backoff.next_wait(UnavailableError("away")) <= 0.2


def test_an_unknown_name_falls_back_to_the_status() -> None:
    failure = Failure(grpc.StatusCode.UNAVAILABLE, "why", (("share-error", "FutureError"),))
    assert type(error_from_rpc(failure, "asking")) is UnavailableError


def test_waiting_doubles_up_to_its_limit_and_begins_anew() -> None:
    backoff = Backoff(first=1.0, longest=8.0, seed=1)
    waits = [backoff.next_wait() for _ in range(6)]
    for wait, step in zip(waits, (1, 2, 4, 8, 8, 8), strict=True):
        assert step / 2 <= wait <= step
    backoff.reset()
    assert backoff.next_wait() <= 1.0
