"""Honest files at the edge of what is allowed, and hostile ones that are too large to keep."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

from share_simulations.fuzz.hostile.files import INNER, Case, changed, honest, inner, pack, text, with_shapes


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
