"""Messages before they are messages: how large they may be, and chunks of an upload without copies.

Every message but a chunk is small. A large one can only be an attempt to have something large made of it: four million
bytes of empty submessages become a hundred million bytes of objects before anybody could count them. So its size is
looked at before protobuf sees it.

A message of a Submit stream that holds nothing but a chunk is read as a view into the bytes that gRPC has received.
Protobuf would copy the megabyte twice, once into the message and once more at every access, on the one thread that
serves all calls. Every other message, and every unusual encoding of a chunk, goes through protobuf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.internal import api_implementation
from google.protobuf.message import DecodeError

from share_core.errors import ConfigError, RequestError
from share_proto.v1 import hub_pb2

SubmitPart = hub_pb2.SubmitRequest | memoryview
"""A message of a Submit stream; a view is the content of its ``chunk``."""

_TAG = hub_pb2.SubmitRequest.CHUNK_FIELD_NUMBER << 3 | 2
"""First byte of an encoded message that begins with a chunk: field number and wire type "length-delimited"."""


MOST_REQUEST_BYTES = 256 * 2**10
"""Largest request that is no chunk: a thousand evaluations, or twenty-five thousand nodes."""

MOST_HEADER_BYTES = 64 * 2**10
"""Largest header of an upload; also the largest message of an upload that is not a plain chunk."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a request that was not decoded; the door refuses it in words."""

    reason: str
    """What is wrong with it."""


def bounded(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return a deserializer for gRPC that gives :class:`Unreadable` for what is too large or no such message.

    gRPC would end the call without a word if it raised.
    """

    def read(data: bytes) -> Any:
        if len(data) > MOST_REQUEST_BYTES:
            return Unreadable(f"a request holds at most {MOST_REQUEST_BYTES} bytes, got {len(data)}")
        try:
            return decode(data)
        except DecodeError:
            return Unreadable("the request is not encoded as its method expects it")

    return read


def read_submit_request(data: bytes) -> SubmitPart:
    """Return the message encoded in ``data``; a deserializer for gRPC.

    Raises:
        RequestError: it is no SubmitRequest, or too large for one that is not a plain chunk.
    """
    if data[:1] == bytes([_TAG]):
        length, at = _varint(data, 1)
        if at + length == len(data):
            return memoryview(data)[at:]
    if len(data) > MOST_HEADER_BYTES:
        raise RequestError(
            f"a message of Submit that is not a plain chunk holds at most {MOST_HEADER_BYTES} bytes, got {len(data)}"
        )
    try:
        return hub_pb2.SubmitRequest.FromString(data)
    except DecodeError as error:
        raise RequestError("Submit takes a header and chunks: got something that is neither") from error


DECODERS = {"/share_proto.v1.Hub/Submit": read_submit_request}
"""Deserializers that replace the generated ones, by method."""


def require_native_protobuf() -> None:
    """Refuse to serve with protobuf's parser in Python, which is a hundred times slower and larger on hostile messages.

    Raises:
        ConfigError: it is in use.
    """
    if api_implementation.Type() == "python":
        raise ConfigError(
            "protobuf runs without its native parser: unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION, or install a "
            "protobuf wheel for this machine"
        )


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return (number, where it ends); a malformed one gives a number that cannot fit."""
    number = 0
    for shift in range(0, 35, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    return len(data), len(data)
