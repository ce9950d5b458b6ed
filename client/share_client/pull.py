"""Writing a task of the federation as a PEFT adapter directory, or as a model with the task in its weights.

The version comes from the hub, signed, and is verified before anything is written. A directory appears whole or not at
all. ``fedshare.json`` in it says where it came from; only directories that hold one are ever replaced.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from share_client.chain import ManifestChain, open_chain
from share_client.contribute import FRAME_KEY
from share_client.frames import Frame, read_frame
from share_client.heads import fetch_head
from share_client.link import HubLink
from share_client.member import ClientLayout, load_credentials, load_member
from share_client.records import Records
from share_client.status import fetch_snapshot
from share_core.durable import PUBLIC, TEMPORARY, flush_directory, write_flushed
from share_core.errors import AccessError, AdapterError, ConfigError, StorageError, UnknownTaskError
from share_core.linalg import balanced, canonical, safe_ratio
from share_core.names import check_name, split_task_id
from share_core.peft.export import PeftExport, PeftSite
from share_core.peft.names import WRAPPER
from share_core.peft.reader import read_adapter
from share_core.peft.writer import write_adapter
from share_core.space import task_adapter
from share_core.tensorfile import parse_object, read_tensors
from share_core.types import Adapter, Factors, SharedHead, Space, SpaceSpec
from share_core.wire import decode_snapshot

MARKER = "fedshare.json"
"""File in every directory written here: what it holds and where that came from."""
HEAD_FILE = "head.safetensors"
"""Where a head lies that PEFT has no place for."""
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf")
"""Weights in other formats: they would be the backbone's without the task."""


@dataclass(frozen=True)
class PullOptions:
    """How a task is written."""

    version: int = 0
    """Which version; 0 for the newest."""
    rank: int | None = None
    """Largest rank of the written adapter; None keeps all of it."""
    backbone: str | None = None
    """The space's backbone: how its layers are stored is read from there, and its fingerprints are compared."""
    merged_into: Path | None = None
    """A model directory: write its copy with the task in the weights, instead of an adapter."""
    like: Path | None = None
    """An adapter directory for the model to be served, whose module names and base model are taken over."""
    head: bool = True
    """Whether a head is put in: the shared one that the hub gives, or this client's own."""
    force: bool = False
    """Replace a directory that was written here before."""


@dataclass(frozen=True)
class _Head:
    """A head to write, and how the adapter that it belongs to is written."""

    tensors: Mapping[str, Tensor]
    """By key; none for no head."""
    frame: PeftExport | None = None
    """The frame of the adapter that this client contributed; None if it did not."""
    shared: SharedHead | None = None
    """Where the tensors come from, if not from this client."""


@dataclass(frozen=True)
class Pulled:
    """What was written."""

    out: str
    """The directory."""
    task_id: str
    """``organisation/name``."""
    version: int
    """The version it was taken from."""
    space_id: str
    """The space."""
    form: str
    """``adapter`` or ``model``."""
    rank: int
    """The largest rank of any site."""
    cut: float
    """Share of the task's norm that a smaller rank left out; 0 for none."""
    head: str
    """``none``; this client's private one: ``own`` (in the adapter, PEFT loads it) or ``beside`` (in head.safetensors);
    the one that the hub publishes: ``shared`` (in the adapter) or ``shared_beside``."""
    head_tensors: tuple[str, ...] = field(default=())
    """Names of the head's tensors."""
    head_of: tuple[str, ...] = field(default=())
    """Organisations whose head it is: of a shared one, all of whom it is the mean."""
    head_left_out: tuple[str, ...] = field(default=())
    """Organisations that share a head of other shapes, which is not in the mean."""


def pull(layout: ClientLayout, link: HubLink, task: str, out: Path, options: PullOptions = PullOptions()) -> Pulled:
    """Write one task of a version.

    Args:
        layout: an enrolled client directory; a session may work on it.
        link: to its hub.
        task: ``organisation/name``, or the name alone for an own task.
        out: directory to make.
        options: see :class:`PullOptions`.

    Raises:
        ConfigError: ``out`` is there already, or options contradict each other.
        UnknownTaskError: the version has no such task.
        ManifestError: the version is not what the hub has signed.
        SpaceMismatchError: the given backbone is not the space's.
        AdapterError: the adapter given as ``like`` has other sites.
        StorageError: the disk does not take it.
    """
    _check_options(options)
    _check_target(out, options.force)
    member = load_member(layout)
    task_id = task if "/" in task else f"{member.organisation}/{check_name(task, 'task name')}"
    split_task_id(task_id)
    description, credentials = link.describe(), load_credentials(layout, datetime.now(UTC))
    spec = description.spec
    version, payload = fetch_snapshot(link, credentials, options.version)
    space = decode_snapshot(payload, spec)
    factors, cut = _cut(_factors(space, task_id), options.rank)
    head = _Head({})
    if options.head:
        chain = open_chain(description, credentials, None, datetime.now(UTC))
        own = _own_head(layout, member.organisation, task_id, version)
        head = _chosen(own, _shared_head(link, chain, task_id, version))
    like = None if options.merged_into is not None else _frame(spec, options, head.frame, set(factors))
    shared = head.shared
    made = Pulled(
        out=str(out),
        task_id=task_id,
        version=version,
        space_id=spec.space_id,
        form="adapter" if options.merged_into is None else "model",
        rank=max((one.rank for one in factors.values()), default=0),
        cut=cut,
        head=_place(head, like, came=options.like is None),
        head_tensors=tuple(sorted(head.tensors)),
        head_of=shared.organisations if shared else (member.organisation,) if head.tensors else (),
        head_left_out=shared.left_out if shared else (),
    )
    _write(out, made, spec, factors, head.tensors, like, options)
    return made


