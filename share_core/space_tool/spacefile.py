"""The file that ``share-space`` writes: one shared subspace with all its tasks, complete in itself.

A safetensors file of format ``fedshare/space/1``, with T tasks and N sites, both in the order of the header:

==============  ===================================================================================================
``L/SITE``      (d_out, k_out) float32, orthonormal columns
``R/SITE``      (d_in, k_in)
``E_o/SITE``    (k_out, sum of ranks): the out factors of every task's core at the site, side by side in task order
``E_i/SITE``    (k_in, sum of ranks)
``ranks``       (T, N): rank of each core; 0 where a task does not change a site
``norms``       (T, N): ``||dW||`` as it was merged
``bounds``      (T, N): error bound ``||dW - stored||``, rounded up; norms and bounds are never negative
==============  ===================================================================================================

The header is the one metadata key ``fedshare``: ``format``, ``backbone``, ``version``, ``policy`` (``cap``, ``budget``,
``rank``, ``site_caps``: pairs in the order in which they are tried), ``sites`` (name ->
[d_out, d_in, sha256 of the frozen weight or ""]), ``tasks`` (``name``, ``measured``, ``source``, ``sha256``, ``bytes``,
``export``: index into ``exports``) and ``exports`` (what is needed to write a task as a PEFT adapter again).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from share_core.durable import PUBLIC, write_atomic
from share_core.errors import (
    ConfigError,
    HeaderError,
    NonFiniteError,
    PayloadError,
    StorageError,
    TensorNameError,
    TensorShapeError,
)
from share_core.ledger import TaskLedger
from share_core.linalg import require_finite
from share_core.space_tool.header import (
    FORMAT,
    FilePolicy,
    Header,
    TaskSource,
    header_from_json,
    header_to_json,
)
from share_core.tensorfile import MAX_HEADER_BYTES, MAX_TENSORS, TensorFile, read_tensors
from share_core.types import Core, SiteBasis, SiteSpec, Space

__all__ = [
    "FORMAT",
    "FilePolicy",
    "SpaceFile",
    "TaskSource",
    "decode_space",
    "encode_space",
    "header_of",
    "is_space",
    "read_space",
    "write_space",
]

_MAX_RANK_SUM = 1 << 24
"""Most columns at one site: up to here float32 counts without gaps."""


@dataclass(frozen=True)
class SpaceFile:
    """One shared subspace with its tasks."""

    backbone: str
    """Name of the backbone for people, as the adapters give it; may be empty."""
    sites: Mapping[str, SiteSpec]
    space: Space
    ledger: Mapping[str, TaskLedger]
    sources: Mapping[str, TaskSource]
    policy: FilePolicy

    @property
    def verified(self) -> bool:
        """Whether the sites carry fingerprints of a backbone, and not names and shapes only."""
        return all(site.sha256 for site in self.sites.values())


def write_space(path: Path, file: SpaceFile) -> int:
    """Write a space file whole or not at all; return its size in bytes.

    Raises:
        ConfigError: if the space is one that a reader would refuse.
        StorageError: if the disk refused; an older file of that name is untouched.
    """
    payload = encode_space(file)
    try:
        write_atomic(path, payload, PUBLIC)
    except OSError as error:
        raise StorageError(
            f"cannot write {path} ({len(payload)} bytes): {error.strerror}: make room or choose another place with -o; "
            "nothing was changed"
        ) from None
    return len(payload)


def read_space(path: Path) -> SpaceFile:
    """Read a space file.

    Raises:
        ConfigError: if the file cannot be opened.
        PayloadError: if it is not what it claims to be; a leaf of it, naming file, tensor, the expected and the got.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no file: give a space file, as 'share-space merge' writes it")
        payload = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        return decode_space(payload)
    except PayloadError as error:
        raise type(error)(f"{path}: {error}") from None


