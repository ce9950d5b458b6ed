"""Reading a PEFT adapter directory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_core.errors import AdapterError, UnsupportedAdapterError
from share_core.peft.config import PeftConfig, read_config
from share_core.peft.names import LoraKey, parse_key, site_of
from share_core.tensorfile import read_tensors, tensor_sizes
from share_core.types import Adapter, Factors, SiteSpec

TENSOR_FILE = "adapter_model.safetensors"
_LFS = b"version https://git-lfs"
_MATRIX_KINDS = ("linear", "conv1d_transposed")


@dataclass(frozen=True)
class PeftSite:
    """How one adapted weight is stored in the model."""

    module: str
    """Module path in the model the adapter was trained in."""
    kind: str
    """``linear``; ``conv1d_transposed`` for GPT-2's Conv1D; ``conv`` for Conv1d, Conv2d, Conv3d; ``embedding``."""
    weight_shape: tuple[int, ...]
    """Of the weight: (d_out, d_in); transposed for the two kinds above; (out, in, *kernel) for a convolution."""


@dataclass(frozen=True)
class PeftExport:
    """What must be kept of an adapter so that its task can be written as a PEFT adapter again."""

    base_model: str | None
    task_type: str | None
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    sites: Mapping[str, PeftSite]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "base_model": self.base_model,
            "task_type": self.task_type,
            "fan_in_fan_out": self.fan_in_fan_out,
            "modules_to_save": list(self.modules_to_save),
            "sites": {name: [s.module, s.kind, list(s.weight_shape)] for name, s in sorted(self.sites.items())},
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> PeftExport:
        """Read what :meth:`to_json` gave.

        Raises:
            AdapterError: if it is something else.
        """
        try:
            sites = {
                str(name): PeftSite(str(s[0]), str(s[1]), tuple(int(n) for n in s[2]))
                for name, s in raw["sites"].items()
            }
            return PeftExport(
                raw["base_model"], raw["task_type"], bool(raw["fan_in_fan_out"]), tuple(raw["modules_to_save"]), sites
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(f"the export information is damaged: {type(error).__name__}: {error}") from None


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
    def site_specs(self) -> dict[str, SiteSpec]:
        """The sites with their shapes, without fingerprints."""
        return {
            name: SiteSpec(name, int(f.out.shape[0]), int(f.in_.shape[0]), "") for name, f in self.factors.items()
        }

    @property
    def export(self) -> PeftExport:
        """What to keep in order to write the task again."""
        config = self.config
        return PeftExport(
            config.base_model, config.task_type, config.fan_in_fan_out, config.modules_to_save, self.sites
        )


def read_adapter(directory: Path) -> PeftAdapter:
    """Read an adapter directory as PEFT's ``save_pretrained`` wrote it.

    Raises:
        AdapterError: if it is incomplete or contradicts itself; names file, tensor, expected and got.
        UnsupportedAdapterError: if it is not plain LoRA.
        PayloadError: if the tensor file is damaged or holds NaN or infinity.
    """
    config = read_config(directory)
    payload = _read_file(directory)
    tensors = read_tensors(payload).tensors
    sizes = tensor_sizes(payload)
    found: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, LoraKey] = {}
    extra: dict[str, Tensor] = {}
    nbytes = 0
    for key, tensor in tensors.items():
        _refuse_tensor(directory, key)
        place = parse_key(key)
        if place is None:
            extra[key] = tensor
            continue
        nbytes += sizes[key]
        found.setdefault(place.module, {})[place.part] = tensor
        keys[place.module] = place
    if not found:
        raise AdapterError(f"{directory / TENSOR_FILE} holds no LoRA tensor, only {_some(extra)}")
    factors: dict[str, Factors] = {}
    sites: dict[str, PeftSite] = {}
    for module, parts in sorted(found.items()):
        site = site_of(module)
        if site in factors:
            raise AdapterError(
                f"{directory}: modules {sites[site].module!r} and {module!r} are one site {site!r}: save the adapter "
                "of one model class"
            )
        sites[site], factors[site] = _site(directory, module, parts, keys[module], config)
    return PeftAdapter(
        name=task_name(directory),
        config=config,
        factors=factors,
        sites=sites,
        extra=extra,
        notes=tuple(_notes(config, factors, found, extra)),
        nbytes=nbytes,
        sha256=hashlib.sha256(payload).hexdigest(),
    )


