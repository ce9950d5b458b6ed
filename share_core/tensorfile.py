"""A strict reader of safetensors bytes that came from somebody else.

The safetensors library is memory-safe but forgiving: it accepts NaN, duplicate keys (the last wins), unknown header
fields, empty tensors by the hundred thousand and shapes of a hundred thousand dimensions. Here a file is refused unless

1. it is at least 8 bytes, and its header length (u64, little-endian) is within the limit and fits the file;
2. the header is ASCII JSON that starts with ``{``, without duplicate keys, floats, constants such as NaN, or ``-0``;
3. every name is 1 to 320 printable ASCII characters;
4. every entry is exactly ``{dtype, shape, data_offsets}`` with plain non-negative integers, 1 to 4 positive dimensions;
5. the dtype is F32, F16 or BF16, and offsets agree with shape and dtype;
6. the data regions are contiguous from 0 to the end of the file, without gap or overlap;
7. metadata is at most 16 short ASCII strings;
8. every value is finite, and the Frobenius norm of every tensor, reckoned in float64, is within the limit.

What a name means is the caller's to check (:mod:`share_core.wire`). Nothing here calls the library, and everything that
is accepted here the library accepts too, with the same content (``share-sim fuzz``).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from share_core.errors import HeaderError, NonFiniteError, TensorNameError, TensorShapeError, TensorTypeError
from share_core.linalg import require_finite

MAX_HEADER_BYTES = 1 << 20
"""Largest accepted header."""
MAX_TENSORS = 16384
"""Most tensors in one file."""
MAX_DEPTH = 16
"""Deepest nesting of brackets in a header; honest ones have three levels."""
_NESTS = np.zeros(256, np.int8)
_NESTS[list(b"[{")], _NESTS[list(b"]}")] = 1, -1
MAX_NAME = 320
"""Longest name of a tensor: the longest site of the longest task needs 264 characters."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
"""Bits of infinity; without the sign, NaN has more and every other value has less."""
_MAGNITUDE = np.uint16(0x7FFF)


class Source(Protocol):
    """The bytes of a file: ``bytes``, a ``memoryview``, or something that reads a slice when it is asked for one."""

    def __len__(self) -> int:
        """Return the size of the file."""

    def __getitem__(self, where: slice, /) -> bytes | memoryview:
        """Return the bytes of a slice without a step, none of them missing."""


@dataclass(frozen=True)
class Limits:
    """What the caller allows beyond the rules that hold for every file."""

    header_bytes: int = MAX_HEADER_BYTES
    """Longest header; more than :data:`MAX_HEADER_BYTES` is never allowed."""
    norm: float = math.inf
    """Largest Frobenius norm of one tensor."""


NO_LIMITS = Limits()


@dataclass(frozen=True)
class TensorFile:
    """A file that passed."""

    tensors: Mapping[str, Tensor]
    """By name, in float32."""
    metadata: Mapping[str, str]
    """The header's ``__metadata__``."""
    sizes: Mapping[str, int]
    """Data bytes of every tensor by name."""


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def tensor_sizes(payload: Source) -> dict[str, int]:
    """Return the data bytes of every tensor by name, reading only the header.

    Raises:
        HeaderError, TensorNameError, TensorTypeError, TensorShapeError: see the rules above.
    """
    return _sizes(_read_header(payload, NO_LIMITS)[1])


def describe_tensors(payload: Source) -> list[dict[str, Any]]:
    """Return name, dtype, shape and data bytes of every tensor in the order of their data, reading only the header."""
    _, entries, _ = _read_header(payload, NO_LIMITS)
    names = {dtype: name for name, dtype in _DTYPES.items()}
    return [
        {"name": e.name, "dtype": names[e.dtype], "shape": list(e.shape), "bytes": e.end - e.begin} for e in entries
    ]


