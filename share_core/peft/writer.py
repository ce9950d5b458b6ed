"""Writing a PEFT adapter directory that PEFT and serving engines load."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from share_core.durable import PUBLIC, TEMPORARY, flush_directory, write_flushed
from share_core.errors import AdapterError
from share_core.linalg import balanced, canonical, numerical_rank
from share_core.peft.config import CONFIG_FILE
from share_core.peft.names import tensor_key
from share_core.peft.reader import TENSOR_FILE, PeftExport, PeftSite
from share_core.types import Adapter


def write_adapter(
    directory: Path,
    factors: Adapter,
    like: PeftExport,
    *,
    dtype: torch.dtype = torch.float32,
    uniform_rank: bool = True,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a task as an adapter directory, whole or not at all.

    The written ``lora_alpha`` equals ``r``, so that the scale is 1. Factors are balanced: both carry ``sqrt(S)``.

    Args:
        directory: new or empty.
        factors: by site; sites that ``like`` does not know are refused.
        like: where each site lives in the model.
        dtype: of the tensors.
        uniform_rank: pad all sites with zeros to one rank, as serving engines want it; otherwise each site keeps its
            own rank under ``rank_pattern``.
        extra: heads and biases to put beside, by their key.

    Raises:
        AdapterError: if the directory is not empty, a site is unknown or nothing is left to write.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise AdapterError(f"{directory} exists and is not an empty directory: choose another, nothing was overwritten")
    unknown = sorted(set(factors) - set(like.sites))
    if unknown:
        raise AdapterError(f"site {unknown[0]!r} is not one that this task's adapter had: it cannot be exported")
    pairs = {site: _pair(f.out, f.in_) for site, f in factors.items()}
    pairs = {site: pair for site, pair in pairs.items() if pair[0].shape[1]} or _zero_pair(like)
    top = max(out.shape[1] for out, _ in pairs.values())
    tensors: dict[str, Tensor] = dict(extra or {})
    ranks: dict[str, int] = {}
    for site, (out, in_) in pairs.items():
        known = like.sites[site]
        rank = top if uniform_rank else int(out.shape[1])
        ranks[known.module] = rank
        a, b = _stored(known, _padded(out, rank), _padded(in_, rank))
        tensors[tensor_key(known.module, "A", known.kind == "embedding")] = a.to(dtype).contiguous()
        tensors[tensor_key(known.module, "B", known.kind == "embedding")] = b.to(dtype).contiguous()
    _write(directory, save(tensors, {"format": "pt"}), _config(like, ranks, top, with_extra=bool(extra)))


def _pair(out: Tensor, in_: Tensor) -> tuple[Tensor, Tensor]:
    u, s, v = canonical(out, in_)
    keep = int(numerical_rank(s))
    return balanced(u[:, :keep], s[:keep], v[:, :keep])


def _zero_pair(like: PeftExport) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a rank-1 adapter that changes nothing: PEFT cannot hold an empty one."""
    if not like.sites:
        raise AdapterError("this task has no site at all: there is nothing to export")
    site, known = sorted(like.sites.items())[0]
    d_out, d_in = matrix_shape(known)
    return {site: (torch.zeros(d_out, 1), torch.ones(d_in, 1))}


def matrix_shape(site: PeftSite) -> tuple[int, int]:
    """Return d_out, d_in of the matrix that ``B A`` is added to."""
    shape = site.weight_shape
    if site.kind in ("embedding", "conv1d_transposed"):
        return shape[1], shape[0]
    return shape[0], int(torch.Size(shape[1:]).numel())


def _padded(factor: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))


def _stored(site: PeftSite, out: Tensor, in_: Tensor) -> tuple[Tensor, Tensor]:
    """Return lora_A and lora_B in the shapes of the layer."""
    if site.kind != "conv":
        return in_.T, out
    kernel = site.weight_shape[2:]
    return in_.T.reshape(-1, *site.weight_shape[1:]), out.reshape(*out.shape, *(1 for _ in kernel))


def _config(like: PeftExport, ranks: Mapping[str, int], top: int, with_extra: bool) -> dict[str, Any]:
    uneven = {f"^{re.escape(m)}": r for m, r in ranks.items() if r != top}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": like.base_model,
        "task_type": like.task_type,
        "r": top,
        "lora_alpha": top,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": like.fan_in_fan_out,
        "use_rslora": False,
        "rank_pattern": uneven,
        "alpha_pattern": uneven,
        "target_modules": _targets(sorted(ranks)),
        "modules_to_save": list(like.modules_to_save) or None if with_extra else None,
        "inference_mode": True,
    }


def _targets(modules: list[str]) -> list[str] | str:
    """Return the modules as a list, or as a regular expression where one name is a dotted suffix of another."""
    if any(other.endswith(f".{module}") for module in modules for other in modules):
        return "|".join(re.escape(module) for module in modules)
    return modules


def _write(directory: Path, tensors: bytes, config: dict[str, Any]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f"{TEMPORARY}{directory.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        write_flushed(temporary / TENSOR_FILE, tensors, PUBLIC)
        write_flushed(temporary / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode(), PUBLIC)
        flush_directory(temporary)
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_directory(directory.parent)
