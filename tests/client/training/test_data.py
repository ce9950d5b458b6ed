"""Readers of private data: what they return, and that errors name file and row."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from share_client.data import content_hash, read_images, read_table
from share_client.kinds.text_classification import FIELDS
from share_core.errors import ConfigError


def test_images_are_scaled_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.full((3, 8, 8), 255, np.uint8), y=np.array([2, 0, 1]))
    rows = read_images(path, rows=2)
    assert rows.x.shape == (2, 8, 8, 1)
    assert torch.equal(rows.x, torch.ones_like(rows.x))
    assert rows.labels == (2, 0)


def _holed() -> NDArray[np.float64]:
    x = np.zeros((4, 8, 8))
    x[2, 3, 3] = np.nan
    return x


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((2, 8, 8))}, "expected arrays x and y, got x"),
        ({"x": np.zeros((2, 8)), "y": np.zeros(2, int)}, r"expected shape \(n, h, w\)"),
        ({"x": np.zeros((0, 8, 8)), "y": np.zeros(0, int)}, "expected shape"),
        ({"x": np.zeros((2, 8, 8)), "y": np.zeros(3, int)}, r"y: expected shape \(2,\)"),
        ({"x": np.zeros((2, 8, 8)), "y": np.zeros(2)}, "integer labels, got dtype float64"),
        ({"x": np.full((2, 8, 8), "a"), "y": np.zeros(2, int)}, "integer or float pixels"),
        ({"x": _holed(), "y": np.zeros(4, int)}, "row 2: x holds NaN"),
        ({"x": np.array([{}, {}]), "y": np.zeros(2, int)}, "cannot read images"),
    ],
)
def test_bad_images_are_named(tmp_path: Path, arrays: dict[str, object], words: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=words) as caught:
        read_images(path)
    assert str(path) in str(caught.value)


def test_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(b"not an archive")
    with pytest.raises(ConfigError, match="cannot read images"):
        read_images(path)


@pytest.mark.parametrize(
    ("of", "place", "byte"),
    [
        ("data", 0, 0x07),  # a block of a kind that there is not: zlib.error
        ("entry", 8, 0x01),  # encrypted: RuntimeError
        ("entry", 10, 0x63),  # a compression that Python does not know: NotImplementedError
    ],
)
def test_an_archive_with_one_broken_byte_is_named(tmp_path: Path, of: str, place: int, byte: int) -> None:
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).random((2, 8, 8)), y=np.arange(2))
    data = bytearray(path.read_bytes())
    extra = int.from_bytes(data[28:30], "little")
    begins = {"data": 30 + len("x.npy") + extra, "entry": data.index(b"PK\x01\x02")}
    data[begins[of] + place] = byte
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"bad\.npz: cannot read images: .*; save the archive anew"):
        read_images(path)


def test_text_plain_and_gzip_read_alike(tmp_path: Path) -> None:
    lines = '{"text": "a", "text_b": "x", "label": 1}\n\n{"text": "b", "text_b": "y", "label": 0}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    plain, packed = (read_table(tmp_path / name, FIELDS, {}) for name in ("a.jsonl", "a.jsonl.gz"))
    assert plain.columns == packed.columns
    assert plain.columns == {"text": ("a", "b"), "text_b": ("x", "y"), "label": (1, 0)}
    assert read_table(tmp_path / "a.jsonl", FIELDS, {}, rows=1).columns["text"] == ("a",)


GOOD = '{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "at least one row"),
        (GOOD + "{", "line 2: expected one JSON object"),
        (GOOD + "[1]", "line 2: expected a JSON object.* got list"),
        (GOOD + '{"text": "a"}', "line 2: key 'label' is missing; got text among 1 key"),
        (GOOD + '{"text": 3, "label": 1}', "line 2: text: expected a string, got int"),
        (GOOD + '{"text": "a", "label": 1.5}', r"line 2: label: expected an integer or a string, got float"),
        (GOOD + '{"text": "a", "label": true}', "line 2: label"),
        (GOOD + '{"text": "a", "label": "x"}', "line 2: label: expected int as in the first row"),
        (GOOD + '{"text": "a", "text_b": "b", "label": 1}', "line 2: text_b: expected it in all rows"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, lines: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(ConfigError, match=words) as caught:
        read_table(path, FIELDS, {})
    assert str(path) in str(caught.value)


def test_broken_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD.encode())[:-6])
    with pytest.raises(ConfigError, match="cannot read text"):
        read_table(path, FIELDS, {})


def test_hash_follows_content_and_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"1")
    b.write_bytes(b"2")
    before = content_hash(a, b)
    assert before == content_hash(a, b)
    assert before != content_hash(b, a)
    b.write_bytes(b"3")
    assert before != content_hash(a, b)
