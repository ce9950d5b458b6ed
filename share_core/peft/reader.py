"""Reading a PEFT adapter directory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from share_core.errors import AdapterError, PayloadError, UnsupportedAdapterError
from share_core.linalg import require_finite
from share_core.peft.config import PeftConfig, read_config
from share_core.peft.export import PeftExport, PeftSite
from share_core.peft.kinds import refuse_tensor
from share_core.peft.names import parse_key, site_of
from share_core.tensorfile import read_tensors, tensor_sizes
from share_core.types import Adapter, Factors, SiteSpec

__all__ = [
    "TENSOR_FILE",
    "PeftAdapter",
    "PeftConfig",
    "PeftExport",
    "PeftSite",
    "read_adapter",
    "read_config",
    "task_name",
]

TENSOR_FILE = "adapter_model.safetensors"
_LONGEST_NAME = 64
"""As :mod:`share_core.names` has it."""
_LFS = b"version https://git-lfs"
_WRAPPED = re.compile(r"\.base_layer(\.|$)")


@dataclass(frozen=True)
class PeftAdapter:
    """One adapter, ready to be merged."""

    name: str
    """The directory's name in the alphabet of task names."""
    config: PeftConfig
    factors: Adapter
    """By site: ``out`` (d_out, r) with the scale folded in, ``in_`` (d_in, r), float32. Convolutions are d_out x
    (d_in kh kw), embeddings dim x number."""
    sites: Mapping[str, PeftSite]
    extra: Mapping[str, Tensor]
    """Tensors that are no LoRA (heads under ``modules_to_save``, biases), by their key. Never merged."""
    notes: tuple[str, ...]
    """What a person should know: zero adapters, targets that match nothing, tensors left aside."""
    nbytes: int
    """Bytes of the LoRA tensors as stored."""
    sha256: str
    """Of the tensor file."""

    @property
    def prefix(self) -> str:
        """As :attr:`PeftExport.prefix` says."""
        return self.export.prefix

    @property
    def site_specs(self) -> dict[str, SiteSpec]:
        """The sites with their shapes, without fingerprints."""
        return {name: SiteSpec(name, int(f.out.shape[0]), int(f.in_.shape[0]), "") for name, f in self.factors.items()}

    @property
    def export(self) -> PeftExport:
        """What to keep in order to write the task again."""
        config = self.config
        return PeftExport(
            base_model=config.base_model,
            task_type=config.task_type,
            fan_in_fan_out=config.fan_in_fan_out,
            modules_to_save=config.modules_to_save,
            sites=self.sites,
            bias=config.bias,
        )


@dataclass
class _Module:
    """The LoRA tensors of one adapted module, by part (A or B)."""

    embedding: bool
    keys: dict[str, str]
    tensors: dict[str, Tensor]


def read_adapter(directory: Path) -> PeftAdapter:
    """Read an adapter directory as PEFT's ``save_pretrained`` wrote it.

    Raises:
        AdapterError: if it is incomplete or contradicts itself; names file, tensor, expected and got.
        UnsupportedAdapterError: if it is not plain LoRA.
        PayloadError: if the tensor file is damaged or holds NaN or infinity; a leaf of it, naming file and tensor.
    """
    config = read_config(directory)
    path = directory / TENSOR_FILE
    payload = _read_file(path)
    try:
        sizes, tensors = tensor_sizes(payload), read_tensors(payload).tensors
    except PayloadError as error:
        raise type(error)(f"{path}: {error}") from None
    modules, extra = _sorted_out(path, tensors)
    if not modules:
        raise AdapterError(
            f"{path} holds no LoRA tensor, only {_some(extra)}: save the adapter with PEFT's save_pretrained"
        )
    factors: dict[str, Factors] = {}
    sites: dict[str, PeftSite] = {}
    for name, module in sorted(modules.items()):
        site = site_of(name)
        if site in sites:
            raise AdapterError(
                f"{path}: modules {sites[site].module!r} and {name!r} are both site {site!r}: save the adapter of one "
                "model class"
            )
        sites[site], factors[site] = _site(path, name, module, config)
    lora_keys = [key for module in modules.values() for key in module.keys.values()]
    return PeftAdapter(
        name=task_name(directory),
        config=config,
        factors=factors,
        sites=sites,
        extra=extra,
        notes=tuple(_notes(config, factors, modules, extra)),
        nbytes=sum(sizes[key] for key in lora_keys),
        sha256=hashlib.sha256(payload).hexdigest(),
    )


def task_name(directory: Path) -> str:
    """Return the directory's name as a legal task name: lower case, other characters become ``-``.

    Of a long name the beginning and the end are kept: whose it is, and which checkpoint.
    """
    name = re.sub(r"[^a-z0-9._-]+", "-", directory.resolve().name.lower()).strip("._-")
    if len(name) > _LONGEST_NAME:
        end = name[-40:].lstrip("._-")
        name = f"{name[: _LONGEST_NAME - len(end) - 2].rstrip('._-')}--{end}"
    return name or "adapter"


