"""Checking an update without reading it: accepted and refused exactly as by the reader that makes tensors of it."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from share_core.errors import NonFiniteError, PayloadError
from share_core.tensorfile import read_shapes, read_tensors
from share_core.types import Core, Factors, SiteSpec, SiteUpdate, SpaceSpec, Update
from share_core.wire import check_update, decode_update, encode_update

SPEC = SpaceSpec(
    "sha256:test",
    "test",
    {"one": SiteSpec("one", 12, 8, ""), "two": SiteSpec("two", 10, 10, "")},
    k_max=6,
    rank_limit=4,
)


def update(seed: int, rank: int, phi: int) -> Update:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    sites = {
        name: SiteUpdate(
            core=Core(random(3, rank), random(3, rank)) if rank else None,
            residual=Factors(random(site.d_out, phi), random(site.d_in, phi)) if phi else None,
        )
        for name, site in SPEC.sites.items()
    }
    return Update(seed, sites, {"weight": random(2, 3)})


def outcome(reader: object, payload: bytes | memoryview) -> object:
    """Return what a reader makes of a payload: its refusal, or every shape."""
    assert callable(reader)
    try:
        read: Update = reader(payload, SPEC)
    except PayloadError as error:
        return type(error), str(error)
    shapes = {
        site: [tuple(tensor.shape) for part in (own.core, own.residual) if part for tensor in (part.out, part.in_)]
        for site, own in read.sites.items()
    }
    return read.base_version, shapes, {name: tuple(tensor.shape) for name, tensor in read.head.items()}


@given(
    seed=st.integers(0, 99),
    rank=st.integers(0, 5),
    phi=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    flip=st.none() | st.integers(0, 10**6),
    cut=st.integers(0, 3),
)
def test_both_readers_agree(seed: int, rank: int, phi: int, dtype: torch.dtype, flip: int | None, cut: int) -> None:
    """Whatever one bit or a missing end make of a payload, exponents of the tensors included."""
    payload = bytearray(encode_update(update(seed, rank, phi), dtype))
    if flip is not None:
        payload[flip % len(payload)] ^= 1 << flip % 8
    payload = payload[: len(payload) - cut]
    expected = outcome(decode_update, bytes(payload))
    assert outcome(check_update, bytes(payload)) == expected
    assert outcome(check_update, memoryview(payload)) == expected


def tensor_file(dtype: str, data: bytes, pad: int = 0) -> bytes:
    """Return a file of one tensor; ``pad`` blanks move where its data begins."""
    size = {"F32": 4, "F16": 2, "BF16": 2}[dtype]
    header = {"x": {"dtype": dtype, "shape": [len(data) // size], "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + data


EXTREMES = {
    "F32": [struct.pack("<f", value) for value in (math.nan, -math.nan, math.inf, -math.inf)],
    "F16": [struct.pack("<e", value) for value in (math.nan, math.inf, -math.inf)],
    "BF16": [struct.pack("<H", bits) for bits in (0x7FC0, 0x7F81, 0xFF80, 0x7F80)],
}
LARGEST = {"F32": struct.pack("<f", 3.4e38), "F16": struct.pack("<e", 65504.0), "BF16": struct.pack("<H", 0x7F7F)}


@pytest.mark.parametrize(("dtype", "number"), [(dtype, n) for dtype, own in EXTREMES.items() for n in range(len(own))])
@pytest.mark.parametrize("place", [0, 7, 16])
@pytest.mark.parametrize("pad", [0, 1, 2])
def test_what_is_not_finite_is_found_wherever_it_stands(dtype: str, number: int, place: int, pad: int) -> None:
    values = [LARGEST[dtype]] * 17
    for reader in (read_shapes, read_tensors):
        assert tuple(reader(tensor_file(dtype, b"".join(values), pad)).tensors["x"].shape) == (17,)
    values[place] = EXTREMES[dtype][number]
    for reader in (read_shapes, read_tensors):
        with pytest.raises(NonFiniteError, match="'x' holds 1 values"):
            reader(tensor_file(dtype, b"".join(values), pad))


@pytest.mark.parametrize("pad", range(8))
def test_values_do_not_depend_on_where_they_begin(pad: int) -> None:
    """Tensors are views where the place allows it, and copies where it does not."""
    data = struct.pack("<3f", 1.0, -2.5, 1e-30)
    assert read_tensors(tensor_file("F32", data, pad)).tensors["x"].tolist() == pytest.approx([1.0, -2.5, 1e-30])
