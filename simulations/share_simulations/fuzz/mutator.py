"""Changes to a file that keep it almost right.

Bytes changed at random break the JSON of the header, and the reader is left at its second rule. Here the header is
taken apart, one or a few things in it are changed the way a liar would, and it is put together again, mostly with a
length that fits and often with offsets that fit as well.
"""

from __future__ import annotations

import functools
import json
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from share_core.wire import UPDATE
from share_simulations.fuzz.target import SPEC

Mutate = Callable[[bytes], bytes]
"""Changes bytes without knowing what they mean."""

Header = dict[str, Any]

_DTYPES = ("F32", "F16", "BF16")
_ODD_DTYPES: tuple[Any, ...] = ("F64", "I8", "U8", "BOOL", "f32", "F8_E4M3", "F4", "", "F32 ", 5, None, ["F32"], {})
_NUMBERS = (0, 1, 2, 3, 4, 7, 8, 255, 2**31, 2**32, 2**53, 2**61, 2**62, 2**63, 2**64, -1, -4, True, 1.0, 1e300, "4")
_NAMES = ("E_o/q", "E_i/q", "B/q", "A/q", "E_o/v", "E_i/v", "B/v", "A/v", "head/weight", "head/bias", "head/x/y")
_ODD_NAMES = ("", "/", "E_o/", "/q", "Q_o/q", "E_o/nope", "E_o/q\0", "head/\ud800", "head/é", "__metadata__", "x" * 400)
_TOKENS: tuple[bytes, ...] = (
    b"-0",
    b"1e1",
    b"1.5",
    b"NaN",
    b"Infinity",
    b"\\ud800",
    b"\\u0041",
    b" ",
    b"\t",
    b"\x00",
    b"\xef\xbb\xbf",
)
_TOKENS += (
    b",",
    b"{}",
    b"[]",
    b"[" * 1200,
    b'"',
    b"null",
    b"true",
    b"00",
    b"9" * 40,
    b"9" * 5000,
    b"//",
    b'{"a":' * 600,
)
_VALUES: tuple[bytes, ...] = (
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\x7f",
    b"\x00\x00\x80\xff",
    b"\xff\xff\x7f\x7f",
    b"\x01\x00\x00\x00",
)
_VALUES += (b"\x00\x00\x00\x80", b"\x00\x00\x00\x5f", b"\x00\x00\x01\x5f", b"\x00\x7c\x00\xfc", b"\x80\x7f\x7f\x7f")
_NUMBER = re.compile(rb"-?\d+")
_SPELLINGS = (b"-0", b"0", b"0.0", b"1e0", b"01", b"+1", b"-1", b"0x1", b"1_0", b"18446744073709551616")
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_MOST_DATA = 2048
_FILLING = struct.pack("<1088H", *(0x3F00 + n % 64 + 0x8000 * (n % 3 == 0) for n in range(1088)))
"""Values that are finite as any of the types."""


@dataclass
class _File:
    """A file taken apart."""

    header: Header
    data: bytearray


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Return acceptable files to begin with: updates of every kind and a file without tensors."""
    draw = random.Random(0)
    files = [_pack(_File({}, bytearray()))]
    for names in (_NAMES[:2], _NAMES[2:4], _NAMES[:4], (*_NAMES[4:8], "head/weight"), _NAMES[:10]):
        for dtype in _DTYPES:
            file = _File({}, bytearray())
            for name in names:
                _add(file, name, dtype, draw)
            _fit(file, draw)
            files.append(_pack(file))
    return tuple(files)


def mutate(data: bytes, draw: random.Random, raw: Mutate) -> bytes:
    """Return a changed file; ``raw`` is what changes bytes blindly. Equal draws give equal files."""
    file = _unpack(data)
    way = draw.random()
    if file is None or way < 0.15:
        return raw(data) if draw.random() < 0.7 or file is not None else draw.choice(seeds())
    if way < 0.35:
        return _text(data, draw, raw)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        draw.choice(_CHANGES)(file, draw)
    if draw.random() < 0.6:
        _fit(file, draw)
    packed = _pack(file, draw)
    return packed if draw.random() < 0.95 else _lie_about_length(packed, draw)


def blind(draw: random.Random) -> Mutate:
    """Return a function that flips, cuts, inserts and repeats bytes; in the place of the fuzzer's own."""

    def change(data: bytes) -> bytes:
        made = bytearray(data or b"\0")
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(len(made) + 1)
            way = draw.randrange(4)
            if way == 0:
                made[at % max(1, len(made)) : at % max(1, len(made)) + 1] = bytes([draw.randrange(256)])
            elif way == 1:
                del made[at : at + draw.randrange(1, 9)]
            elif way == 2:
                made[at:at] = draw.randbytes(draw.randrange(1, 9))
            else:
                made[at:at] = made[max(0, at - 8) : at]
        return bytes(made)

    return change


