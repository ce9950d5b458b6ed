"""A strict reader of safetensors bytes that came from somebody else.

The safetensors library is memory-safe but forgiving: it accepts NaN, duplicate keys (the last wins), unknown header
fields, empty tensors by the hundred thousand and shapes of a hundred thousand dimensions. Here a file is refused unless

1. it is at least 8 bytes, and its header length (u64, little-endian) is at most ``max_header`` and fits the file;
2. the header is ASCII JSON that starts with ``{``, without duplicate keys, floats or constants such as NaN;
3. every entry is exactly ``{dtype, shape, data_offsets}`` with plain non-negative integers, 1 to 4 positive dimensions;
4. the dtype is F32, F16 or BF16, and offsets agree with shape and dtype;
5. the data regions are contiguous from 0 to the end of the file, without gap or overlap;
6. metadata is at most 16 short strings;
7. every value is finite.

Names are the caller's to check (:mod:`share_core.wire`). Nothing here calls the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from share_core.errors import HeaderError, TensorShapeError, TensorTypeError
from share_core.linalg import require_finite

MAX_HEADER_BYTES = 1 << 20
"""Largest accepted header."""
MAX_TENSORS = 16384
"""Most tensors in one file."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPONENTS = {torch.float16: np.uint16(0x7C00), torch.bfloat16: np.uint16(0x7F80)}


@dataclass(frozen=True)
class TensorFile:
    """A file that passed."""

    tensors: Mapping[str, Tensor]
    """By name, in float32."""
    metadata: Mapping[str, str]
    """The header's ``__metadata__``."""


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def tensor_sizes(payload: bytes | memoryview) -> dict[str, int]:
    """Return the data bytes of every tensor by name, reading only the header."""
    _, entries, _ = _read_header(payload)
    return {entry.name: entry.end - entry.begin for entry in entries}


def describe_tensors(payload: bytes | memoryview) -> list[dict[str, Any]]:
    """Return name, dtype, shape and data bytes of every tensor in the order of their data, reading only the header."""
    _, entries, _ = _read_header(payload)
    names = {dtype: name for name, dtype in _DTYPES.items()}
    return [
        {"name": e.name, "dtype": names[e.dtype], "shape": list(e.shape), "bytes": e.end - e.begin} for e in entries
    ]


def read_tensors(payload: bytes | memoryview) -> TensorFile:
    """Read a whole file.

    Raises:
        HeaderError, TensorTypeError, TensorShapeError, NonFiniteError: see the rules above.
    """
    start, entries, metadata = _read_header(payload)
    raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        data = raw[start + entry.begin : start + entry.end]
        if (start + entry.begin) % entry.dtype.itemsize:  # the header's length decides; writers usually align it
            data = data.clone()
        tensor = data.view(entry.dtype).reshape(entry.shape)
        require_finite(tensor, f"tensor {entry.name!r}")
        tensors[entry.name] = tensor.to(torch.float32)
    return TensorFile(tensors, metadata)


def read_shapes(payload: bytes | memoryview) -> TensorFile:
    """Check a whole file as :func:`read_tensors` does, values included, and return tensors on the ``meta`` device.

    They have shapes and no values: for whoever only has to know whether a file is acceptable, at a quarter of the cost.

    Raises:
        HeaderError, TensorTypeError, TensorShapeError, NonFiniteError: as :func:`read_tensors`.
    """
    start, entries, metadata = _read_header(payload)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        data = payload[start + entry.begin : start + entry.end]
        if not _looks_finite(data, entry.dtype):
            return read_tensors(payload)  # which names the tensor and counts the values
        tensors[entry.name] = torch.empty(entry.shape, dtype=torch.float32, device="meta")
    return TensorFile(tensors, metadata)


def _looks_finite(data: bytes | memoryview, dtype: torch.dtype) -> bool:
    """Return whether no value is NaN or infinite; of the half types by their exponent bits, all set then."""
    if dtype is torch.float32:
        values = np.frombuffer(data, np.dtype("<f4"))
        return bool(np.isfinite(values.min()) and np.isfinite(values.max()))  # NaN is passed on by both
    mask = _EXPONENTS[dtype]
    return not bool(((np.frombuffer(data, np.dtype("<u2")) & mask) == mask).any())


def _read_header(payload: bytes | memoryview) -> tuple[int, list[_Entry], dict[str, str]]:
    if len(payload) < 8:
        raise HeaderError(f"a safetensors file has at least 8 bytes, got {len(payload)}")
    length = int.from_bytes(payload[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"header of {length} bytes announced, at most {MAX_HEADER_BYTES} are allowed")
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
        header = json.loads(
            raw.decode("ascii"),
            object_pairs_hook=no_duplicates,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except UnicodeDecodeError:
        raise HeaderError("the header is not ASCII") from None
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"the header is not JSON: {str(error)[:120]}") from None
    assert isinstance(header, dict)
    return header


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; for ``json.loads(..., object_pairs_hook=...)``, which would let the last of two keys win.

    Raises:
        HeaderError: naming the key that appears twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise HeaderError(f"key {twice[:80]!r} appears twice in the header")
    return found


def _no_number(text: str) -> Any:
    raise HeaderError(f"the header holds {text[:40]!r}; only whole numbers are allowed")


def _metadata(raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict) or len(raw) > 16:
        raise HeaderError("__metadata__ must be an object of at most 16 strings")
    for key, value in raw.items():
        if not isinstance(value, str) or len(key) > 128 or len(value) > MAX_HEADER_BYTES // 2:
            raise HeaderError(f"__metadata__ {key[:80]!r}: expected a string")
    return raw


def _entry(name: str, raw: Any) -> _Entry:
    shown = name[:120]
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor {shown!r}: expected exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
    if dtype is None:
        raise TensorTypeError(f"tensor {shown!r}: expected dtype F32, F16 or BF16, got {str(raw['dtype'])[:40]!r}")
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not _whole_numbers(shape) or not 1 <= len(shape) <= 4 or 0 in shape:
        raise TensorShapeError(f"tensor {shown!r}: expected 1 to 4 positive dimensions, got {str(shape)[:80]}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise HeaderError(f"tensor {shown!r}: expected two data_offsets, got {str(offsets)[:80]}")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise HeaderError(f"tensor {shown!r}: shape {shape} needs {size} bytes, offsets give {offsets[1] - offsets[0]}")
    return _Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