def pulled_text(made: Pulled) -> str:
    """Return what was written as one sentence for people."""
    whose = ", ".join(made.head_of)
    heads = {
        "none": "no head inside",
        "own": f"with this client's own head ({', '.join(made.head_tensors)})",
        "beside": f"this client's own head lies beside in {HEAD_FILE}, PEFT does not load it",
        "shared": f"with the head shared by {whose} ({', '.join(made.head_tensors)})",
        "shared_beside": f"the head shared by {whose} lies beside in {HEAD_FILE}, PEFT does not load it",
    }
    what = f"rank {made.rank}" if made.form == "adapter" else "merged into the weights"
    cut = f", {made.cut:.2%} of its norm cut" if made.cut else ""
    missing = f"; {', '.join(made.head_left_out)} shares one of other shapes" if made.head_left_out else ""
    return f"{made.out}: {made.task_id} of version {made.version}, {what}{cut}, {heads[made.head]}{missing}"


def _check_options(options: PullOptions) -> None:
    if options.merged_into is not None and (options.like is not None or options.rank is not None):
        raise ConfigError(
            "--merged-into writes weights, which have neither a rank nor another model's names: leave --rank and "
            "--like out, or pull an adapter"
        )
    if options.rank is not None and options.rank < 1:
        raise ConfigError(f"--rank: expected at least 1, got {options.rank}")


def _check_target(out: Path, force: bool) -> None:
    """Refuse to write over anything that was not written here.

    Raises:
        ConfigError: saying what is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise ConfigError(f"{out} is there already: choose another --out, or --force to replace what 'pull' wrote")
    if not (out / MARKER).is_file():
        raise ConfigError(
            f"{out} holds no {MARKER}, so it was not written by 'share-client pull': it is not replaced, choose "
            "another --out"
        )


def _write(
    out: Path,
    made: Pulled,
    spec: SpaceSpec,
    factors: Adapter,
    head: Mapping[str, Tensor],
    like: PeftExport | None,
    options: PullOptions,
) -> None:
    """Write everything beside ``out`` and move it there; an adapter as ``like`` says."""
    staged = out.with_name(f"{TEMPORARY}{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        if options.merged_into is not None:
            _write_model(staged, options.merged_into, spec, factors)
        else:
            assert like is not None, "an adapter has a frame"
            extra = head if made.head == "own" else _in_peft(head) if made.head == "shared" else None
            write_adapter(staged, factors, like, extra=extra)
        if made.head in ("beside", "shared_beside"):
            write_flushed(staged / HEAD_FILE, safetensors.torch.save(dict(head)))
        said = {name: value for name, value in asdict(made).items() if name != "out"}
        write_flushed(staged / MARKER, (json.dumps(said, indent=1) + "\n").encode(), PUBLIC)
        flush_directory(staged)
        _move(staged, out)
    except OSError as error:
        raise StorageError(
            f"cannot write {out}: {error.strerror or error}: make room or choose another place; nothing was changed"
        ) from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _move(staged: Path, out: Path) -> None:
    """Move the new directory to its place; an old one there is removed when that has worked, and put back if not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not (out / MARKER).is_file():
        staged.rename(out)  # over an empty directory, if there is one
        flush_directory(out.parent)
        return
    aside = out.with_name(f"{TEMPORARY}{out.name}-{uuid.uuid4().hex[:8]}")
    out.rename(aside)
    try:
        staged.rename(out)
        flush_directory(out.parent)
    except BaseException:
        if not staged.exists():
            out.rename(staged)
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _factors(space: Space, task_id: str) -> Adapter:
    """Return a task's factors in float64."""
    try:
        return task_adapter(space, task_id, torch.float64)
    except UnknownTaskError as error:
        raise UnknownTaskError(
            f"{error}; 'share-client tasks' lists them, a new one appears when it is merged"
        ) from None


def _cut(factors: Adapter, rank: int | None) -> tuple[Adapter, float]:
    """Return the nearest factors of at most ``rank``, and the share of the norm that they leave out.

    The nearest in the Frobenius norm are the leading singular directions (Eckart and Young, 1936).
    """
    kept: dict[str, Factors] = {}
    left_out = whole = 0.0
    for site, one in factors.items():
        u, s, v = canonical(one.out, one.in_)
        end = int(s.shape[0]) if rank is None else min(rank, int(s.shape[0]))
        kept[site] = Factors(*balanced(u[:, :end], s[:end], v[:, :end]))
        left_out += float((s[end:] ** 2).sum())
        whole += float((s**2).sum())
    return kept, safe_ratio(left_out**0.5, whole**0.5)


