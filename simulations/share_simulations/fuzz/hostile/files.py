"""An acceptable update as a file, and its changes: what every hostile file is made from."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

SITES = {"q": (12, 10), "v": (8, 14)}
"""Shapes of the two sites of the space that the files are for; its rank limit is :data:`RANK_LIMIT`."""
RANK_LIMIT = 6

Header = dict[str, Any]
"""What the text of a header stands for."""
SHAPES = {"E_o/q": [4, 2], "E_i/q": [5, 2], "B/v": [8, 3], "A/v": [3, 14], "head/weight": [3, 4], "head/bias": [3]}
"""Tensors of the honest update: one of every class."""
INNER = {"base_version": 3, "format": "fedshare/update/1"}
"""What its metadata says under the key ``fedshare``."""


class Case(NamedTuple):
    """One file."""

    name: str
    data: bytes
    error: str
    """Class that it is refused with; empty: it is accepted."""
    words: str
    """Part of the sentence."""


def value(number: float, dtype: str) -> bytes:
    """Return one number in little-endian bytes."""
    if dtype == "F16":
        return struct.pack("<e", number)
    raw = struct.pack("<f", number)
    return raw[2:] if dtype == "BF16" else raw


def honest(shapes: dict[str, list[int]] | None = None, dtype: str = "F32") -> tuple[Header, bytearray]:
    """Return header and data of an acceptable update."""
    header: Header = {"__metadata__": {"fedshare": json.dumps(INNER, sort_keys=True)}}
    data = bytearray()
    for name, shape in (SHAPES if shapes is None else shapes).items():
        count = math.prod(shape)
        begin = len(data)
        data += b"".join(value(0.5 + (7 * n % 11) / 8, dtype) for n in range(count))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, len(data)]}
    return header, data


def pack(header: Header | bytes, data: bytes | bytearray = b"", length: int | None = None) -> bytes:
    """Return a file; ``length`` is what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def changed(change: Callable[[Header], object]) -> bytes:
    """Return the honest file with another header."""
    header, data = honest()
    change(header)
    return pack(header, data)


def entry(name: str, **fields: Any) -> bytes:
    """Return the honest file with other fields in one entry."""
    return changed(lambda header: header[name].update(fields))


def text(old: str, new: str) -> bytes:
    """Return the honest file with ``new`` for the first ``old`` in the text of its header."""
    header, data = honest()
    raw = json.dumps(header, separators=(",", ":"))
    assert old in raw, old
    return pack(raw.replace(old, new, 1).encode("utf-8", "surrogatepass"), data)


def with_shapes(**shapes: list[int] | None) -> bytes:
    """Return an update with these tensors instead of the honest ones; a double underscore stands for the slash."""
    named = {name.replace("__", "/"): shape for name, shape in shapes.items()}
    merged = {name: shape for name, shape in {**SHAPES, **named}.items() if shape is not None}
    return pack(*honest(merged))


def inner(raw: str) -> bytes:
    """Return the honest file with another text under the key ``fedshare``."""
    return changed(lambda header: header["__metadata__"].update(fedshare=raw))
