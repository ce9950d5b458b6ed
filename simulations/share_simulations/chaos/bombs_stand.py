"""Where bombs are thrown from: the connection of a member to a hub, with the time at which the last byte left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from share_core.errors import UnavailableError
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.local import Holder, LocalHub, sign_header, submit_header, submit_messages
from share_simulations.chaos import bare

SUBMIT = "/share_proto.v1.Hub/Submit"
CALL_S = 120.0
"""Longest wait for an answer."""
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]


class Refused(Exception):
    """A bare call was refused; the text is gRPC's status."""


@dataclass
class Stand:
    """Where bombs are thrown from: a connection of a member."""

    channel: grpc.Channel
    """With mutual TLS."""
    spec: SpaceSpec
    """The space of the hub."""
    holder: Holder
    """The member."""
    address: str
    """Of the hub, for connections of their own."""
    authority: bytes
    """Certificate of the hub's authority, PEM."""
    since: float = 0.0
    """When the last byte of the newest call was on its way, or when the call began."""

    def raw(self, method: str, message: bytes) -> None:
        """Send bytes as the only request of a method."""
        self._send(method, [message])

    def compressed(self, method: str, message: bytes) -> None:
        """Send a message that :func:`.bare.framed` has compressed as the only request of a method."""
        self.since = time.monotonic()
        try:
            answer = bare.call(self.address, self.authority, self.holder, method, message, CALL_S)
        except (UnavailableError, OSError) as error:
            raise Refused(f"broken connection: {error}") from error
        self.since = answer.since
        if answer.status != grpc.StatusCode.OK.name:
            raise Refused(answer.status)

    def stream(self, *messages: bytes) -> None:
        """Send bytes as the messages of an upload."""
        self._send(SUBMIT, messages)

    def payload(self, payload: bytes) -> None:
        """Send an upload with an honest header."""
        header = sign_header(submit_header(self.spec, "acme/bomb", payload), self.holder)
        self._send(SUBMIT, [message.SerializeToString() for message in submit_messages(header, payload)])

    def _send(self, method: str, messages: Sequence[bytes]) -> None:
        # On the wire a call with one request is a stream of one.
        call: Any = self.channel.stream_unary(method)
        self.since = time.monotonic()
        call(self._noting(messages), timeout=CALL_S)

    def _noting(self, messages: Sequence[bytes]) -> Iterator[bytes]:
        yield from messages
        self.since = time.monotonic()  # gRPC asks for another message when it has sent the one before

    def announce(self, size: int) -> None:
        """Announce an upload of so many bytes."""
        header = submit_header(self.spec, "acme/bomb", b"x")
        header.payload_size = size
        sign_header(header, self.holder)
        self.stream(hub_pb2.SubmitRequest(header=header).SerializeToString())


@contextmanager
def at_stand(server: LocalHub, holder: Holder) -> Iterator[Stand]:
    """Yield the stand of a member of the hub; its connection is closed at the end."""
    authority, address = server.layout.ca_cert.read_bytes(), server.config.local_hub_address
    credentials = grpc.ssl_channel_credentials(authority, holder.key, holder.certificate)
    with grpc.secure_channel(address, credentials, _OPTIONS) as channel:
        yield Stand(channel, server.spec, holder, address, authority)
