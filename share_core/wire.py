"""Payload layouts: safetensors files, the same on the wire and on disk.

Tensor names are ``<part>/<owner>``; a site name never holds a slash, a task id holds exactly one.

==========  ============================================================  =======================================
payload     tensors                                                       header
==========  ============================================================  =======================================
update      ``E_o/SITE`` (k_out, p), ``E_i/SITE`` (k_in, p),              ``format``, ``base_version``
            ``B/SITE`` (d_out, phi), ``A/SITE`` (phi, d_in),
            ``head/NAME`` (1 to 4 dimensions)
delta       ``Q_o/SITE`` (d_out, q), ``Q_i/SITE`` (d_in, q),              ``format``, ``version``, ``tasks``: sorted
            ``P_o/SITE`` (k + q, k'), ``P_i/SITE``,                       ids of the merged tasks
            ``E_o/TASK/SITE``, ``E_i/TASK/SITE``
snapshot    ``L/SITE`` (d_out, k_out), ``R/SITE`` (d_in, k_in),           ``format``, ``version``, ``tasks``: all
            ``E_o/TASK/SITE``, ``E_i/TASK/SITE``
adapter     ``B/SITE`` (d_out, r), ``A/SITE`` (r, d_in)                   ``format``
head        ``head/NAME`` (1 to 4 dimensions)                             ``format``, ``version``, ``task``,
                                                                          ``organisations``, ``left_out``,
                                                                          ``schema_sha256``
==========  ============================================================  =======================================

``format`` is ``fedshare/<payload>/1``. The header is one JSON object with sorted keys under the single metadata key
``fedshare``: the library writes several metadata keys in random order, and equal content must give equal bytes.

A tensor without columns is left out and read back as such. dtype is F32, or BF16 where the sender chose it; reading
always gives float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from share_core.errors import HeaderError, TensorNameError, TensorShapeError
from share_core.names import check_name, split_task_id
from share_core.space import check_core
from share_core.tensorfile import (
    MAX_HEADER_BYTES,
    Limits,
    Source,
    TensorFile,
    parse_object,
    read_shapes,
    read_tensors,
    shown,
    tensor_sizes,
)
from share_core.types import (
    Adapter,
    Core,
    Cores,
    Delta,
    Factors,
    SharedHead,
    SiteBasis,
    SiteSpec,
    SiteTransition,
    SiteUpdate,
    Space,
    SpaceSpec,
    Update,
)

UPDATE, DELTA, SNAPSHOT, ADAPTER, HEAD = (
    f"fedshare/{kind}/1" for kind in ("update", "delta", "snapshot", "adapter", "head")
)
MAX_HEAD_BYTES = 16 << 20
"""Most bytes of shared heads in one update."""
MAX_HEAD_PAYLOAD_BYTES = 2 * MAX_HEAD_BYTES + MAX_HEADER_BYTES
"""Most bytes of a published head: it is in float32, also where updates came in bfloat16."""
MAX_NORM = 2.0**63
"""Largest Frobenius norm of one tensor of an update: the product of two of them then is finite in float32."""
_ENTRY_BYTES = 160
"""Most bytes of one entry of a header beside its name: digits of four dimensions and two offsets, and the words."""


@dataclass(frozen=True)
class PayloadSplit:
    """An update payload by what its bytes are for; the sum is the whole file."""

    coefficients: int
    """Core factors."""
    directions: int
    """Residual factors."""
    heads: int
    """Shared heads."""
    envelope: int
    """Header and length prefix."""


@dataclass(frozen=True)
class UpdateFacts:
    """What can be said of an update without its values."""

    base_version: int
    """The version it was trained in."""
    cores: Mapping[str, tuple[int, int]]
    """By site: coordinates (k_out, k_in) of its core; sites without a core are left out."""
    split: PayloadSplit
    """What its bytes are for."""


def payload_bytes(payload: Source) -> PayloadSplit:
    """Split the bytes of an update payload by purpose.

    Raises:
        PayloadError: if the header is not acceptable.
    """
    return _split(tensor_sizes(payload), len(payload))


def _split(sizes: Mapping[str, int], whole: int) -> PayloadSplit:
    totals = {"E_o": 0, "E_i": 0, "B": 0, "A": 0, "head": 0}
    for name, size in sizes.items():
        totals[_part(name, totals)[0]] += size
    return PayloadSplit(
        coefficients=totals["E_o"] + totals["E_i"],
        directions=totals["B"] + totals["A"],
        heads=totals["head"],
        envelope=whole - sum(totals.values()),
    )


def max_payload_bytes(spec: SpaceSpec) -> int:
    """Return the largest update payload that can be legitimate in this space."""
    per_rank = sum(site.d_out + site.d_in + 2 * spec.k_max for site in spec.sites.values())
    return per_rank * spec.rank_limit * 4 + MAX_HEAD_BYTES + MAX_HEADER_BYTES


def update_limits(spec: SpaceSpec) -> Limits:
    """Return what an update of this space may have: a header for four tensors at every site and 64 KiB for the rest."""
    entries = sum(4 * (len(site) + _ENTRY_BYTES) for site in spec.sites)
    return Limits(header_bytes=min(MAX_HEADER_BYTES, entries + (64 << 10)), norm=MAX_NORM)


def encode_update(update: Update, dtype: torch.dtype = torch.float32) -> bytes:
    """Return an update as bytes. Heads keep ``dtype`` as well."""
    tensors: dict[str, Tensor] = {}
    for site, part in update.sites.items():
        if part.core is not None:
            tensors[f"E_o/{site}"], tensors[f"E_i/{site}"] = part.core.out, part.core.in_
        if part.residual is not None:
            tensors[f"B/{site}"], tensors[f"A/{site}"] = part.residual.out, part.residual.in_.T
    for name, tensor in update.head.items():
        tensors[f"head/{name}"] = tensor
    return _save(tensors, {"format": UPDATE, "base_version": update.base_version}, dtype)


def decode_update(payload: bytes | memoryview, spec: SpaceSpec) -> Update:
    """Read an update that came from somebody else.

    Whether cores fit the bases of the base version is checked where those bases are
    (:func:`share_core.space.update_adapter`).

    Raises:
        PayloadError: a leaf of it, naming the tensor, the expected and the got.
    """
    return _update(_open(read_tensors(payload, update_limits(spec)), UPDATE), spec)


def check_update(payload: Source, spec: SpaceSpec) -> Update:
    """Check an update as :func:`decode_update` does and return it without values: its tensors only have shapes.

    Raises:
        PayloadError: as :func:`decode_update`.
    """
    return _update(_open(read_shapes(payload, update_limits(spec)), UPDATE), spec)


def examine_update(payload: Source, spec: SpaceSpec) -> UpdateFacts:
    """Check an update as :func:`decode_update` does and return what the hub writes down of it.

    Raises:
        PayloadError: as :func:`decode_update`.
    """
    file = read_shapes(payload, update_limits(spec))
    update = _update(_open(file, UPDATE), spec)
    cores = {
        site: (int(part.core.out.shape[0]), int(part.core.in_.shape[0]))
        for site, part in update.sites.items()
        if part.core is not None
    }
    return UpdateFacts(update.base_version, cores, _split(file.sizes, len(payload)))


def _update(file: _Payload, spec: SpaceSpec) -> Update:
    found: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        part, owner = _part(name, ("E_o", "E_i", "B", "A", "head"))
        if part == "head":
            head[owner] = tensor
        else:
            found.setdefault(_site(name, owner, spec).name, {})[part] = tensor
    sites = {site: _site_update(site, parts, spec) for site, parts in found.items()}
    return Update(base_version=_number(file, "base_version"), sites=sites, head=head)


def encode_delta(delta: Delta) -> bytes:
    """Return a delta as bytes, in float32."""
    tensors: dict[str, Tensor] = {}
    for site, step in delta.transition.items():
        tensors[f"Q_o/{site}"], tensors[f"Q_i/{site}"] = step.append_left, step.append_right
        if step.rotate_left is not None:
            tensors[f"P_o/{site}"] = step.rotate_left
        if step.rotate_right is not None:
            tensors[f"P_i/{site}"] = step.rotate_right
    header = {"format": DELTA, "version": delta.version, "tasks": sorted(delta.cores)}
    return _save({**tensors, **_core_tensors(delta.cores)}, header)


def decode_delta(payload: bytes, spec: SpaceSpec) -> Delta:
    """Read a delta. Whether it fits a version is checked by :func:`share_core.space.advance`.

    Raises:
        PayloadError: a leaf of it, naming the tensor, the expected and the got.
    """
    file = _open(read_tensors(payload), DELTA)
    steps: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        part, owner = _part(name, ("Q_o", "Q_i", "P_o", "P_i", "E_o", "E_i"))
        if part in ("Q_o", "Q_i", "P_o", "P_i"):
            _matrix(name, tensor)
            steps.setdefault(_site(name, owner, spec).name, {})[part] = tensor
    transition = {}
    for site, parts in steps.items():
        known = spec.sites[site]
        transition[site] = SiteTransition(
            append_left=_rows(f"Q_o/{site}", parts.get("Q_o"), known.d_out),
            append_right=_rows(f"Q_i/{site}", parts.get("Q_i"), known.d_in),
            rotate_left=parts.get("P_o"),
            rotate_right=parts.get("P_i"),
        )
    return Delta(version=_number(file, "version"), transition=transition, cores=_cores(file, spec))


def encode_snapshot(space: Space) -> bytes:
    """Return a whole version as bytes, in float32."""
    tensors: dict[str, Tensor] = {}
    for site, basis in space.bases.items():
        tensors[f"L/{site}"], tensors[f"R/{site}"] = basis.left, basis.right
    header = {"format": SNAPSHOT, "version": space.version, "tasks": sorted(space.cores)}
    return _save({**tensors, **_core_tensors(space.cores)}, header)


def decode_snapshot(payload: bytes, spec: SpaceSpec) -> Space:
    """Read a whole version.

    Raises:
        PayloadError: a leaf of it, naming the tensor, the expected and the got.
    """
    file = _open(read_tensors(payload), SNAPSHOT)
    for name, tensor in file.tensors.items():
        part, owner = _part(name, ("L", "R", "E_o", "E_i"))
        if part in ("L", "R"):
            _site(name, owner, spec)
            _matrix(name, tensor)
    bases = {
        site.name: SiteBasis(
            left=_rows(f"L/{site.name}", file.tensors.get(f"L/{site.name}"), site.d_out),
            right=_rows(f"R/{site.name}", file.tensors.get(f"R/{site.name}"), site.d_in),
        )
        for site in spec.sites.values()
    }
    cores = _cores(file, spec)
    for task, own in cores.items():
        for name, core in own.items():
            check_core(f"{task}/{name}", core, bases[name])
    return Space(version=_number(file, "version"), bases=bases, cores=cores)


def encode_adapter(adapter: Adapter) -> bytes:
    """Return ambient factors as bytes, in float32."""
    tensors: dict[str, Tensor] = {}
    for site, factors in adapter.items():
        tensors[f"B/{site}"], tensors[f"A/{site}"] = factors.out, factors.in_.T
    return _save(tensors, {"format": ADAPTER})


def decode_adapter(payload: bytes, spec: SpaceSpec) -> Adapter:
    """Read ambient factors.

    Raises:
        PayloadError: a leaf of it, naming the tensor, the expected and the got.
    """
    file = _open(read_tensors(payload), ADAPTER)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        part, owner = _part(name, ("B", "A"))
        found.setdefault(_site(name, owner, spec).name, {})[part] = tensor
    return {site: _residual(site, parts, spec) for site, parts in found.items()}


def encode_head(head: SharedHead) -> bytes:
    """Return a published head as bytes, in float32."""
    header = {
        "format": HEAD,
        "version": head.version,
        "task": head.task_id,
        "organisations": list(head.organisations),
        "left_out": list(head.left_out),
        "schema_sha256": head.schema_sha256,
    }
    return _save({f"head/{name}": tensor for name, tensor in head.tensors.items()}, header)


def decode_head(payload: bytes) -> SharedHead:
    """Read a published head.

    Raises:
        PayloadError: a leaf of it, naming the tensor or the key, the expected and the got.
    """
    file = _open(read_tensors(payload), HEAD)
    tensors = {_part(name, ("head",))[1]: tensor for name, tensor in file.tensors.items()}
    task, schema = file.header.get("task"), file.header.get("schema_sha256")
    if not isinstance(task, str) or not isinstance(schema, str):
        raise HeaderError(f"header 'task' or 'schema_sha256': expected text, got {shown(task)} and {shown(schema)}")
    return SharedHead(
        task_id=task,
        version=_number(file, "version"),
        organisations=_names(file, "organisations"),
        left_out=_names(file, "left_out"),
        schema_sha256=schema,
        tensors=tensors,
    )


def _save(tensors: Mapping[str, Tensor], header: Mapping[str, object], dtype: torch.dtype = torch.float32) -> bytes:
    filled = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items() if t.numel()}
    return bytes(save(filled, {"fedshare": json.dumps(header, sort_keys=True)}))


def _core_tensors(cores: Mapping[str, Cores]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for task, own in cores.items():
        for site, core in own.items():
            tensors[f"E_o/{task}/{site}"], tensors[f"E_i/{task}/{site}"] = core.out, core.in_
    return tensors


@dataclass(frozen=True)
class _Payload:
    tensors: Mapping[str, Tensor]
    header: Mapping[str, object]


def _open(file: TensorFile, expected: str) -> _Payload:
    header = parse_object(file.metadata.get("fedshare", "{}"), "metadata 'fedshare'")
    for key, value in header.items():
        if any(isinstance(part, list | dict) for part in (value if isinstance(value, list) else [value])):
            raise HeaderError(f"header {key[:80]!r}: expected a plain value or a list of them, got {shown(value)}")
    got = header.get("format")
    if got != expected:
        raise HeaderError(f"expected a payload of format {expected!r}, got {shown(got)}")
    return _Payload(file.tensors, header)


def _number(file: _Payload, key: str) -> int:
    value = file.header.get(key)
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise HeaderError(f"header {key!r}: expected a whole number, got {shown(value)}")
    return value


def _names(file: _Payload, key: str) -> tuple[str, ...]:
    value = file.header.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise HeaderError(f"header {key!r}: expected a list of names, got {shown(value)}")
    return tuple(check_name(name, "organisation") for name in value)


def _part(name: str, allowed: tuple[str, ...] | Mapping[str, int]) -> tuple[str, str]:
    part, slash, owner = name.partition("/")
    if not slash or not owner or part not in allowed:
        raise TensorNameError(
            f"tensor {name[:120]!r} does not belong here: expected {', '.join(allowed)} followed by /…"
        )
    return part, owner


def _site(name: str, site: str, spec: SpaceSpec) -> SiteSpec:
    known = spec.sites.get(site)
    if known is None:
        raise TensorNameError(f"tensor {name[:160]!r}: the space over {spec.backbone!r} has no site {site[:120]!r}")
    return known


def _matrix(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 2:
        raise TensorShapeError(f"tensor {name!r}: expected a matrix, got shape {tuple(tensor.shape)}")


def _rows(name: str, tensor: Tensor | None, rows: int) -> Tensor:
    if tensor is None:
        return torch.zeros(rows, 0)
    if tensor.ndim != 2 or tensor.shape[0] != rows:
        raise TensorShapeError(f"tensor {name!r}: expected {rows} rows, got shape {tuple(tensor.shape)}")
    return tensor


def _pair(site: str, parts: Mapping[str, Tensor], first: str, second: str) -> tuple[Tensor, Tensor] | None:
    """Return two tensors that only make sense together, or None if neither is there."""
    a, b = parts.get(first), parts.get(second)
    if a is None and b is None:
        return None
    if a is None or b is None:
        missing = first if a is None else second
        raise TensorNameError(f"tensor '{missing}/{site}' is missing: {first} and {second} come in pairs")
    _matrix(f"{first}/{site}", a)
    _matrix(f"{second}/{site}", b)
    return a, b


def _core(site: str, parts: Mapping[str, Tensor]) -> Core | None:
    pair = _pair(site, parts, "E_o", "E_i")
    if pair is None:
        return None
    if pair[0].shape[1] != pair[1].shape[1]:
        raise TensorShapeError(f"core at {site!r}: E_o has {pair[0].shape[1]} columns, E_i {pair[1].shape[1]}")
    return Core(*pair)


def _residual(site: str, parts: Mapping[str, Tensor], spec: SpaceSpec) -> Factors:
    pair = _pair(site, parts, "B", "A")
    assert pair is not None
    b, a = pair
    known = spec.sites[site]
    if b.shape[0] != known.d_out or a.shape[1] != known.d_in or b.shape[1] != a.shape[0]:
        raise TensorShapeError(
            f"factors at {site!r}: expected B {known.d_out} x r and A r x {known.d_in}, "
            f"got {tuple(b.shape)} and {tuple(a.shape)}"
        )
    return Factors(b, a.T.contiguous())


def _site_update(site: str, parts: Mapping[str, Tensor], spec: SpaceSpec) -> SiteUpdate:
    core = _core(site, parts)
    residual = _residual(site, parts, spec) if "A" in parts or "B" in parts else None
    rank = (core.rank if core else 0) + (residual.rank if residual else 0)
    if rank > spec.rank_limit:
        raise TensorShapeError(f"update at {site!r}: expected rank at most {spec.rank_limit}, got {rank}")
    return SiteUpdate(core, residual)


def _cores(file: _Payload, spec: SpaceSpec) -> dict[str, Cores]:
    """Return the cores of every task named in the header, also of tasks that change nothing."""
    tasks = file.header.get("tasks", [])
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise HeaderError("header 'tasks' is not a list of task ids")
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for task in tasks:
        split_task_id(task)
        found[task] = {}
    for name, tensor in file.tensors.items():
        part, owner = name.split("/", 1)
        if part not in ("E_o", "E_i"):
            continue
        pieces = owner.split("/")
        task = "/".join(pieces[:2])
        if len(pieces) != 3 or task not in found:
            raise TensorNameError(f"tensor {name[:160]!r}: expected {part}/organisation/task/site of a listed task")
        found[task].setdefault(_site(name, pieces[2], spec).name, {})[part] = tensor
    cores: dict[str, Cores] = {}
    for task, own in found.items():
        cores[task] = {site: core for site, parts in own.items() if (core := _core(site, parts)) is not None}
    return cores