def is_space(path: Path) -> bool:
    """Return whether a file may be replaced by a space: it is one, whole or damaged, or it is empty."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(8 + MAX_HEADER_BYTES)
    return not head or FORMAT.encode() in head


def header_of(file: SpaceFile) -> str:
    """Return the header of a space as text.

    Raises:
        ConfigError: if a reader would refuse it.
    """
    header = header_to_json(
        Header(
            backbone=file.backbone,
            version=file.space.version,
            policy=file.policy,
            sites=file.sites,
            sources={task: file.sources[task] for task in file.space.cores},
            measured={task: file.ledger[task].measured for task in file.space.cores},
        )
    )
    tensors = 4 * len(file.sites) + 3
    room = MAX_HEADER_BYTES - 64 - sum(4 * (160 + len(name)) for name in file.sites)
    if (
        len(header) > MAX_HEADER_BYTES // 2
        or len(header) + sum(map(header.count, '"\\')) > room
        or tensors > MAX_TENSORS
    ):
        raise ConfigError(
            f"{len(file.space.cores)} tasks at {len(file.sites)} sites need a header of {len(header)} bytes, which is "
            "more than a space file may have: split the adapters over several spaces"
        )
    try:
        header_from_json(header)
    except HeaderError as error:
        raise ConfigError(f"this space cannot be written: {error}") from None
    return header


def encode_space(file: SpaceFile) -> bytes:
    """Return a space as bytes; equal content gives equal bytes.

    Raises:
        ConfigError: if a reader would refuse them.
    """
    header = header_of(file)
    sites, tasks = sorted(file.sites), list(file.space.cores)
    tensors: dict[str, Tensor] = {}
    for site in sites:
        basis = file.space.bases[site]
        cores = [core for task in tasks if (core := file.space.cores[task].get(site)) is not None]
        tensors[f"L/{site}"], tensors[f"R/{site}"] = basis.left, basis.right
        if cores:
            tensors[f"E_o/{site}"] = torch.cat([core.out for core in cores], dim=1)
            tensors[f"E_i/{site}"] = torch.cat([core.in_ for core in cores], dim=1)
    if tasks and sites:
        tensors["ranks"] = torch.tensor(
            [[c.rank if (c := file.space.cores[t].get(s)) is not None else 0 for s in sites] for t in tasks]
        )
        tensors["norms"] = torch.tensor([[file.ledger[t].norms.get(s, 0.0) for s in sites] for t in tasks])
        bounds = torch.tensor([[file.ledger[t].bounds.get(s, 0.0) for s in sites] for t in tasks], dtype=torch.float64)
        tensors["bounds"] = _rounded_up(bounds)
    filled = {name: t.to("cpu", torch.float32).contiguous() for name, t in tensors.items() if t.numel()}
    for name, tensor in filled.items():
        try:
            require_finite(tensor, name)
        except NonFiniteError:
            raise ConfigError(
                f"this space cannot be written: {name!r} has values beyond float32: an adapter is absurdly large"
            ) from None
    return bytes(save(filled, {"fedshare": header}))


def _rounded_up(x: Tensor) -> Tensor:
    """Return float64 values in float32, never smaller; what float32 holds exactly does not grow by being copied."""
    near = x.to(torch.float32)
    return torch.where(near.to(torch.float64) < x, torch.nextafter(near, torch.full_like(near, torch.inf)), near)


def decode_space(payload: bytes) -> SpaceFile:
    """Read a space from bytes that may come from somebody else.

    Raises:
        PayloadError: a leaf of it, naming the tensor, the expected and the got.
    """
    raw = read_tensors(payload)
    header = header_from_json(raw.metadata.get("fedshare", "{}"))
    _check_names(raw, header.sites)
    space, ledger = _content(raw, header)
    return SpaceFile(header.backbone, header.sites, space, ledger, header.sources, header.policy)


def _check_names(raw: TensorFile, sites: Mapping[str, SiteSpec]) -> None:
    for name in raw.tensors:
        part, slash, site = name.partition("/")
        if name in ("ranks", "norms", "bounds") or (slash and part in ("L", "R", "E_o", "E_i") and site in sites):
            continue
        raise TensorNameError(f"tensor {name[:160]!r} does not belong in a space over {len(sites)} sites")


def _content(raw: TensorFile, header: Header) -> tuple[Space, dict[str, TaskLedger]]:
    names, tasks = sorted(header.sites), list(header.sources)
    shape = (len(tasks), len(names))
    ranks = _ranks(_matrix(raw, "ranks", *shape))
    norms, bounds = _lengths(_matrix(raw, "norms", *shape), "norms"), _lengths(_matrix(raw, "bounds", *shape), "bounds")
    bases: dict[str, SiteBasis] = {}
    cores: dict[str, dict[str, Core]] = {task: {} for task in tasks}
    for column, name in enumerate(names):
        basis = _basis(raw, header.sites[name])
        own = [row[column] for row in ranks]
        if sum(own) > (_MAX_RANK_SUM if basis.k_out and basis.k_in else 0):
            raise TensorShapeError(
                f"tensor 'ranks' at site {name!r}: {sum(own)} ranks in a basis of {basis.k_out} and {basis.k_in}"
            )
        outs = torch.split(_matrix(raw, f"E_o/{name}", basis.k_out, sum(own)), own, dim=1)
        ins = torch.split(_matrix(raw, f"E_i/{name}", basis.k_in, sum(own)), own, dim=1)
        bases[name] = basis
        for task, rank, out, in_ in zip(tasks, own, outs, ins, strict=True):
            if rank:
                cores[task][name] = Core(out, in_)
    ledger = {
        task: TaskLedger(
            {name: norms[i][j] for j, name in enumerate(names) if norms[i][j] > 0},
            {name: bounds[i][j] for j, name in enumerate(names) if norms[i][j] > 0},
            header.measured[task],
        )
        for i, task in enumerate(tasks)
    }
    return Space(header.version, bases, cores), ledger


def _basis(raw: TensorFile, site: SiteSpec) -> SiteBasis:
    basis = SiteBasis(_matrix(raw, f"L/{site.name}", site.d_out), _matrix(raw, f"R/{site.name}", site.d_in))
    for part, size, rows in (("L", basis.k_out, site.d_out), ("R", basis.k_in, site.d_in)):
        if size > rows:
            raise TensorShapeError(f"tensor '{part}/{site.name}': expected at most {rows} directions, got {size}")
    return basis


def _ranks(tensor: Tensor) -> list[list[int]]:
    if not bool(((tensor >= 0) & (tensor <= _MAX_RANK_SUM) & (tensor == tensor.round())).all()):
        raise TensorShapeError("tensor 'ranks': expected whole numbers of at least 0")
    ranks: list[list[int]] = tensor.to(torch.int64).tolist()
    return ranks


def _lengths(tensor: Tensor, name: str) -> list[list[float]]:
    if bool((tensor < 0).any()):
        raise PayloadError(f"tensor {name!r}: a length is negative")
    lengths: list[list[float]] = tensor.tolist()
    return lengths


def _matrix(raw: TensorFile, name: str, rows: int, columns: int | None = None) -> Tensor:
    """Return a matrix of the file; one without entries is left out when writing."""
    tensor = raw.tensors.get(name)
    if tensor is None:
        if rows == 0 or not columns:
            return torch.zeros(rows, columns or 0)
        raise TensorNameError(f"tensor {name!r} is missing: expected {rows} x {columns}")
    if tensor.ndim != 2 or tensor.shape[0] != rows or (columns is not None and tensor.shape[1] != columns):
        raise TensorShapeError(
            f"tensor {name!r}: expected {rows} x {'any' if columns is None else columns}, got {tuple(tensor.shape)}"
        )
    return tensor
