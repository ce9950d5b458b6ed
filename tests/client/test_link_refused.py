"""A refused upload costs the client nothing that lasts."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from share_client import link as module
from share_client.link import HubLink
from share_client.uploading import Submission
from share_core.errors import OverloadError
from share_proto.v1 import hub_pb2

PAYLOAD = bytes(3 << 20)


def senders() -> set[threading.Thread]:
    """Return gRPC's threads for the calls of this process."""
    return {thread for thread in threading.enumerate() if thread.name.endswith("(_run)")}


class Busy:
    """Refuses every header."""

    def __init__(self) -> None:
        self.at_work: set[threading.Thread] = set()

    def Submit(self, request_iterator: Iterator[hub_pb2.SubmitRequest], context: Any) -> hub_pb2.SubmitResponse:
        next(request_iterator)
        self.at_work = senders()
        context.set_trailing_metadata((("share-error", "OverloadError"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much at once")
        raise AssertionError


def test_no_thread_waits_for_the_word_after_a_refusal(
    serving: Callable[..., HubLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold the payload; under overload, where refusals are many, that adds up."""
    monkeypatch.setattr(module, "_PATIENCE_S", 300.0)
    hub = Busy()
    link = serving(hub)
    digest = hashlib.sha256(PAYLOAD).hexdigest()
    submission = Submission("ab" * 16, "s", "org/task", create=True, payload_size=len(PAYLOAD), payload_sha256=digest)
    before = senders()
    with pytest.raises(OverloadError):
        link.submit(submission, PAYLOAD)
    waiting = hub.at_work - before
    assert waiting, "the thread that sends is found by its name"
    end = time.monotonic() + 30.0
    while any(thread.is_alive() for thread in waiting):
        assert time.monotonic() < end, "the thread that sends waits for ever"
        time.sleep(0.02)
