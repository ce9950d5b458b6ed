"""Payloads: round trips, equal bytes for equal content, and one test per lie a file can tell."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from share_core import wire
from share_core.errors import (
    FedshareError,
    HeaderError,
    NonFiniteError,
    PayloadError,
    TaskNameError,
    TensorNameError,
    TensorShapeError,
    TensorTypeError,
)
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import advance, empty_space
from share_core.types import Core, Factors, SharedHead, SiteSpec, SiteUpdate, SpaceSpec, Update

SPEC = SpaceSpec(
    "sha256:test",
    "test",
    {"q": SiteSpec("q", 12, 10, "0" * 64), "v": SiteSpec("v", 8, 14, "0" * 64)},
    rank_limit=6,
)


def update(seed: int = 0, base_version: int = 3) -> Update:
    g = torch.Generator().manual_seed(seed)
    return Update(
        base_version,
        {
            "q": SiteUpdate(Core(torch.randn(4, 2, generator=g), torch.randn(5, 2, generator=g))),
            "v": SiteUpdate(None, Factors(torch.randn(8, 3, generator=g), torch.randn(14, 3, generator=g))),
        },
        {"weight": torch.randn(3, 4, generator=g), "bias": torch.randn(3, generator=g)},
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), base=st.integers(0, 2**40))
def test_update_round_trip_and_equal_bytes(seed: int, base: int) -> None:
    first = update(seed, base)
    payload = wire.encode_update(first)
    again = wire.decode_update(payload, SPEC)
    assert again.base_version == base
    assert wire.encode_update(again) == payload
    core = again.sites["q"].core
    assert core is not None
    assert torch.equal(core.out, first.sites["q"].core.out)  # type: ignore[union-attr]
    residual = again.sites["v"].residual
    assert residual is not None
    assert torch.equal(residual.in_, first.sites["v"].residual.in_)  # type: ignore[union-attr]
    assert torch.equal(again.head["bias"], first.head["bias"])


def test_update_in_bfloat16_is_half_the_tensor_bytes_and_reads_as_float32() -> None:
    full, half = wire.encode_update(update()), wire.encode_update(update(), torch.bfloat16)
    split, split_half = wire.payload_bytes(full), wire.payload_bytes(half)
    assert split.coefficients == 2 * split_half.coefficients
    core = wire.decode_update(half, SPEC).sites["q"].core
    assert core is not None
    assert core.out.dtype == torch.float32


def test_payload_bytes_count_every_byte_once() -> None:
    payload = wire.encode_update(update())
    split = wire.payload_bytes(payload)
    assert split.coefficients == 4 * 2 * (4 + 5)
    assert split.directions == 4 * 3 * (8 + 14)
    assert split.heads == 4 * (12 + 3)
    assert split.coefficients + split.directions + split.heads + split.envelope == len(payload)


def test_deltas_and_snapshots_round_trip_through_bytes() -> None:
    state, space = empty_state(SPEC), empty_space(SPEC)
    g = torch.Generator().manual_seed(0)
    compacted = False
    for task in range(6):
        adapter = {"q": Factors(torch.randn(12, 3, generator=g), torch.randn(10, 3, generator=g))}
        merged = merge(state, f"org/t{task}", {} if task == 2 else adapter, MergePolicy(k_max=7, tau=0.0))
        state = merged.state
        compacted = compacted or merged.delta.compacts
        payload = wire.encode_delta(merged.delta)
        delta = wire.decode_delta(payload, SPEC)
        assert wire.encode_delta(delta) == payload
        space = advance(space, delta)
        snapshot = wire.encode_snapshot(state.space)
        assert wire.encode_snapshot(space) == snapshot
        assert wire.encode_snapshot(wire.decode_snapshot(snapshot, SPEC)) == snapshot
    assert compacted
    assert set(space.cores) == {f"org/t{task}" for task in range(6)}


def test_adapter_round_trip() -> None:
    adapter = {"q": Factors(torch.randn(12, 3), torch.randn(10, 3))}
    again = wire.decode_adapter(wire.encode_adapter(adapter), SPEC)
    assert torch.equal(again["q"].in_, adapter["q"].in_)


def shared_head(**changes: Any) -> SharedHead:
    tensors = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
    return replace(SharedHead("org/t", 7, ("lab", "org"), ("zoo",), "ab" * 32, tensors), **changes)


def test_published_heads_round_trip_also_without_tensors() -> None:
    for head in (shared_head(), shared_head(organisations=(), tensors={})):
        payload = wire.encode_head(head)
        again = wire.decode_head(payload)
        assert replace(again, tensors={}) == replace(head, tensors={})
        assert {name: tensor.tolist() for name, tensor in again.tensors.items()} == {
            name: tensor.tolist() for name, tensor in head.tensors.items()
        }
        assert wire.encode_head(again) == payload


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"organisations": ("../lab",)}, "organisation"),
        ({"version": -1}, "version"),
        ({"task_id": 3}, "expected text"),
        ({"left_out": (1,)}, "list of names"),
    ],
)
def test_a_published_head_that_lies_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FedshareError, match=said):
        wire.decode_head(wire.encode_head(shared_head(**changes)))
    with pytest.raises(HeaderError, match="format"):
        wire.decode_head(wire.encode_update(update()))
    with pytest.raises(TensorNameError):
        wire.decode_head(wire._save({"B/q": torch.ones(2, 2)}, {"format": wire.HEAD}))


def test_largest_legitimate_update_is_within_the_size_limit() -> None:
    sites = {
        name: SiteUpdate(
            Core(torch.ones(64, 1), torch.ones(64, 1)), Factors(torch.ones(s.d_out, 5), torch.ones(s.d_in, 5))
        )
        for name, s in SPEC.sites.items()
    }
    payload = wire.encode_update(Update(0, sites))
    wire.decode_update(payload, SPEC)
    assert len(payload) <= wire.max_payload_bytes(SPEC)


# --- lies ----------------------------------------------------------------------------------------------------------


def rebuilt(change: Callable[[dict[str, Any]], None], extra: bytes = b"") -> bytes:
    """Return a valid payload whose header was edited."""
    payload = wire.encode_update(update())
    length = struct.unpack("<Q", payload[:8])[0]
    header = json.loads(payload[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + payload[8 + length :] + extra


def setter(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[name][key] = value

    return change


def raw_header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def with_tensors(**changes: Any) -> bytes:
    payload = wire.encode_update(update())
    tensors = load(payload)
    for name, value in changes.items():
        key = name.replace("__", "/")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    header = {"format": wire.UPDATE, "base_version": 3}
    return bytes(save(tensors, {"fedshare": json.dumps(header, sort_keys=True)}))


def header_json(text: str) -> bytes:
    return bytes(save({"E_o/q": torch.ones(4, 2), "E_i/q": torch.ones(5, 2)}, {"fedshare": text}))


NAN = torch.ones(4, 2)
NAN[1, 1] = float("nan")

LIES: list[tuple[str, bytes, type[PayloadError], str]] = [
    ("empty", b"", HeaderError, "at least 8 bytes"),
    ("seven bytes", b"1234567", HeaderError, "at least 8 bytes"),
    ("length past the end", struct.pack("<Q", 999) + b"{}", HeaderError, "cut short"),
    ("header of 2^63", struct.pack("<Q", 1 << 63) + b"{}", HeaderError, "at most"),
    ("not json", raw_header(b"{nonsense"), HeaderError, "not JSON"),
    ("not an object", raw_header(b"[1, 2]"), HeaderError, "does not start"),
    ("not ascii", raw_header('{"é": 1}'.encode()), HeaderError, "not ASCII"),
    ("deep nesting", raw_header(b'{"a":' * 10_000 + b"1"), HeaderError, "nested too deeply"),
    ("number of 50,000 digits", raw_header(b'{"a":' + b"1" * 50_000 + b"}"), HeaderError, "not JSON"),
    ("float", raw_header(b'{"a": 1.5}'), HeaderError, "whole numbers"),
    ("NaN constant", raw_header(b'{"a": NaN}'), HeaderError, "whole numbers"),
    ("duplicate key", raw_header(b'{"a": {}, "a": {}}'), HeaderError, "twice"),
    ("entry is a number", raw_header(b'{"a": 5}'), HeaderError, "exactly dtype"),
    ("unknown field", rebuilt(setter("E_o/q", "extra", 1)), HeaderError, "exactly dtype"),
    ("dtype F64", rebuilt(setter("E_o/q", "dtype", "F64")), TensorTypeError, "F32, F16 or BF16"),
    ("dtype a list", rebuilt(setter("E_o/q", "dtype", ["F32"])), TensorTypeError, "F32, F16 or BF16"),
    ("shape of bools", rebuilt(setter("E_o/q", "shape", [True, True])), TensorShapeError, "positive dimensions"),
    ("negative shape", rebuilt(setter("E_o/q", "shape", [-4, 2])), TensorShapeError, "positive dimensions"),
    ("shape [2^62, 0]", rebuilt(setter("E_o/q", "shape", [1 << 61, 0])), TensorShapeError, "positive dimensions"),
    ("20,000 dimensions", rebuilt(setter("E_o/q", "shape", [1] * 20_000)), TensorShapeError, "positive dimensions"),
    ("shape larger than data", rebuilt(setter("E_o/q", "shape", [1 << 40, 1 << 20])), HeaderError, "offsets give"),
    ("gap", rebuilt(setter("E_o/q", "data_offsets", [4096, 4096 + 32])), HeaderError, "at offset"),
    ("overlap", rebuilt(setter("E_o/q", "data_offsets", [0, 32])), HeaderError, "at offset"),
    ("bytes behind the end", rebuilt(lambda header: None, b"\0" * 4), HeaderError, "got"),
    ("truncated", wire.encode_update(update())[:-1], HeaderError, "expected a file of"),
    ("metadata not strings", rebuilt(setter("__metadata__", "x", 1)), HeaderError, "expected a string"),
    ("metadata header not json", header_json("{"), HeaderError, "not JSON"),
    ("metadata header a list", header_json("[]"), HeaderError, "not a JSON object"),
    ("a delta for an update", header_json('{"format": "fedshare/delta/1"}'), HeaderError, "fedshare/update/1"),
    ("no base version", header_json('{"format": "fedshare/update/1"}'), HeaderError, "base_version"),
    (
        "base version negative",
        header_json('{"format": "fedshare/update/1", "base_version": -1}'),
        HeaderError,
        "base_version",
    ),
    ("unknown part", with_tensors(evil__q=torch.ones(2, 2)), TensorNameError, "does not belong"),
    ("no owner", with_tensors(plain=torch.ones(2, 2)), TensorNameError, "does not belong"),
    ("unknown site", with_tensors(E_o__nope=torch.ones(2, 2)), TensorNameError, "no site 'nope'"),
    ("path as a site", with_tensors(**{"E_o__../../etc/passwd": torch.ones(2, 2)}), TensorNameError, "no site"),
    ("half a core", with_tensors(E_i__q=None), TensorNameError, "E_i/q' is missing"),
    ("half a residual", with_tensors(B__v=None), TensorNameError, "B/v' is missing"),
    ("core ranks differ", with_tensors(E_o__q=torch.ones(4, 3)), TensorShapeError, "E_o has 3 columns, E_i 2"),
    ("core a vector", with_tensors(E_o__q=torch.ones(4)), TensorShapeError, "expected a matrix"),
    ("residual rows", with_tensors(B__v=torch.ones(9, 3)), TensorShapeError, "expected B 8 x r"),
    ("residual ranks differ", with_tensors(B__v=torch.ones(8, 2)), TensorShapeError, "expected B 8 x r"),
    (
        "rank bomb",
        with_tensors(E_o__q=torch.ones(4, 7), E_i__q=torch.ones(5, 7)),
        TensorShapeError,
        "rank at most 6, got 7",
    ),
    ("NaN", with_tensors(E_o__q=NAN), NonFiniteError, "'E_o/q' holds 1 values"),
    ("infinity in bf16", with_tensors(E_o__q=(NAN / 0).bfloat16()), NonFiniteError, "'E_o/q'"),
    ("infinity in a head", with_tensors(head__bias=torch.tensor([float("inf")])), NonFiniteError, "'head/bias'"),
]


@pytest.mark.parametrize(("payload", "error", "words"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_lie_gets_its_own_named_error(payload: bytes, error: type[PayloadError], words: str) -> None:
    with pytest.raises(error) as caught:
        wire.decode_update(payload, SPEC)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


def test_corpus_starts_from_an_acceptable_file() -> None:
    """Otherwise every lie above could be refused for the wrong reason."""
    wire.decode_update(rebuilt(lambda header: None), SPEC)
    wire.decode_update(with_tensors(), SPEC)


def test_snapshot_with_a_core_that_does_not_fit_is_refused() -> None:
    state = merge(
        empty_state(SPEC), "org/t", {"q": Factors(torch.randn(12, 2), torch.randn(10, 2))}, MergePolicy()
    ).state
    tensors = load(wire.encode_snapshot(state.space))
    tensors["E_o/org/t/q"] = torch.ones(5, 2)
    header = {"format": wire.SNAPSHOT, "version": 1, "tasks": ["org/t"]}
    with pytest.raises(TensorShapeError, match=r"expected 2 x 2 coordinates, got 5 x 2"):
        wire.decode_snapshot(bytes(save(tensors, {"fedshare": json.dumps(header)})), SPEC)


@pytest.mark.parametrize(
    ("tasks", "error"),
    [('["nope"]', TaskNameError), ("5", HeaderError), ('[["a"]]', HeaderError), ("[]", TensorNameError)],
)
def test_task_list_of_a_delta_is_checked(tasks: str, error: type[Exception]) -> None:
    tensors = {"E_o/org/t/q": torch.ones(2, 2), "E_i/org/t/q": torch.ones(2, 2)}
    header = '{"format": "fedshare/delta/1", "version": 1, "tasks": ' + tasks + "}"
    with pytest.raises(error):
        wire.decode_delta(bytes(save(tensors, {"fedshare": header})), SPEC)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_gives_a_named_error_or_a_readable_update(position: int, bit: int) -> None:
    payload = bytearray(wire.encode_update(update()))
    payload[position % len(payload)] ^= 1 << bit
    try:
        read = wire.decode_update(bytes(payload), SPEC)
    except PayloadError:
        return
    assert all(bool(torch.isfinite(t).all()) for t in read.head.values())