def read_tensors(payload: bytes | memoryview, limits: Limits = NO_LIMITS) -> TensorFile:
    """Read a whole file.

    Raises:
        HeaderError, TensorNameError, TensorTypeError, TensorShapeError, NonFiniteError: see the rules above.
    """
    start, entries, metadata = _read_header(payload, limits)
    raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        _check_values(payload[start + entry.begin : start + entry.end], entry, limits)
        data = raw[start + entry.begin : start + entry.end]
        if (start + entry.begin) % entry.dtype.itemsize:  # the header's length decides; writers usually align it
            data = data.clone()
        tensors[entry.name] = data.view(entry.dtype).reshape(entry.shape).to(torch.float32)
    return TensorFile(tensors, metadata, _sizes(entries))


def read_shapes(payload: Source, limits: Limits = NO_LIMITS) -> TensorFile:
    """Check a whole file as :func:`read_tensors` does, values included, and return tensors on the ``meta`` device.

    They have shapes and no values: for whoever only has to know whether a file is acceptable, at a quarter of the cost.
    One tensor is held at a time, so a source may read slices from a disk.

    Raises:
        HeaderError, TensorNameError, TensorTypeError, TensorShapeError, NonFiniteError: as :func:`read_tensors`.
    """
    start, entries, metadata = _read_header(payload, limits)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        _check_values(payload[start + entry.begin : start + entry.end], entry, limits)
        tensors[entry.name] = torch.empty(entry.shape, dtype=torch.float32, device="meta")
    return TensorFile(tensors, metadata, _sizes(entries))


def parse_object(text: str, what: str) -> dict[str, Any]:
    """Return the JSON object in ``text``, in which keys are unique and numbers are whole.

    Raises:
        HeaderError: it is something else; ``what`` names it.
    """
    if _depth(text) > MAX_DEPTH:
        raise HeaderError(f"{what} is nested too deeply: at most {MAX_DEPTH} levels are allowed")
    try:
        found = json.loads(
            text,
            object_pairs_hook=no_duplicates,
            parse_float=_no_number,
            parse_constant=_no_number,
            # "-0" is whole for Python and a fraction for others; looking costs less than a hook for every number.
            parse_int=_whole if "-0" in text else None,
        )
    except ValueError as error:
        raise HeaderError(f"{what} is not JSON: {str(error)[:120]}") from None
    if not isinstance(found, dict):
        raise HeaderError(f"{what} is not a JSON object")
    return found


def _depth(text: str) -> int:
    """Return how deep brackets are nested, those inside strings included.

    The parser's own limit will not do: it depends on how deep its caller is, and what the gate reads the merge must be
    able to read.
    """
    raw = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    return int(np.cumsum(_NESTS[raw], dtype=np.int32).max(initial=0))


def shown(value: Any) -> str:
    """Return a JSON value for an error message; of a large one only what it is, since it may be nested too deeply."""
    if isinstance(value, str):
        return repr(value[:80])
    if isinstance(value, int) or value is None:
        return str(value)[:40]
    if isinstance(value, list) and len(value) <= 4 and all(type(one) is int for one in value):
        return str(value)
    return f"a {type(value).__name__} with {len(value)} entries"


def _sizes(entries: list[_Entry]) -> dict[str, int]:
    return {entry.name: entry.end - entry.begin for entry in entries}


def _check_values(data: bytes | memoryview, entry: _Entry, limits: Limits) -> None:
    """Refuse NaN, infinity, and a norm beyond the limit.

    Raises:
        NonFiniteError: naming the tensor.
    """
    largest = _largest(data, entry.dtype)
    if largest is None:
        require_finite(_tensor(data, entry.dtype), f"tensor {entry.name!r}")
        raise AssertionError(f"two opinions on whether tensor {entry.name!r} is finite")
    # The norm is at most the largest value times the root of the number of values; who is below needs no second pass.
    if largest * math.sqrt(len(data) // entry.dtype.itemsize) > limits.norm:
        norm = float(_tensor(data, entry.dtype).to(torch.float64).square().sum().sqrt())
        if norm > limits.norm:
            raise NonFiniteError(
                f"tensor {entry.name!r} has norm {norm:.3g}, at most {limits.norm:.3g} is allowed: "
                "products of such values are not finite"
            )


def _largest(data: bytes | memoryview, dtype: torch.dtype) -> float | None:
    """Return the largest magnitude; None if a value is NaN or infinite."""
    if dtype is torch.float32:
        values = np.frombuffer(data, np.dtype("<f4"))
        low, high = float(values.min()), float(values.max())  # NaN is passed on by both
        return max(-low, high) if math.isfinite(low) and math.isfinite(high) else None
    bits = int((np.frombuffer(data, np.dtype("<u2")) & _MAGNITUDE).max())
    if bits >= _INFINITY[dtype]:
        return None
    if dtype is torch.float16:
        return float(struct.unpack("<e", struct.pack("<H", bits))[0])
    return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])


