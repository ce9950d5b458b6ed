"""The corpus of hostile files: each one is an acceptable update with one lie in it.

``python tests/attacks/make.py`` writes ``files/NAME.safetensors`` and ``expected.json``: by name the error class and
words of its sentence. Files with an empty class are honest edges that must be accepted, so that nobody makes the reader
stricter than it says. Larger ones are made at test time by :func:`large` and :func:`huge`. Nothing here uses the code
under test or the library.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
SITES = {"q": (12, 10), "v": (8, 14)}
"""Shapes of the two sites of the space that the files are for; its rank limit is :data:`RANK_LIMIT`."""
RANK_LIMIT = 6

Header = dict[str, Any]


class Case(NamedTuple):
    """One file."""

    name: str
    data: bytes
    error: str
    """Class that it is refused with; empty: it is accepted."""
    words: str
    """Part of the sentence."""


SHAPES = {"E_o/q": [4, 2], "E_i/q": [5, 2], "B/v": [8, 3], "A/v": [3, 14], "head/weight": [3, 4], "head/bias": [3]}
"""Tensors of the honest update: one of every class."""
INNER = {"base_version": 3, "format": "fedshare/update/1"}
SIZES = {"F32": 4, "F16": 2, "BF16": 2}


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


def lengths() -> Iterator[Case]:
    """Lies about the first eight bytes."""
    header, data = honest()
    whole = pack(header, data)
    size = len(pack(header)) - 8

    def lie(name: str, raw: bytes, words: str) -> Case:
        return Case(f"length-{name}", raw, "HeaderError", words)

    yield lie("empty-file", b"", "at least 8 bytes")
    yield lie("one-byte", b"\x02", "at least 8 bytes")
    yield lie("seven-bytes", whole[:7], "at least 8 bytes")
    yield lie("zero", bytes(8), "does not start")
    yield lie("one", pack(header, data, 1), "not JSON")
    yield lie("one-short", pack(header, data, size - 1), "not JSON")
    yield lie("one-long", pack(header, b"x" + data, size + 1), "not JSON")
    yield lie("past-the-end", pack(b"{}", length=999), "cut short")
    yield lie("past-the-end-by-one", pack(b"{}", length=3), "cut short")
    yield lie("all-of-the-file", pack(b"{}", length=10), "cut short")
    yield lie("big-endian", size.to_bytes(8, "big") + whole[8:], "at most")
    for power in (32, 53, 62, 63):
        yield lie(f"two-to-the-{power}", pack(header, data, 1 << power), "at most")
    yield lie("largest", pack(header, data, (1 << 64) - 1), "at most")
    yield lie("minus-one-in-32-bits", pack(header, data, (1 << 32) - 1), "at most")
    yield lie("over-the-limit-by-one", pack(header, data, (1 << 20) + 1), "at most")


def encodings() -> Iterator[Case]:
    """Headers that are not ASCII, or do not begin as they should."""
    header, data = honest()
    raw = json.dumps(header)

    def lie(name: str, head: bytes, words: str) -> Case:
        return Case(f"encoding-{name}", pack(head, data), "HeaderError", words)

    yield lie("utf8-name", raw.replace("head/bias", "head/é").encode(), "not ASCII")
    yield lie("latin1-name", raw.replace("head/bias", "head/é").encode("latin-1"), "not ASCII")
    yield lie("byte-ff", raw.encode().replace(b"head/bias", b"head/\xff"), "not ASCII")
    yield lie("overlong-slash", raw.encode().replace(b"head/bias", b"head\xc0\xafbias"), "not ASCII")
    yield lie("byte-80-at-the-end", raw.encode() + b"\x80", "not ASCII")
    yield lie("bom", b"\xef\xbb\xbf" + raw.encode(), "does not start")
    yield lie("utf16", raw.encode("utf-16"), "does not start")
    yield lie("utf16-without-bom", raw.encode("utf-16-le"), "not JSON")
    yield lie("utf32", raw.encode("utf-32"), "does not start")
    yield lie("nul-first", b"\0" + raw.encode(), "does not start")
    yield lie("blank-first", b" " + raw.encode(), "does not start")
    yield lie("newline-first", b"\n" + raw.encode(), "does not start")
    yield lie("nul-last", raw.encode() + b"\0", "not JSON")
    for name, escaped in (
        ("e-acute", "\\u00e9"),
        ("lone-surrogate", "\\ud800"),
        ("nul", "\\u0000"),
        ("newline", "\\n"),
        ("delete", "\\u007f"),
        ("right-to-left", "\\u202e"),
    ):
        made = text('"head/bias"', f'"head/{escaped}"')
        yield Case(f"encoding-escaped-{name}", made, "TensorNameError", "printable ASCII")


def jsons() -> Iterator[Case]:
    """Text that is not JSON, or not the JSON that is meant."""
    header, data = honest()
    raw = json.dumps(header, separators=(",", ":"))

    def lie(name: str, head: str, words: str) -> Case:
        return Case(f"json-{name}", pack(head.encode(), data), "HeaderError", words)

    for name, head in (("array", "[]"), ("string", '"x"'), ("number", "5"), ("null", "null"), ("true", "true")):
        yield lie(name, head, "does not start")
    yield lie("brace-only", "{", "not JSON")
    yield lie("cut", raw[:-2], "not JSON")
    yield lie("trailing-comma", raw[:-1] + ",}", "not JSON")
    yield lie("trailing-brace", raw + "}", "not JSON")
    yield lie("two-objects", raw + "{}", "not JSON")
    yield lie("single-quotes", raw.replace('"', "'"), "not JSON")
    yield lie("comment", raw.replace("{", "{/* */", 1), "not JSON")
    yield lie("bare-key", raw.replace('"E_o/q"', "E_o"), "not JSON")
    yield lie("tab-in-a-name", raw.replace("E_o/q", "E_o\tq"), "not JSON")
    yield lie("bad-escape", raw.replace("E_o/q", "E_o\\x2fq"), "not JSON")
    yield lie("half-escape", raw.replace("E_o/q", "E_o\\u00"), "not JSON")
    for name, number in (("nan", "NaN"), ("infinity", "Infinity"), ("minus-infinity", "-Infinity")):
        yield lie(f"constant-{name}", raw.replace('"shape":[4', f'"shape":[{number}'), "whole numbers")
    for name, number in (("half", "4.5"), ("whole-float", "4.0"), ("exponent", "4e0"), ("huge-exponent", "1e999")):
        yield lie(f"float-{name}", raw.replace('"shape":[4', f'"shape":[{number}'), "whole numbers")
    yield lie("minus-zero-offset", raw.replace('"data_offsets":[0', '"data_offsets":[-0'), "whole numbers")
    yield lie("minus-zero-shape", raw.replace('"shape":[4', '"shape":[-0'), "whole numbers")
    yield lie("leading-zero", raw.replace('"shape":[4', '"shape":[04'), "not JSON")
    yield lie("hexadecimal", raw.replace('"shape":[4', '"shape":[0x4'), "not JSON")
    yield lie("plus", raw.replace('"shape":[4', '"shape":[+4'), "not JSON")
    yield lie("number-of-5000-digits", raw.replace('"shape":[4', '"shape":[' + "4" * 5000), "not JSON")
    yield lie("tensor-twice", raw.replace('"E_i/q":', '"E_o/q":'), "twice")
    yield lie("tensor-twice-by-escape", raw.replace('"E_i/q":', '"E_o\\/q":'), "twice")
    yield lie("tensor-twice-by-unicode", raw.replace('"E_i/q":', '"E\\u005fo/q":'), "twice")
    yield lie("dtype-twice", raw.replace('"dtype":"F32"', '"dtype":"F32","dtype":"F32"', 1), "twice")
    yield lie("shape-twice", raw.replace('"shape":[4,2]', '"shape":[4,2],"shape":[4,2]'), "twice")
    yield lie(
        "offsets-twice", raw.replace('"data_offsets":[0,32]', '"data_offsets":[0,32],"data_offsets":[0,32]'), "twice"
    )
    yield lie("metadata-twice", raw.replace('"E_o/q":', '"__metadata__":{},"E_o/q":'), "twice")
    yield lie("metadata-key-twice", raw.replace('{"fedshare":', '{"fedshare":"","fedshare":'), "twice")
    yield lie("arrays-2000-deep", '{"a":' + "[" * 2000 + "]" * 2000 + "}", "nested too deeply")
    yield lie("objects-2000-deep", '{"a":' * 2000 + "1" + "}" * 2000, "nested too deeply")


def entries() -> Iterator[Case]:
    """Entries that hold something else than exactly their three fields."""
    for field in ("dtype", "shape", "data_offsets"):
        made = changed(lambda header, field=field: header["E_o/q"].pop(field))  # type: ignore[misc]
        yield Case(f"entry-without-{field}", made, "HeaderError", "exactly dtype")
    yield Case("entry-with-more", entry("E_o/q", extra=1), "HeaderError", "exactly dtype")
    yield Case("entry-with-strides", entry("E_o/q", strides=[2, 1]), "HeaderError", "exactly dtype")
    for name, item in (("null", None), ("list", []), ("string", "F32"), ("number", 5), ("true", True), ("empty", {})):
        made = changed(lambda header, item=item: header.update({"E_o/q": item}))  # type: ignore[misc]
        yield Case(f"entry-{name}", made, "HeaderError", "exactly dtype")


def dtypes() -> Iterator[Case]:
    """Types that are not allowed, or no types."""
    for name in ("F64", "F8_E4M3", "F8_E5M2", "F4", "I64", "I32", "I16", "I8", "U64", "U8", "BOOL", "C64"):
        yield Case(f"dtype-{name}", entry("E_o/q", dtype=name), "TensorTypeError", "F32, F16 or BF16")
    odd = {"lower-case": "f32", "blank": "F32 ", "empty": "", "null": None, "number": 5, "true": True}
    for name, item in {**odd, "list": ["F32"], "object": {"F32": 1}, "long": "F32" * 99}.items():
        yield Case(f"dtype-{name}", entry("E_o/q", dtype=item), "TensorTypeError", "F32, F16 or BF16")
    # Eight values of eight bytes: everything fits but the type.
    header, data = honest()
    header["E_o/q"].update(dtype="F64", shape=[2, 2])
    yield Case("dtype-F64-that-fits", pack(header, data), "TensorTypeError", "F32, F16 or BF16")


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


def metadata() -> Iterator[Case]:
    """Lies in the metadata."""
    kinds: dict[str, Any] = {"null": None, "list": [], "string": "x", "number": 5, "true": True}
    for name, item in kinds.items():
        made = changed(lambda header, item=item: header.update(__metadata__=item))  # type: ignore[misc]
        yield Case(f"metadata-{name}", made, "HeaderError", "at most 16 strings")
    many = changed(lambda header: header["__metadata__"].update({f"k{n}": "" for n in range(16)}))
    yield Case("metadata-seventeen-entries", many, "HeaderError", "at most 16 strings")
    odd: dict[str, Any] = {"null": None, "number": 5, "list": [], "object": {}, "true": True}
    for name, item in odd.items():
        made = changed(lambda header, item=item: header["__metadata__"].update(x=item))  # type: ignore[misc]
        yield Case(f"metadata-value-{name}", made, "HeaderError", "expected a string")
    long = changed(lambda header: header["__metadata__"].update({"x" * 129: ""}))
    yield Case("metadata-long-key", long, "HeaderError", "expected a string")
    for name, (key, item) in {"key": ("é", ""), "value": ("x", "é"), "surrogate": ("x", "\ud800")}.items():
        made = changed(lambda header, key=key, item=item: header["__metadata__"].update({key: item}))  # type: ignore[misc]
        yield Case(f"metadata-not-ascii-{name}", made, "HeaderError", "is not ASCII")
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    made = changed(lambda header: header.update(__metadata__=tensor))
    yield Case("metadata-a-tensor", made, "HeaderError", "expected a string")


def inners() -> Iterator[Case]:
    """Lies in the JSON inside of the metadata."""
    good = '"format": "fedshare/update/1"'
    missing = changed(lambda header: header.pop("__metadata__"))
    yield Case("inner-missing", missing, "HeaderError", "fedshare/update/1")
    for name, raw in {
        "empty": "",
        "open": "{",
        "trailing": "{}x",
        "number-too-long": '{"a": ' + "1" * 5000 + "}",
    }.items():
        yield Case(f"inner-{name}", inner(raw), "HeaderError", "not JSON")
    for name, raw in {"list": "[]", "number": "5", "null": "null", "string": '"x"'}.items():
        yield Case(f"inner-{name}", inner(raw), "HeaderError", "not a JSON object")
    yield Case("inner-nested-17", inner('{"a": ' + "[" * 16 + "]" * 16 + "}"), "HeaderError", "nested too deeply")
    yield Case("inner-nested", inner('{"format": ' + "[" * 2000 + "]" * 2000 + "}"), "HeaderError", "nested too deeply")
    for name, more in {"list": "[[]]", "table": "{}", "deep": "[" * 12 + "]" * 12}.items():
        raw = "{" + good + ', "base_version": 3, "more": ' + more + "}"
        yield Case(f"inner-more-{name}", inner(raw), "HeaderError", "expected a plain value")
    yield Case("inner-twice", inner("{" + good + ', "base_version": 1, "base_version": 2}'), "HeaderError", "twice")
    yield Case("inner-nan", inner("{" + good + ', "base_version": NaN}'), "HeaderError", "whole numbers")
    yield Case("inner-float", inner("{" + good + ', "base_version": 3.0}'), "HeaderError", "whole numbers")
    yield Case("inner-minus-zero", inner("{" + good + ', "base_version": -0}'), "HeaderError", "whole numbers")
    for name, item in {"null": None, "true": True, "string": "3", "list": [3], "negative": -1, "huge": 1 << 62}.items():
        raw = json.dumps({**INNER, "base_version": item})
        yield Case(f"inner-base-{name}", inner(raw), "HeaderError", "'base_version': expected a whole number")
    yield Case("inner-base-missing", inner("{" + good + "}"), "HeaderError", "'base_version': expected a whole number")
    odd: dict[str, Any] = {
        "delta": "fedshare/delta/1",
        "next": "fedshare/update/2",
        "null": None,
        "list": [],
        "number": 1,
    }
    for name, item in {**odd, "long": "x" * 5000}.items():
        raw = json.dumps({**INNER, "format": item})
        yield Case(f"inner-format-{name}", inner(raw), "HeaderError", "expected a payload of format")


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


def edges() -> Iterator[Case]:
    """Honest files at the edge of what is allowed."""

    def fine(name: str, data: bytes) -> Case:
        return Case(f"fine-{name}", data, "", "")

    header, data = honest()
    yield fine("plain", pack(header, data))
    yield fine("blanks-behind", pack(json.dumps(header).encode() + b" " * 7, data))
    yield fine("other-whitespace", pack(json.dumps(header, indent=1).encode() + b"\n\t\r ", data))
    yield fine("other-order", pack(dict(reversed(header.items())), data))
    yield fine("half", pack(*honest(dtype="F16")))
    yield fine("brain-half", pack(*honest(dtype="BF16")))
    yield fine("no-tensors", pack(*honest({})))
    yield fine("heads-only", pack(*honest({"head/x": [2, 3, 1, 2]})))
    yield fine("head-with-slashes", pack(*honest({"head/a/b.c": [1]})))
    yield fine("name-of-320-characters", pack(*honest({"head/" + "x" * 315: [1]})))
    yield fine("sixteen-metadata", changed(lambda h: h["__metadata__"].update({f"k{n}": "" for n in range(15)})))
    yield fine("base-just-below", inner(json.dumps({**INNER, "base_version": (1 << 62) - 1})))
    yield fine("inner-has-more", inner(json.dumps({**INNER, "note": ["x", 1, None]})))
    yield fine("full-rank", with_shapes(E_o__q=[4, 6], E_i__q=[5, 6], B__v=[8, 6], A__v=[6, 14]))
    yield fine("escaped-name", text('"E_o/q"', '"E\\u005fo\\/q"'))
    for name, pattern in {
        "denormal": 1,
        "minus-zero": 1 << 31,
        "smallest": 0x00800000,
        "largest-norm": 0x5C800000,
    }.items():
        header, data = honest()
        data[:] = struct.pack("<I", pattern) * (len(data) // 4)
        yield fine(f"all-{name}", pack(header, data))
    for name, patterns in {"F16-largest": 0x7BFF, "F16-denormal": 1}.items():
        header, data = honest(dtype="F16")
        data[:] = struct.pack("<H", patterns) * (len(data) // 2)
        yield fine(name, pack(header, data))


def corpus() -> list[Case]:
    """Return every small file."""
    groups = (
        lengths,
        encodings,
        jsons,
        entries,
        dtypes,
        shapes,
        fits,
        offsets,
        ends,
        metadata,
        inners,
        names,
        values,
        edges,
    )
    cases = [case for group in groups for case in group()]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def large() -> Iterator[Case]:
    """Files that are a little too large to keep."""
    header, data = honest()
    raw = json.dumps(header).encode()
    yield Case("big-header-over-the-limit", pack(raw + b" " * (1 << 17), data), "HeaderError", "at most")
    keys = b",".join(b'"%05d":1' % n for n in range(6_000))
    yield Case("big-last-key-twice", pack(b"{" + keys + b',"05999":1}'), "HeaderError", "twice")
    yield Case("big-empty-objects", pack(b'{"a":[' + b"{}," * 15_000 + b"{}]}"), "HeaderError", "exactly dtype")


def huge() -> Iterator[Case]:
    """Files that take a while to make."""
    yield Case("big-header-of-100-megabytes", pack(b"{" + b" " * (100 << 20), b""), "HeaderError", "at most")
    yield Case("big-nesting", pack(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "HeaderError", "at most")
    many = (
        b'"head/%d":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}' % (n, 4 * n, 4 * n + 4) for n in range(100_000)
    )
    tensors = pack(b"{" + b",".join(many) + b"}", bytes(400_000))
    yield Case("big-hundred-thousand-tensors", tensors, "HeaderError", "at most")


def main() -> None:
    """Write everything."""
    folder = HERE / "files"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    cases = corpus()
    for case in cases:
        (folder / f"{case.name}.safetensors").write_bytes(case.data)
    table = {case.name: [case.error, case.words] for case in cases}
    (HERE / "expected.json").write_text(json.dumps(table, indent=1, ensure_ascii=True) + "\n")
    print(f"{len(cases)} files, {sum(len(case.data) for case in cases)} bytes")


if __name__ == "__main__":
    main()
