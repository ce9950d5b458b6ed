"""What a hub and its parsers say to each other: frames of JSON with nothing but numbers and short texts.

A parser has read bytes of a stranger, so the hub takes its answer for a stranger's as well: a frame has a limit, every
value its type, every site must be one of the space, and an error must be one that a payload can have.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import asdict, dataclass
from typing import Any

from share_core.errors import ParserError, PayloadError, UnavailableError, error_classes
from share_core.types import SpaceSpec
from share_core.wire import PayloadSplit, UpdateFacts

NO_MEMORY = "memory"
"""A parser has met its limit of memory and lives on."""
GONE = "gone"
"""The payload was taken away while a parser looked at it."""

_LENGTH = struct.Struct(">I")
_MOST_BYTES = 8 << 20
_LONGEST_TEXT = 1000


class BadAnswer(Exception):
    """An answer that no honest parser gives."""


@dataclass(frozen=True)
class Hello:
    """What a parser is told once."""

    spec: str
    """The space, as TOML."""
    memory_bytes: int
    """Memory it may take beside what it begins with."""
    cpu_s: int
    """Processor time that one payload may take, in seconds."""


def hello(order: Hello) -> bytes:
    """Return the first frame for a parser."""
    return json.dumps(asdict(order)).encode()


def read_hello(frame: bytes) -> Hello:
    """Read the first frame."""
    return Hello(**json.loads(frame))


def acceptance(facts: UpdateFacts) -> bytes:
    """Return the answer for an acceptable update."""
    split = facts.split
    parts = [split.coefficients, split.directions, split.heads, split.envelope]
    return json.dumps({"base": facts.base_version, "cores": dict(facts.cores), "split": parts}).encode()


def refusal(name: str, text: str) -> bytes:
    """Return the answer for anything else."""
    return json.dumps({"error": name, "text": text[:_LONGEST_TEXT]}).encode()


def read_answer(frame: bytes, spec: SpaceSpec, size: int) -> UpdateFacts:
    """Return what a parser found out about a payload of ``size`` bytes.

    Raises:
        PayloadError: the payload is refused: the leaf that the parser named.
        UnavailableError: the payload was taken away meanwhile.
        BadAnswer: no honest parser says this.
    """
    try:
        answer = json.loads(frame)
    except (ValueError, RecursionError):
        raise BadAnswer("it is not JSON") from None
    if not isinstance(answer, dict):
        raise BadAnswer("it is not an object")
    if "error" in answer:
        raise _refused(answer["error"], answer.get("text"))
    numbers = answer.get("split")
    if not _whole(answer.get("base")) or not isinstance(numbers, list) or not all(map(_whole, numbers)):
        raise BadAnswer("it has no numbers")
    if len(numbers) != 4 or sum(numbers) != size:
        raise BadAnswer("its parts are not the whole")
    return UpdateFacts(answer["base"], _cores(answer.get("cores"), spec), PayloadSplit(*numbers))


def _refused(name: Any, text: Any) -> Exception:
    if name == NO_MEMORY:
        return ParserError("parsing this payload takes more memory than the hub allows: it was not taken")
    if name == GONE:
        return UnavailableError("this upload was given up: send it again")
    known = error_classes().get(name) if isinstance(name, str) else None
    if known is None or not issubclass(known, PayloadError) or not isinstance(text, str):
        return BadAnswer("it names an error that no payload has")
    return known(text[:_LONGEST_TEXT])


def _cores(value: Any, spec: SpaceSpec) -> dict[str, tuple[int, int]]:
    cores: dict[str, tuple[int, int]] = {}
    if not isinstance(value, dict):
        raise BadAnswer("it has no cores")
    for site, sizes in value.items():
        if site not in spec.sites or not isinstance(sizes, list) or len(sizes) != 2 or not all(map(_whole, sizes)):
            raise BadAnswer("it has a core that the space has not")
        cores[site] = (sizes[0], sizes[1])
    return cores


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def write_frame(peer: socket.socket, data: bytes) -> None:
    """Send one frame."""
    peer.sendall(_LENGTH.pack(len(data)) + data)


def read_frame(peer: socket.socket) -> bytes | None:
    """Return one frame; None if the other side has ended.

    Raises:
        BadAnswer: it is longer than any frame. TimeoutError: by the timeout of ``peer``.
    """
    head = _exactly(peer, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > _MOST_BYTES:
        raise BadAnswer("it is longer than any answer")
    return _exactly(peer, length)


def _exactly(peer: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = peer.recv(count - len(data))
        if not part:
            return None
        data += part
    return bytes(data)