def _unpack(data: bytes) -> _File | None:
    if len(data) < 8:
        return None
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        return None
    return _File(header, bytearray(data[8 + length :][:_MOST_DATA]))


def _pack(file: _File, draw: random.Random | None = None) -> bytes:
    try:
        written = json.dumps(file.header)
        if draw is not None and file.header and draw.random() < 0.05:  # a key twice
            key, value = draw.choice(list(file.header.items()))
            written = f"{written[:-1]}, {json.dumps(key)}: {json.dumps(value)}}}"
    except RecursionError:
        written = "{}"
    text = written.encode()
    if draw is not None and draw.random() < 0.2:
        text += b" " * draw.randrange(1, 9)
    return struct.pack("<Q", len(text)) + text + bytes(file.data)


def _text(data: bytes, draw: random.Random, raw: Mutate) -> bytes:
    """Change the text of the header and let its length fit."""
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    way = draw.random()
    numbers = list(_NUMBER.finditer(text)) if way < 0.2 else []
    if numbers:
        start, end = draw.choice(numbers).span()
        text = text[:start] + draw.choice(_SPELLINGS) + text[end:]
    elif way < 0.5:
        text = raw(text)
    else:
        at = draw.randrange(len(text) + 1)
        gone = draw.choice((0, 0, 1, 2))
        text = text[:at] + draw.choice(_TOKENS) + text[at + gone :]
    return struct.pack("<Q", len(text)) + text + rest


