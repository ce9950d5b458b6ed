"""Lies in the first eight bytes, in the text of the header, and in its metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from share_simulations.fuzz.hostile.files import INNER, Case, changed, entry, honest, inner, pack, text


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