def _shared_head(link: HubLink, chain: ManifestChain, task_id: str, version: int) -> SharedHead | None:
    """Return the head that the hub publishes; None where there is none, or it is for others."""
    try:
        return fetch_head(link, chain, task_id, version)
    except AccessError:
        return None


def _chosen(own: _Head, shared: SharedHead | None) -> _Head:
    """Return the shared head, which goes with the core, unless it is the own one, of which more may be kept here."""
    if shared is None:
        return own
    kept = {key.removeprefix(WRAPPER): tensor for key, tensor in own.tensors.items()}
    if all(name in kept and torch.equal(kept[name].float(), tensor) for name, tensor in shared.tensors.items()):
        return own
    return _Head(shared.tensors, own.frame, shared)


def _place(head: _Head, like: PeftExport | None, came: bool) -> str:
    """Return where a head goes: into the adapter if it belongs to modules that the adapter has, or else beside.

    An own one goes where its adapter is written as it ``came``, with its biases too. PEFT leaves out without a word
    what no module of the adapter asks for.
    """
    if not head.tensors:
        return "none"
    modules = () if like is None else like.modules_to_save
    names = [name.removeprefix(WRAPPER) for name in head.tensors]
    belong = all(any(f".{module}." in f".{name}" for module in modules) for name in names)
    if head.shared is not None:
        return "shared" if belong else "shared_beside"
    return "own" if head.frame is not None and like is not None and (came or belong) else "beside"


def _in_peft(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a shared head under the keys that PEFT reads."""
    return {f"{WRAPPER}{name}": tensor for name, tensor in head.items()}


def _own_head(layout: ClientLayout, organisation: str, task_id: str, version: int) -> _Head:
    """Return the private head that belongs to a version, and the frame of the adapter that it came with.

    No tensors where this client has none; no frame where the task was trained here and not contributed.
    """
    _, name = split_task_id(task_id)
    records = Records(layout.tasks)
    record = records.get(name)
    known = record.head_at(version) if record.id_for(organisation) == task_id else None
    if known is None:
        return _Head({})
    file = read_tensors(records.head_bytes(name, known))
    frame = file.metadata.get(FRAME_KEY)
    text = None if frame is None else parse_object(frame, f"metadata {FRAME_KEY!r}")
    return _Head(file.tensors, None if text is None else PeftExport.from_json(text))


def _frame(spec: SpaceSpec, options: PullOptions, own: PeftExport | None, changed: set[str]) -> PeftExport:
    """Return how the adapter is to be written: as asked for, as the backbone has it, as it came, or linear."""
    if options.like is not None:
        like = read_adapter(options.like).export
        missing = sorted(changed - set(like.sites))
        if missing:
            raise AdapterError(
                f"{options.like} has no module for {len(missing)} sites that the task changes: {missing[0]}, ...: give "
                "an adapter with the same target modules"
            )
        return like
    if options.backbone is not None:
        sites = read_frame(options.backbone, spec, spec.sites).sites
    elif own is not None and changed <= set(own.sites):
        return own
    else:
        sites = {name: PeftSite(name, "linear", (site.d_out, site.d_in)) for name, site in spec.sites.items()}
    if own is not None:
        # Its head and task type are of its model class, and so the names must be: PEFT skips others silently.
        return replace(own, sites={name: replace(site, module=own.module_of(name)) for name, site in sites.items()})
    transposed = bool(sites) and all(site.kind == "conv1d_transposed" for site in sites.values())
    return PeftExport(spec.backbone, None, transposed, (), sites)


def _write_model(staged: Path, source: Path, spec: SpaceSpec, factors: Adapter) -> None:
    """Copy a model directory or file and add the task to the weights, each in the precision it is stored in."""
    frame = read_frame(str(source), spec, spec.sites)
    if frame.path is None:
        raise ConfigError(f"{source} holds no weights of its own: give the directory of a model saved as safetensors")
    if frame.path.is_dir():
        shutil.copytree(frame.path, staged, ignore=shutil.ignore_patterns(*_OTHER_WEIGHTS, f"{TEMPORARY}*"))
        files = sorted(staged.glob("*.safetensors"))
    else:
        staged.mkdir(parents=True)
        files = [staged / frame.path.name]
        shutil.copyfile(frame.path, files[0])
    for path in files:
        _add(path, frame, factors)


def _add(path: Path, frame: Frame, factors: Adapter) -> None:
    """Add to every adapted weight in one file its change."""
    keys = {f"{frame.sites[site].module}.weight": site for site in factors}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    for key in sorted(set(keys) & set(tensors)):
        site, change = frame.sites[keys[key]], factors[keys[key]]
        dense = change.out @ change.in_.T
        shaped = dense.T if site.kind == "conv1d_transposed" else dense.reshape(site.weight_shape)
        tensors[key] = (tensors[key].to(torch.float64) + shaped).to(tensors[key].dtype).contiguous()
    path.unlink()  # not written over: the tensors may still be read from it
    write_flushed(path, safetensors.torch.save(tensors, metadata), PUBLIC)
