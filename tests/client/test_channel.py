"""Failures of calls become our errors, all of them."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from share_client.backoff import Backoff
from share_client.channel import error_from_rpc
from share_core.errors import FedshareError, UnavailableError, error_classes


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
