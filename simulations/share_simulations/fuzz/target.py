"""What must hold for every file whatever, as one function of its bytes.

The oracle is the safetensors library, which is more forgiving and written by others: what our reader accepts, it must
accept, with the same names, shapes, dtypes and bytes. The other way round it may well differ, that is what a strict
reader is for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from share_core import tensorfile, wire
from share_core.errors import NonFiniteError, PayloadError
from share_core.types import SiteSpec, SpaceSpec, Update

SPEC = SpaceSpec(
    "sha256:fuzz",
    "fuzz",
    {"q": SiteSpec("q", 6, 5, "0" * 64), "v": SiteSpec("v", 4, 7, "0" * 64)},
    k_max=8,
    rank_limit=4,
)
"""Small, so that files are small and many of them are tried."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


class Divergence(AssertionError):
    """Something that must hold did not."""


ACCEPTED = "accepted"
"""What :func:`look` says of a file that is accepted as an update."""


def look(data: bytes) -> str:
    """Give one file to every reader of a hub and to the library and compare.

    Returns:
        :data:`ACCEPTED`, or the name of the error with which the file is refused.

    Raises:
        Divergence: two of them disagree in a way they must not. Anything else that leaves here is a crash.
    """
    try:
        shapes = tensorfile.read_shapes(data)
    except PayloadError as error:
        if isinstance(error, NonFiniteError):
            _same_refusal(error, tensorfile.read_tensors, data)
        return type(error).__name__
    file = tensorfile.read_tensors(data)
    _compare(data, file, shapes)
    return _look_as_update(data, file)


def _look_as_update(data: bytes, file: tensorfile.TensorFile) -> str:
    try:
        facts = wire.examine_update(data, SPEC)
    except PayloadError as error:
        _same_refusal(error, wire.decode_update, data, SPEC)
        return type(error).__name__
    update = wire.decode_update(data, SPEC)
    split = facts.split
    if split.coefficients + split.directions + split.heads + split.envelope != len(data):
        raise Divergence(f"the parts {split} are not the {len(data)} bytes of the file")
    cores = {name: part.core for name, part in update.sites.items() if part.core is not None}
    if facts.base_version != update.base_version or facts.cores != {
        name: (core.out.shape[0], core.in_.shape[0]) for name, core in cores.items()
    }:
        raise Divergence(f"the facts {facts} are not those of the update")
    _require_fit(update)
    for name, tensor in file.tensors.items():
        norm = float(np.linalg.norm(tensor.numpy().astype(np.float64)))
        if not norm <= wire.MAX_NORM:
            raise Divergence(f"tensor {name!r} of an acceptable update has norm {norm}")
    return ACCEPTED


def _require_fit(update: Update) -> None:
    """Require of an accepted update what a merge relies on."""
    if type(update.base_version) is not int or not 0 <= update.base_version < 2**62:
        raise Divergence(f"base version {update.base_version!r}")
    for name, part in update.sites.items():
        site, rank = SPEC.sites[name], 0
        if part.core is not None:
            rank += part.core.rank
            if part.core.in_.shape[1] != part.core.rank:
                raise Divergence(f"the two factors of the core at {name!r} differ in rank")
        if part.residual is not None:
            rank += part.residual.rank
            own = part.residual.rank
            if [*part.residual.out.shape, *part.residual.in_.shape] != [site.d_out, own, site.d_in, own]:
                raise Divergence(f"the factors at {name!r} do not fit the site")
        if rank > SPEC.rank_limit:
            raise Divergence(f"rank {rank} at {name!r}")


def _same_refusal(expected: PayloadError, reader: Callable[..., Any], *arguments: Any) -> None:
    """Require that ``reader`` refuses as well, with the same words where they are given."""
    try:
        reader(*arguments)
    except PayloadError as error:
        if (type(error), str(error)) == (type(expected), str(expected)):
            return
        raise Divergence(f"refused as {expected!r} and as {error!r}") from error
    raise Divergence(f"{reader.__name__} accepts what was refused: {expected!r}")


def _compare(data: bytes, file: tensorfile.TensorFile, shapes: tensorfile.TensorFile) -> None:
    try:
        known = _deserialize(data)
    except Exception as error:
        raise Divergence(f"safetensors refuses what is accepted here: {type(error).__name__}: {error}") from error
    if sorted(name for name, _ in known) != sorted(file.tensors) or file.tensors.keys() != shapes.tensors.keys():
        raise Divergence(f"other names: {sorted(file.tensors)}, safetensors {sorted(name for name, _ in known)}")
    for name, entry in known:
        ours = file.tensors[name]
        shape, raw = list(entry["shape"]), bytes(entry["data"])
        if list(ours.shape) != shape or list(shapes.tensors[name].shape) != shape:
            raise Divergence(f"tensor {name!r}: shape {list(ours.shape)}, safetensors {shape}")
        if file.sizes[name] != len(raw) or shapes.sizes[name] != len(raw):
            raise Divergence(f"tensor {name!r}: {file.sizes[name]} bytes, safetensors {len(raw)}")
        if not _same_values(ours, raw, entry["dtype"]):
            raise Divergence(f"tensor {name!r} ({entry['dtype']}) has other values than safetensors says")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if header.get("__metadata__", {}) != file.metadata or file.metadata != shapes.metadata:
        raise Divergence("other metadata")


def _same_values(ours: Tensor, raw: bytes, dtype: str) -> bool:
    """Return whether a tensor holds, in float32, exactly the values in ``raw``, all of them finite."""
    if dtype not in _DTYPES:
        return False
    theirs = torch.frombuffer(bytearray(raw), dtype=_DTYPES[dtype]).to(torch.float32).numpy()
    values = ours.numpy().ravel()
    return values.tobytes() == theirs.tobytes() and bool(np.isfinite(values).all())