def _lie_about_length(data: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    said = draw.choice((length - 1, length + 1, 0, 1, len(data), 2**20, 2**20 + 1, 2**32, 2**63, 2**64 - 1))
    return struct.pack("<Q", said % 2**64) + data[8:]


def _tensors(file: _File) -> list[str]:
    """Return the names whose entries can be changed."""
    return [name for name, entry in file.header.items() if name != "__metadata__" and isinstance(entry, dict)]


def _one(file: _File, draw: random.Random) -> Header:
    """Return an entry to change; a new one where there is none."""
    names = _tensors(file)
    if not names:
        return _add(file, draw.choice(_NAMES), "F32", draw)
    entry: Header = file.header[draw.choice(names)]
    return entry


def _add(file: _File, name: str, dtype: str, draw: random.Random) -> Header:
    """Add a tensor of the shape that an honest update has under this name."""
    part, _, owner = name.partition("/")
    site = SPEC.sites.get(owner)
    rows, columns = (site.d_out, site.d_in) if site else (3, 2)
    shapes = {"E_o": [3, 2], "E_i": [4, 2], "B": [rows, 2], "A": [2, columns], "head": [rows, 4]}
    entry = {"dtype": dtype, "shape": list(shapes.get(part, [2, 2])), "data_offsets": [0, 0]}
    file.header[name] = entry
    if "__metadata__" not in file.header:
        file.header["__metadata__"] = {"fedshare": json.dumps({"base_version": 3, "format": UPDATE})}
    return entry


def _change_dtype(file: _File, draw: random.Random) -> None:
    _one(file, draw)["dtype"] = draw.choice(_DTYPES if draw.random() < 0.7 else _ODD_DTYPES)


def _change_shape(file: _File, draw: random.Random) -> None:
    entry = _one(file, draw)
    shape = entry.get("shape")
    way = draw.randrange(5)
    if not isinstance(shape, list) or way == 0:
        entry["shape"] = [draw.choice(_NUMBERS) for _ in range(draw.randrange(6))]
    elif way == 1:
        shape.insert(draw.randrange(len(shape) + 1), draw.choice(_NUMBERS))
    elif way == 2 and shape:
        shape[draw.randrange(len(shape))] = draw.choice(_NUMBERS)
    elif way == 3 and shape:
        shape.pop(draw.randrange(len(shape)))
    elif way == 4:
        draw.shuffle(shape)


def _change_offsets(file: _File, draw: random.Random) -> None:
    entry = _one(file, draw)
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or not offsets or draw.random() < 0.1:
        entry["data_offsets"] = [draw.choice(_NUMBERS) for _ in range(draw.randrange(4))]
        return
    way, other = draw.randrange(4), _one(file, draw)
    at = draw.randrange(len(offsets))
    if way == 0:
        offsets[at] = draw.choice(_NUMBERS)
    elif way == 1 and type(offsets[at]) is int:
        offsets[at] += draw.choice((-8, -4, -1, 1, 4, 8))
    elif way == 2:
        offsets.reverse()
    else:
        entry["data_offsets"], other["data_offsets"] = other.get("data_offsets"), offsets


def _rename(file: _File, draw: random.Random) -> None:
    names = _tensors(file)
    if names:
        entry = file.header.pop(draw.choice(names))
        file.header[draw.choice(_NAMES if draw.random() < 0.5 else _ODD_NAMES)] = entry


def _add_or_remove(file: _File, draw: random.Random) -> None:
    names = _tensors(file)
    if names and draw.random() < 0.4:
        del file.header[draw.choice(names)]
    else:
        _add(file, draw.choice(_NAMES), draw.choice(_DTYPES), draw)


def _change_entry(file: _File, draw: random.Random) -> None:
    entry = _one(file, draw)
    way = draw.randrange(3)
    if way == 0:
        entry[draw.choice(("extra", "Dtype", "", "shape"))] = draw.choice(_NUMBERS)
    elif way == 1 and entry:
        del entry[draw.choice(list(entry))]
    else:
        file.header[draw.choice(_NAMES)] = draw.choice(({}, [], 1, None, "x"))


def _change_metadata(file: _File, draw: random.Random) -> None:
    inner: dict[str, Any] = {
        "base_version": draw.choice(_NUMBERS),
        "format": draw.choice((UPDATE, UPDATE, "fedshare/delta/1", [], 1)),
    }
    text = json.dumps(inner)
    values: tuple[Any, ...] = (
        text,
        text[:-1],
        "[]",
        "{}",
        "",
        "\ud800",
        text.replace("}", ', "format": 1}'),
        "[" * 1200,
        5,
        None,
        {},
    )
    metadata = {"fedshare": draw.choice(values)}
    if draw.random() < 0.2:
        metadata[draw.choice(("é", "x" * 200, "a"))] = draw.choice(("", "é", 1))
    file.header["__metadata__"] = metadata if draw.random() < 0.95 else draw.choice(([], None, "x", {}))


def _change_data(file: _File, draw: random.Random) -> None:
    if not file.data:
        return
    way = draw.randrange(3)
    if way == 0:
        at = draw.randrange(len(file.data)) & ~3
        file.data[at : at + 4] = draw.choice(_VALUES)
    elif way == 1:
        file.data[:] = (draw.choice(_VALUES) * (len(file.data) // 4 + 1))[: len(file.data)]
    elif draw.random() < 0.5:
        del file.data[-draw.randrange(1, 5) :]
    else:
        file.data += draw.randbytes(draw.randrange(1, 5))


_CHANGES: tuple[Callable[[_File, random.Random], None], ...] = (
    _change_dtype,
    _change_shape,
    _change_shape,
    _change_offsets,
    _rename,
    _add_or_remove,
    _add_or_remove,
    _change_entry,
    _change_metadata,
    _change_data,
    _change_data,
)


def _fit(file: _File, draw: random.Random) -> None:
    """Give every tensor whose shape and dtype make sense its place, one behind the other, and data to fill it."""
    position = 0
    for name in _tensors(file):
        entry = file.header[name]
        shape, dtype = entry.get("shape"), entry.get("dtype")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**16 for n in shape):
            continue
        size = _SIZES.get(dtype, 1) if isinstance(dtype, str) else 1
        for n in shape:
            size *= n
        if position + size <= _MOST_DATA:
            entry["data_offsets"] = [position, position + size]
            position += size
    if len(file.data) > position:
        del file.data[position:]
    missing = position - len(file.data)
    if missing > 0:
        file.data += _FILLING[draw.randrange(8) * 4 :][:missing]
