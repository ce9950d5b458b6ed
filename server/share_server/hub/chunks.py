"""Chunks of an upload without copies.

A message of a Submit stream that holds nothing but a chunk is read as a view into the bytes that gRPC has received.
Protobuf would copy the megabyte twice, once into the message and once more at every access, on the one thread that
serves all calls. Every other message, and every unusual encoding of a chunk, goes through protobuf.
"""

from __future__ import annotations

from google.protobuf.internal import api_implementation

from share_core.errors import ConfigError
from share_proto.v1 import hub_pb2

SubmitPart = hub_pb2.SubmitRequest | memoryview
"""A message of a Submit stream; a view is the content of its ``chunk``."""

_TAG = hub_pb2.SubmitRequest.CHUNK_FIELD_NUMBER << 3 | 2
"""First byte of an encoded message that begins with a chunk: field number and wire type "length-delimited"."""


def read_submit_request(data: bytes) -> SubmitPart:
    """Return the message encoded in ``data``; a deserializer for gRPC.

    Raises:
        google.protobuf.message.DecodeError: it is no SubmitRequest; gRPC ends the call then.
    """
    if data[:1] == bytes([_TAG]):
        length, at = _varint(data, 1)
        if at + length == len(data):
            return memoryview(data)[at:]
    return hub_pb2.SubmitRequest.FromString(data)


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
