"""Writing a PEFT adapter directory that PEFT loads."""

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
from share_core.linalg import balanced, canonical, numerical_rank, require_finite
from share_core.peft.config import CONFIG_FILE
from share_core.peft.export import PeftExport, PeftSite
from share_core.peft.names import WRAPPER, tensor_key
from share_core.peft.reader import TENSOR_FILE
from share_core.types import Adapter, Factors

_NEEDS_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types for which PEFT demands the head's tensors in the file."""


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
    Singular values below float32's rounding noise are dropped; a site always keeps rank 1. Without heads a task type
    that needs one is written as null: PEFT could not load it.

    Args:
        directory: new or empty.
        factors: by site, ``out`` (d_out, r), ``in_`` (d_in, r); empty for a task that changes nothing.
        like: where each site lives in the model.
        dtype: of the LoRA tensors.
        uniform_rank: pad all sites with zeros to one rank, as serving engines want it; otherwise each site keeps its
            own rank under ``rank_pattern``.
        extra: heads and biases to put beside, by their key.

    Raises:
        AdapterError: if the directory is not empty, a site is unknown or of another shape, or ``dtype`` is too narrow.
        NonFiniteError: if a factor holds NaN or infinity.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise AdapterError(f"{directory} exists and is not an empty directory: choose another, nothing was overwritten")
    pairs = {site: _pair(site, f, like) for site, f in (factors or _nothing(like)).items()}
    top = max(out.shape[1] for out, _ in pairs.values())
    tensors: dict[str, Tensor] = {key: tensor.contiguous() for key, tensor in (extra or {}).items()}
    ranks: dict[str, int] = {}
    for site, (out, in_) in pairs.items():
        known = like.sites[site]
        rank = top if uniform_rank else int(out.shape[1])
        ranks[known.module] = rank
        stored = _stored(known, _padded(out, rank), _padded(in_, rank))
        for part, tensor in zip("AB", stored, strict=True):
            key = tensor_key(known.module, part, known.kind == "embedding")
            tensors[key] = _narrowed(key, tensor, dtype)
    _write(directory, save(tensors, {"format": "pt"}), _config(like, ranks, top, list(extra or {})))


def _nothing(like: PeftExport) -> Adapter:
    """Return the adapter that changes nothing: PEFT cannot load one without tensors."""
    if not like.sites:
        raise AdapterError("this task has no site at all: there is nothing to export")
    shapes = {name: site.matrix_shape for name, site in like.sites.items()}
    return {name: Factors(torch.zeros(d_out, 1), torch.zeros(d_in, 1)) for name, (d_out, d_in) in shapes.items()}


def _pair(site: str, factors: Factors, like: PeftExport) -> tuple[Tensor, Tensor]:
    """Return balanced factors (d_out, r), (d_in, r) of the numerical rank, at least 1."""
    if site not in like.sites:
        raise AdapterError(f"site {site!r} is not one that this task's adapter had: it cannot be exported")
    expected, got = like.sites[site].matrix_shape, (int(factors.out.shape[0]), int(factors.in_.shape[0]))
    if expected != got:
        raise AdapterError(f"site {site!r}: expected {expected[0]} x {expected[1]}, got {got[0]} x {got[1]}")
    require_finite(factors.out, f"site {site!r}")
    require_finite(factors.in_, f"site {site!r}")
    u, s, v = canonical(factors.out, factors.in_)
    if s.shape[0] == 0:
        return torch.zeros(expected[0], 1), torch.zeros(expected[1], 1)
    keep = max(1, int(numerical_rank(s)))
    return balanced(u[:, :keep], s[:keep], v[:, :keep])


def _padded(factor: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))


def _stored(site: PeftSite, out: Tensor, in_: Tensor) -> tuple[Tensor, Tensor]:
    """Return lora_A and lora_B in the shapes of the layer."""
    if site.kind != "conv":
        return in_.T, out
    kernel = site.weight_shape[2:]
    return in_.T.reshape(-1, *site.weight_shape[1:]), out.reshape(*out.shape, *(1 for _ in kernel))


def _narrowed(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = tensor.to("cpu", dtype).contiguous()
    if not bool(torch.isfinite(narrow).all()):
        raise AdapterError(f"tensor {key!r} has values up to {float(tensor.abs().max()):.3g}, too large for {dtype}")
    return narrow


def _config(like: PeftExport, ranks: Mapping[str, int], top: int, extra: list[str]) -> dict[str, Any]:
    uneven = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != top}
    heads = [head for head in like.modules_to_save if any(_belongs(key, head) for key in extra)]
    biases = any(key.endswith(".bias") and not any(_belongs(key, head) for head in heads) for key in extra)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": like.base_model,
        "task_type": like.task_type if heads or like.task_type not in _NEEDS_HEAD else None,
        "r": top,
        "lora_alpha": top,
        "lora_dropout": 0.0,
        "bias": like.bias if biases else "none",
        "fan_in_fan_out": like.fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": uneven,
        "alpha_pattern": uneven,
        "target_modules": _targets(sorted(ranks)),
        "modules_to_save": heads or None,
        "inference_mode": True,
    }


def _belongs(key: str, head: str) -> bool:
    """Return whether a tensor is part of a module named in ``modules_to_save``."""
    return f".{head}." in f".{key.removeprefix(WRAPPER)}"


def _targets(modules: list[str]) -> list[str] | str:
    """Return what selects exactly these modules.

    PEFT also takes every module whose name ends in ``.`` and a listed one, so a name without a dot would select more in
    a model that has, say, ``fc`` and ``block.fc``; a regular expression must match the whole name.
    """
    if all("." in module for module in modules):
        return modules
    return "|".join(re.escape(module) for module in modules)


def _write(directory: Path, tensors: bytes, config: dict[str, Any]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f"{TEMPORARY}{directory.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        write_flushed(temporary / TENSOR_FILE, tensors, PUBLIC)
        write_flushed(temporary / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode(), PUBLIC)
        flush_directory(temporary)
        temporary.rename(directory)  # over an empty directory, if there is one
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_directory(directory.parent)
