"""Lies about tensors: shapes, ranks, places, names, and values that a merge cannot use."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from share_simulations.fuzz.hostile.files import Case, changed, entry, honest, pack, with_shapes


def shapes() -> Iterator[Case]:
    """Shapes that are none, or of no tensor."""
    dimensions = "positive dimensions"
    odd: dict[str, Any] = {
        "null": None,
        "number": 8,
        "string": "4,2",
        "object": {"0": 4},
        "bools": [True, True],
        "strings": ["4", "2"],
        "nulls": [None, None],
        "nested": [[4, 2]],
        "none": [],
        "zero-rows": [0, 2],
        "zero-columns": [4, 0],
        "huge-by-zero": [1 << 61, 0],
        "two-to-the-62-by-zero": [1 << 62, 0],
        "two-to-the-62": [1 << 62, 1],
        "two-to-the-64": [1 << 64, 1],
        "negative": [-4, 2],
        "both-negative": [-4, -2],
        "five-dimensions": [2, 1, 2, 1, 2],
        "hundred-dimensions": [1] * 100,
        "five-thousand-dimensions": [1] * 5000,
    }
    for name, shape in odd.items():
        yield Case(f"shape-{name}", entry("E_o/q", shape=shape), "TensorShapeError", dimensions)
    for name, shape in {
        "too-large": [1 << 40, 1 << 20],
        "wraps-in-64-bits": [1 << 32, 1 << 30],
        "wraps-to-the-size": [(1 << 61) + 1, 8],
        "one-row-more": [5, 2],
        "one-row-less": [3, 2],
    }.items():
        yield Case(f"shape-{name}", entry("E_o/q", shape=shape), "HeaderError", "offsets give")
    yield Case("shape-core-a-vector", entry("E_o/q", shape=[8]), "TensorShapeError", "expected a matrix")
    yield Case("shape-core-a-cube", entry("E_o/q", shape=[2, 2, 2]), "TensorShapeError", "expected a matrix")
    yield Case("shape-inner-core-a-vector", entry("E_i/q", shape=[10]), "TensorShapeError", "expected a matrix")
    yield Case("shape-B-a-vector", entry("B/v", shape=[24]), "TensorShapeError", "expected a matrix")
    yield Case("shape-A-a-cube", entry("A/v", shape=[3, 7, 2]), "TensorShapeError", "expected a matrix")
    yield Case(
        "shape-head-of-five-dimensions", entry("head/weight", shape=[3, 1, 2, 1, 2]), "TensorShapeError", dimensions
    )


def fits() -> Iterator[Case]:
    """Matrices that do not fit each other or the space."""
    yield Case("pair-core-without-in", with_shapes(E_i__q=None), "TensorNameError", "E_i/q' is missing")
    yield Case("pair-core-without-out", with_shapes(E_o__q=None), "TensorNameError", "E_o/q' is missing")
    yield Case("pair-factors-without-A", with_shapes(A__v=None), "TensorNameError", "A/v' is missing")
    yield Case("pair-factors-without-B", with_shapes(B__v=None), "TensorNameError", "B/v' is missing")
    yield Case("rank-core-differs", with_shapes(E_o__q=[4, 3]), "TensorShapeError", "E_o has 3 columns, E_i 2")
    yield Case("rank-factors-differ", with_shapes(B__v=[8, 2]), "TensorShapeError", "expected B 8 x r")
    yield Case("rows-of-B", with_shapes(B__v=[9, 3]), "TensorShapeError", "expected B 8 x r")
    yield Case("columns-of-A", with_shapes(A__v=[3, 13]), "TensorShapeError", "A r x 14")
    yield Case("B-and-A-swapped", with_shapes(B__v=[3, 14], A__v=[8, 3]), "TensorShapeError", "expected B 8 x r")
    yield Case("rank-bomb-core", with_shapes(E_o__q=[4, 7], E_i__q=[5, 7]), "TensorShapeError", "at most 6, got 7")
    yield Case("rank-bomb-factors", with_shapes(B__v=[8, 7], A__v=[7, 14]), "TensorShapeError", "at most 6, got 7")
    together = with_shapes(E_o__v=[4, 4], E_i__v=[5, 4])
    yield Case("rank-bomb-together", together, "TensorShapeError", "at most 6, got 7")
    yield Case("rank-bomb-of-1000", with_shapes(E_o__q=[1, 1000], E_i__q=[1, 1000]), "TensorShapeError", "got 1000")


def offsets() -> Iterator[Case]:
    """Data that is elsewhere than it should be."""
    odd: dict[str, Any] = {
        "null": None,
        "number": 0,
        "string": "0,32",
        "none": [],
        "one": [32],
        "three": [0, 32, 32],
        "bools": [False, True],
        "strings": ["0", "32"],
        "nulls": [None, None],
        "negative-begin": [-32, 0],
        "both-negative": [-64, -32],
        "two-to-the-62": [0, 1 << 62],
        "two-to-the-64": [(1 << 64) - 32, 1 << 64],
    }
    for name, item in odd.items():
        yield Case(f"offsets-{name}", entry("E_o/q", data_offsets=item), "HeaderError", "two data_offsets")
    for name, item in {"reversed": [32, 0], "empty": [0, 0], "short": [0, 28], "long": [0, 36]}.items():
        yield Case(f"offsets-{name}", entry("E_o/q", data_offsets=item), "HeaderError", "offsets give")
    yield Case(
        "offsets-shared", entry("E_i/q", shape=[4, 2], data_offsets=[0, 32]), "HeaderError", "at offset 32, got 0"
    )
    yield Case("offsets-overlap", entry("E_i/q", data_offsets=[28, 68]), "HeaderError", "at offset 32, got 28")
    yield Case("offsets-gap", entry("E_i/q", data_offsets=[36, 76]), "HeaderError", "at offset 32, got 36")
    yield Case(
        "offsets-gap-at-the-beginning", entry("E_o/q", data_offsets=[4, 36]), "HeaderError", "at offset 0, got 4"
    )
    yield Case(
        "offsets-far-beyond", entry("head/bias", data_offsets=[1 << 40, (1 << 40) + 12]), "HeaderError", "at offset"
    )
    yield Case("offsets-inside-another", entry("head/bias", data_offsets=[4, 16]), "HeaderError", "at offset")
    header, data = honest()
    for entry_ in list(header.values())[1:]:
        entry_["data_offsets"] = [n + 8 for n in entry_["data_offsets"]]
    yield Case("offsets-all-moved", pack(header, bytes(8) + data), "HeaderError", "at offset 0, got 8")


def ends() -> Iterator[Case]:
    """Files that are too long or too short."""
    header, data = honest()
    whole = pack(header, data)
    for name, raw in {
        "one-byte-more": whole + b"\0",
        "four-bytes-more": whole + bytes(4),
        "twice": whole + whole,
        "a-program-behind": whole + b"\x7fELF" + bytes(60),
        "one-byte-less": whole[:-1],
        "a-value-less": whole[:-4],
        "header-only": pack(header),
    }.items():
        yield Case(f"end-{name}", raw, "HeaderError", "expected a file of")
    yield Case("end-in-the-header", whole[:40], "HeaderError", "cut short")
    yield Case("end-without-header", whole[:8], "HeaderError", "cut short")


def names() -> Iterator[Case]:
    """Tensors that do not belong into an update."""

    def renamed(name: str, to: str, words: str) -> Case:
        made = changed(lambda header: header.update({to: header.pop("head/bias")}))
        return Case(f"name-{name}", made, "TensorNameError", words)

    for name, to in {
        "unknown-part": "evil/q",
        "no-slash": "weight",
        "no-owner": "E_o/",
        "no-part": "/q",
        "slash-only": "/",
        "part-of-a-delta": "Q_o/q",
        "part-of-a-snapshot": "L/q",
        "lower-case-part": "e_o/q",
        "blank-before-part": " head/q",
        "part-with-a-dot": "head./q",
        "backslash": "head\\q",
        "head-without-name": "head/",
    }.items():
        yield renamed(name, to, "does not belong")
    for name, to in {
        "unknown-site": "E_o/nope",
        "upper-case-site": "E_o/Q",
        "site-with-blank": "B/v ",
        "path": "E_o/../../etc/passwd",
        "absolute-path": "B//etc/passwd",
        "task-and-site": "E_o/org/task/q",
        "percent": "E_o/%71",
    }.items():
        yield renamed(name, to, "has no site")
    yield renamed("empty", "", "printable ASCII")
    yield renamed("of-321-characters", "head/" + "x" * 316, "printable ASCII")


def values() -> Iterator[Case]:
    """Values that a merge cannot use, at the first, a middle and the last place of every kind of tensor."""
    bits = {"nan": 0x7FC00000, "quiet-negative-nan": 0xFFC00000, "signalling-nan": 0x7F800001}
    bits |= {"infinity": 0x7F800000, "minus-infinity": 0xFF800000}
    places = {"first": 0, "middle": 2, "last": -1}
    for tensor in ("E_o/q", "E_i/q", "B/v", "A/v", "head/weight", "head/bias"):
        kind = tensor.replace("/", "-")
        for number, (name, pattern) in enumerate(bits.items()):
            header, data = honest()
            begin, end = header[tensor]["data_offsets"]
            place = list(places.values())[number % 3]
            at = (end if place < 0 else begin) + 4 * place
            data[at : at + 4] = struct.pack("<I", pattern)
            yield Case(f"value-{name}-in-{kind}", pack(header, data), "NonFiniteError", f"{tensor!r} holds 1 values")
        for name, number_ in {"one-huge-value": 1.0e19, "largest-value": -3.4028234e38}.items():
            header, data = honest()
            begin = header[tensor]["data_offsets"][0] + 4
            data[begin : begin + 4] = struct.pack("<f", number_)
            yield Case(f"value-{name}-in-{kind}", pack(header, data), "NonFiniteError", f"{tensor!r} has norm")
        header, data = honest()
        begin, end = header[tensor]["data_offsets"]
        data[begin:end] = struct.pack("<f", 6.0e18) * ((end - begin) // 4)  # each is allowed, not all together
        yield Case(f"value-huge-norm-in-{kind}", pack(header, data), "NonFiniteError", f"{tensor!r} has norm")
    for dtype, patterns in {"F16": (0x7C00, 0xFC00, 0x7C01), "BF16": (0x7F80, 0xFF80, 0x7F81)}.items():
        for name, pattern in zip(("infinity", "minus-infinity", "nan"), patterns, strict=True):
            header, data = honest(dtype=dtype)
            data[-2:] = struct.pack("<H", pattern)
            yield Case(f"value-{dtype}-{name}", pack(header, data), "NonFiniteError", "'head/bias' holds 1 values")
    header, data = honest(dtype="BF16")
    data[:2] = struct.pack("<H", 0x7F7F)
    yield Case("value-BF16-largest", pack(header, data), "NonFiniteError", "'E_o/q' has norm")
    header, data = honest()
    data[:] = struct.pack("<I", 0x7FC00000) * (len(data) // 4)
    yield Case("value-nan-everywhere", pack(header, data), "NonFiniteError", "'E_o/q' holds 8 values")