def task_name(directory: Path) -> str:
    """Return the directory's name as a legal task name: lower case, other characters become ``-``."""
    name = re.sub(r"[^a-z0-9._-]+", "-", directory.resolve().name.lower()).strip("._-")
    return name[-64:].strip("._-") or "adapter"


def _read_file(directory: Path) -> bytes:
    path = directory / TENSOR_FILE
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        if pickles:
            raise UnsupportedAdapterError(
                f"{directory} holds {pickles[0]}, a pickle, which can run code when it is opened and is never read "
                "here: load it with PEFT where you trust it and save it with safe_serialization=True"
            ) from None
        raise AdapterError(f"{directory} has no {TENSOR_FILE}: copy the whole directory that PEFT wrote") from None
    if payload.startswith(_LFS):
        raise AdapterError(f"{path} is a Git LFS pointer and not the file itself: run 'git lfs pull' where it came from")
    return payload


def _refuse_tensor(directory: Path, key: str) -> None:
    if "lora_magnitude_vector" in key:
        raise UnsupportedAdapterError(
            f"{directory}: tensor {key[:120]!r} belongs to DoRA, which is not supported: train a plain LoRA adapter"
        )
    if re.search(r"\.lora_E(\.|$)|\.ranknum(\.|$)", key):
        raise UnsupportedAdapterError(
            f"{directory}: tensor {key[:120]!r} belongs to AdaLoRA, which is not supported: train a plain LoRA adapter"
        )


def _site(
    directory: Path, module: str, parts: Mapping[str, Tensor], key: LoraKey, config: PeftConfig
) -> tuple[PeftSite, Factors]:
    for part in ("A", "B"):
        if part not in parts:
            raise AdapterError(f"{directory}: module {module!r} has no lora_{part} tensor: the file is incomplete")
    a, b = parts["A"], parts["B"]
    kind, weight_shape = _kind(directory, module, a, b, key, config)
    in_, out = a.reshape(a.shape[0], -1).T, b.reshape(b.shape[0], -1)
    rank = config.rank_of(module)
    if not in_.shape[1] == out.shape[1] == rank:
        raise AdapterError(
            f"{directory}: module {module!r}: expected rank {rank} by {'rank_pattern or ' if config.rank_pattern else ''}"
            f"r, got lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}: config and tensors are of different adapters"
        )
    return PeftSite(module, kind, weight_shape), Factors(out * config.scale_of(module), in_.contiguous())


def _kind(
    directory: Path, module: str, a: Tensor, b: Tensor, key: LoraKey, config: PeftConfig
) -> tuple[str, tuple[int, ...]]:
    if a.ndim != b.ndim or a.ndim < 2 or a.ndim > 5 or (a.ndim > 2 and tuple(b.shape[2:]) != (1,) * (b.ndim - 2)):
        raise AdapterError(
            f"{directory}: module {module!r}: expected B A of a linear, convolution or embedding layer, got lora_A "
            f"{tuple(a.shape)} and lora_B {tuple(b.shape)}"
        )
    if key.embedding:
        return "embedding", (int(a.shape[1]), int(b.shape[0]))
    if a.ndim > 2:
        return "conv", (int(b.shape[0]), *(int(n) for n in a.shape[1:]))
    if config.fan_in_fan_out:
        return "conv1d_transposed", (int(a.shape[1]), int(b.shape[0]))
    return "linear", (int(b.shape[0]), int(a.shape[1]))


def _notes(
    config: PeftConfig, factors: Mapping[str, Factors], found: Mapping[str, object], extra: Mapping[str, Tensor]
) -> list[str]:
    notes = []
    if all(not bool(torch.any(f.out)) or not bool(torch.any(f.in_)) for f in factors.values()):
        notes.append("every B is zero: this adapter changes nothing; was it loaded into another model class and saved?")
    if isinstance(config.target_modules, tuple):
        idle = [t for t in config.target_modules if not any(m == t or m.endswith(f".{t}") for m in found)]
        if idle:
            notes.append(f"listed targets without tensors: {', '.join(idle[:5])}")
    if extra:
        notes.append(f"{len(extra)} tensors that are no LoRA are left aside: {_some(extra)}")
    return notes


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)[:3]) or "nothing"
