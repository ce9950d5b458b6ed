"""The file that ``share-space`` writes: one shared subspace with all its tasks, complete in itself.

A safetensors file of format ``fedshare/space/1``, with T tasks and N sites, both in the order of the header:

==============  ===================================================================================================
``L/SITE``      (d_out, k_out) float32, orthonormal columns
``R/SITE``      (d_in, k_in)
``E_o/SITE``    (k_out, sum of ranks): the out factors of every task's core at the site, side by side in task order
``E_i/SITE``    (k_in, sum of ranks)
``ranks``       (T, N): rank of each core; 0 where a task does not change a site
``norms``       (T, N): ``||dW||`` as it was merged
``bounds``      (T, N): error bound ``||dW - stored||``, rounded up
==============  ===================================================================================================

The header is the one metadata key ``fedshare``: ``format``, ``backbone``, ``version``, ``policy``, ``sites`` (name ->
[d_out, d_in, sha256 of the frozen weight or ""]), ``tasks`` (``name``, ``measured``, ``source``, ``sha256``, ``bytes``,
``export``: index into ``exports``) and ``exports`` (what is needed to write a task as a PEFT adapter again).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from share_core.durable import PUBLIC, write_atomic
from share_core.errors import ConfigError, HeaderError, TensorNameError, TensorShapeError
from share_core.ledger import TaskLedger
from share_core.tensorfile import MAX_HEADER_BYTES, TensorFile, read_tensors
from share_core.types import Core, SiteBasis, SiteSpec, Space

FORMAT = "fedshare/space/1"


@dataclass(frozen=True)
class TaskSource:
    """Where a task came from and how to write it out again."""

    path: str
    """The adapter directory it was merged from."""
    sha256: str
    """Of its ``adapter_model.safetensors``."""
    nbytes: int
    """Bytes of its LoRA tensors."""
    export: Mapping[str, Any]
    """What the PEFT writer needs, as JSON."""


@dataclass(frozen=True)
class FilePolicy:
    """With what limits the space was made."""

    cap: int | None
    """Largest number of basis vectors per site and side; None: as many as the budget needs."""
    budget: float
    """Share of an adapter's norm that its merge could leave out."""
    rank: int | None = None
    """Largest rank of a stored core; None keeps the adapter's own."""
    site_caps: Mapping[str, int] = field(default_factory=dict)
    """Caps of single sites by name or shell pattern; the first that matches counts."""


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
        ConfigError: if the header would be larger than a reader accepts.
    """
    payload = encode_space(file)
    write_atomic(path, payload, PUBLIC)
    return len(payload)


def read_space(path: Path) -> SpaceFile:
    """Read a space file.

    Raises:
        ConfigError: if the file cannot be opened.
        PayloadError: if it is not what it claims to be; a leaf of it, naming the tensor, the expected and the got.
    """
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    return decode_space(payload)


def encode_space(file: SpaceFile) -> bytes:
    """Return a space as bytes; equal content gives equal bytes."""
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
        tensors["bounds"] = (bounds * (1 + 1e-7)).to(torch.float32)
    header = json.dumps(_header(file, tasks), sort_keys=True)
    if len(header) > MAX_HEADER_BYTES // 2:
        raise ConfigError(
            f"{len(tasks)} tasks need a header of {len(header)} bytes, at most {MAX_HEADER_BYTES // 2} are allowed: "
            "split the adapters over several spaces"
        )
    filled = {name: t.to("cpu", torch.float32).contiguous() for name, t in tensors.items() if t.numel()}
    return bytes(save(filled, {"fedshare": header}))


def _header(file: SpaceFile, tasks: list[str]) -> dict[str, Any]:
    exports: list[Mapping[str, Any]] = []
    rows = []
    for task in tasks:
        source = file.sources[task]
        if source.export not in exports:
            exports.append(source.export)
        rows.append(
            {
                "name": task,
                "measured": file.ledger[task].measured,
                "source": source.path,
                "sha256": source.sha256,
                "bytes": source.nbytes,
                "export": exports.index(source.export),
            }
        )
    return {
        "format": FORMAT,
        "backbone": file.backbone,
        "version": file.space.version,
        "policy": asdict(file.policy),
        "sites": {name: [site.d_out, site.d_in, site.sha256] for name, site in sorted(file.sites.items())},
        "tasks": rows,
        "exports": exports,
    }


def decode_space(payload: bytes) -> SpaceFile:
    """Read a space from bytes that may come from somebody else.

    Raises:
        PayloadError: a leaf of it, naming the tensor, the expected and the got.
    """
    raw = read_tensors(payload)
    try:
        header = json.loads(raw.metadata.get("fedshare", "{}"))
    except (ValueError, RecursionError):
        raise HeaderError("metadata 'fedshare' is not JSON") from None
    got = header.get("format") if isinstance(header, dict) else None
    if got != FORMAT:
        raise HeaderError(f"expected a file of format {FORMAT!r}, got {str(got)[:80]!r}")
    try:
        sites = {name: SiteSpec(name, int(d[0]), int(d[1]), str(d[2])) for name, d in header["sites"].items()}
        tasks = [str(row["name"]) for row in header["tasks"]]
        sources = {
            str(row["name"]): TaskSource(
                str(row["source"]), str(row["sha256"]), int(row["bytes"]), header["exports"][row["export"]]
            )
            for row in header["tasks"]
        }
        measured = {str(row["name"]): bool(row["measured"]) for row in header["tasks"]}
        policy = FilePolicy(**header["policy"])
        version, backbone = int(header["version"]), str(header["backbone"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise HeaderError(f"the header of this space is damaged: {type(error).__name__}: {str(error)[:120]}") from None
    if len(sources) != len(tasks):
        raise HeaderError("the header of this space names a task twice")
    _check_names(raw, sites)
    space, ledger = _content(raw, sites, tasks, measured, version)
    return SpaceFile(backbone, sites, space, ledger, sources, policy)


def _check_names(raw: TensorFile, sites: Mapping[str, SiteSpec]) -> None:
    for name in raw.tensors:
        part, slash, site = name.partition("/")
        if name in ("ranks", "norms", "bounds") or (slash and part in ("L", "R", "E_o", "E_i") and site in sites):
            continue
        raise TensorNameError(f"tensor {name[:160]!r} does not belong in a space over {len(sites)} sites")


def _content(
    raw: TensorFile, sites: Mapping[str, SiteSpec], tasks: list[str], measured: Mapping[str, bool], version: int
) -> tuple[Space, dict[str, TaskLedger]]:
    names = sorted(sites)
    shape = (len(tasks), len(names))
    ranks = _matrix(raw, "ranks", *shape).to(torch.int64).tolist()
    norms, bounds = _matrix(raw, "norms", *shape).tolist(), _matrix(raw, "bounds", *shape).tolist()
    bases: dict[str, SiteBasis] = {}
    cores: dict[str, dict[str, Core]] = {task: {} for task in tasks}
    for column, name in enumerate(names):
        site = sites[name]
        basis = SiteBasis(_matrix(raw, f"L/{name}", site.d_out), _matrix(raw, f"R/{name}", site.d_in))
        own = [row[column] for row in ranks]
        if any(rank < 0 for rank in own):
            raise TensorShapeError(f"tensor 'ranks' at site {name!r}: a rank is negative")
        outs = _matrix(raw, f"E_o/{name}", basis.k_out, sum(own)).split(own, dim=1)
        ins = _matrix(raw, f"E_i/{name}", basis.k_in, sum(own)).split(own, dim=1)
        bases[name] = basis
        for task, rank, out, in_ in zip(tasks, own, outs, ins, strict=True):
            if rank:
                cores[task][name] = Core(out, in_)
    ledger = {
        task: TaskLedger(
            {name: norms[i][j] for j, name in enumerate(names) if norms[i][j] > 0},
            {name: bounds[i][j] for j, name in enumerate(names) if norms[i][j] > 0},
            measured[task],
        )
        for i, task in enumerate(tasks)
    }
    return Space(version, bases, cores), ledger


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