def _tensor(data: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """Return the values as a tensor of one dimension, from a copy, which is aligned."""
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _read_header(payload: Source, limits: Limits) -> tuple[int, list[_Entry], dict[str, str]]:
    if len(payload) < 8:
        raise HeaderError(f"a safetensors file has at least 8 bytes, got {len(payload)}")
    length = int.from_bytes(payload[:8], "little")
    most = min(limits.header_bytes, MAX_HEADER_BYTES)
    if length > most:
        raise HeaderError(f"header of {length} bytes announced, at most {most} are allowed")
    if 8 + length > len(payload):
        raise HeaderError(f"header of {length} bytes announced in a file of {len(payload)}: the file is cut short")
    header = _parse_json(bytes(payload[8 : 8 + length]))
    metadata = _metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise HeaderError(f"{len(header)} tensors announced, at most {MAX_TENSORS} are allowed")
    entries = sorted((_entry(name, value) for name, value in header.items()), key=lambda e: e.begin)
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise HeaderError(f"tensor {entry.name!r}: expected data at offset {position}, got {entry.begin}")
        position = entry.end
    if 8 + length + position != len(payload):
        raise HeaderError(f"expected a file of {8 + length + position} bytes by its header, got {len(payload)}")
    return 8 + length, entries, metadata


def _parse_json(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise HeaderError("the header does not start with '{'")
    try:
        text = raw.decode("ascii")
    except UnicodeDecodeError:
        raise HeaderError("the header is not ASCII") from None
    return parse_object(text, "the header")


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; for ``json.loads(..., object_pairs_hook=...)``, which would let the last of two keys win.

    Raises:
        HeaderError: naming the key that appears twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = ""
        for name, _ in pairs:
            if name in seen:
                twice = name
            seen.add(name)
        raise HeaderError(f"key {twice[:80]!r} appears twice in the header")
    return found


def _no_number(text: str) -> Any:
    raise HeaderError(f"the header holds {text[:40]!r}; only whole numbers are allowed")


def _whole(text: str) -> int:
    return _no_number(text) if text == "-0" else int(text)


def _metadata(raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict) or len(raw) > 16:
        raise HeaderError("__metadata__ must be an object of at most 16 strings")
    for key, value in raw.items():
        if not isinstance(value, str) or len(key) > 128 or len(value) > MAX_HEADER_BYTES // 2:
            raise HeaderError(f"__metadata__ {key[:80]!r}: expected a string")
        if not key.isascii() or not value.isascii():
            raise HeaderError(f"__metadata__ {key[:80]!r} is not ASCII")
    return raw


def _entry(name: str, raw: Any) -> _Entry:
    what = f"tensor {name[:120]!r}"
    if not 1 <= len(name) <= MAX_NAME or not name.isascii() or not name.isprintable():
        raise TensorNameError(f"{what}: expected a name of 1 to {MAX_NAME} printable ASCII characters")
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{what}: expected exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
    if dtype is None:
        raise TensorTypeError(f"{what}: expected dtype F32, F16 or BF16, got {shown(raw['dtype'])}")
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not _whole_numbers(shape) or not 1 <= len(shape) <= 4 or 0 in shape:
        raise TensorShapeError(f"{what}: expected 1 to 4 positive dimensions, got {shown(shape)}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise HeaderError(f"{what}: expected two data_offsets, got {shown(offsets)}")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise HeaderError(f"{what}: shape {shape} needs {size} bytes, offsets give {offsets[1] - offsets[0]}")
    return _Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