def _read_file(path: Path) -> bytes:
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        pickles = sorted(p.name for p in path.parent.glob("*.bin"))
        if pickles:
            raise UnsupportedAdapterError(
                f"{path.parent} holds {pickles[0]}, a pickle, which can run code when it is opened and is never read "
                "here: where you trust it, load it with PEFT and call save_pretrained(..., safe_serialization=True)"
            ) from None
        raise AdapterError(f"{path.parent} has no {path.name}: copy the whole directory that PEFT wrote") from None
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}") from None
    if payload.startswith(_LFS):
        raise AdapterError(
            f"{path} is a Git LFS pointer and not the file itself: run 'git lfs pull' where it came from"
        )
    return payload


def _sorted_out(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Module], dict[str, Tensor]]:
    """Return the LoRA tensors by module, and all others by key."""
    modules: dict[str, _Module] = {}
    extra: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        place = parse_key(key)
        if place is None:
            refuse_tensor(key, str(path))
            extra[key] = tensor
            continue
        if _WRAPPED.search(place.module):
            raise UnsupportedAdapterError(
                f"{path}: tensor {key[:160]!r} adapts a part of a layer that PEFT wraps twice (MultiheadAttention): "
                "train a LoRA adapter of its linear layers"
            )
        module = modules.setdefault(place.module, _Module(place.embedding, {}, {}))
        if place.part in module.keys or place.embedding != module.embedding:
            raise AdapterError(
                f"{path}: tensors {next(iter(module.keys.values()))!r} and {key!r} are for one module: save one "
                "adapter per directory"
            )
        module.keys[place.part], module.tensors[place.part] = key, tensor
    return modules, extra


def _site(path: Path, name: str, module: _Module, config: PeftConfig) -> tuple[PeftSite, Factors]:
    for part, other in ("AB", "BA"):
        if part not in module.keys:
            raise AdapterError(
                f"{path}: tensor {module.keys[other]!r} has no lora_{part} beside it: the file is incomplete, copy or "
                "save it again"
            )
    a, b = module.tensors["A"], module.tensors["B"]
    site = PeftSite(name, *_layer(path, module, config))
    rank, scale = config.rank_of(name), config.scale_of(name)
    for part, tensor, axis in (("A", a, 0), ("B", b, 1)):
        if tensor.shape[axis] != rank:
            raise AdapterError(
                f"{path}: tensor {module.keys[part]!r}: expected rank {rank} by the config, got {tensor.shape[axis]} "
                f"of shape {tuple(tensor.shape)}: config and tensors are of different adapters"
            )
    out = b.reshape(b.shape[0], -1) * scale
    require_finite(out, f"{path}: tensor {module.keys['B']!r} times its scale {scale:g}")
    return site, Factors(out, a.reshape(rank, -1).T.contiguous())


def _layer(path: Path, module: _Module, config: PeftConfig) -> tuple[str, tuple[int, ...]]:
    """Return kind and weight shape of the layer that two factors fit."""
    a, b = module.tensors["A"], module.tensors["B"]
    d_out, inner = int(b.shape[0]), tuple(int(n) for n in a.shape[1:])
    if a.ndim != b.ndim or a.ndim < 2 or (a.ndim > 2 and (module.embedding or any(n != 1 for n in b.shape[2:]))):
        raise AdapterError(
            f"{path}: tensors {module.keys['A']!r} {tuple(a.shape)} and {module.keys['B']!r} {tuple(b.shape)}: "
            "expected the two factors of a linear, convolution or embedding layer"
        )
    if module.embedding:
        return "embedding", (inner[0], d_out)
    if a.ndim == 2:
        return ("conv1d_transposed", (inner[0], d_out)) if config.fan_in_fan_out else ("linear", (d_out, inner[0]))
    if b.shape[1] != a.shape[0] and a.shape[0] % b.shape[1] == 0:
        raise UnsupportedAdapterError(
            f"{path}: tensor {module.keys['B']!r} has shape {tuple(b.shape)} for rank {a.shape[0]}: a grouped "
            "convolution, whose change is not of low rank: leave it out of target_modules"
        )
    return "conv", (d_out, *inner)


def _notes(
    config: PeftConfig,
    factors: Mapping[str, Factors],
    modules: Mapping[str, _Module],
    extra: Mapping[str, Tensor],
) -> list[str]:
    notes = []
    idle = [name for name, f in factors.items() if not bool(torch.any(f.out)) or not bool(torch.any(f.in_))]
    if len(idle) == len(factors):
        notes.append("all B are zero: this adapter changes nothing; was it loaded into another model class and saved?")
    elif idle:
        notes.append(f"{len(idle)} of {len(factors)} sites do not change anything: {_some(idle)}")
    targets = config.target_modules if isinstance(config.target_modules, tuple) else ()
    notes += [
        f"target {target!r} matches no tensor"
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in modules)
    ]
    biases = [key for key in extra if key.endswith(".bias") and config.bias != "none"]
    if biases:
        notes.append(f"trained biases (bias={config.bias!r}) are kept aside and not merged: {_some(biases)}")
    others = [key for key in extra if key not in biases]
    if others:
        notes.append(f"{len(others)} tensors that are no LoRA are kept aside and not merged: {_some(others)}")
    return notes


def _some(names: Mapping[str, object] | list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "") or "nothing"
