"""lorashare 0.1.3 (package index, MIT), called as its users call it: from PEFT folders to a ``SHAREModel``.

Per site and side it takes the top ``k`` eigenvectors of the *centred* covariance of all columns and projects the
uncentred factors, that is the paper's merge in one go with the mean lost; LoRA scales are ignored, ranks must be equal.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from share_core.types import Adapter, Factors
from share_simulations.baselines.types import Compressed, InapplicableError, equal_rank, optional_package

PREFIX = "base_model.model."


def lorashare(adapters: Mapping[str, Adapter], k: int) -> Compressed:
    """Compress with ``SHAREModel.from_adapters(num_components=k)`` on the CPU.

    The time holds its reading of the adapters, which it takes from files only; writing them is not counted.

    Raises:
        InapplicableError: fewer than two adapters, ranks differ or sites are missing.
        ConfigError: lorashare is not installed.
    """
    rank = equal_rank(adapters, "lorashare")
    if len(adapters) < 2:
        raise InapplicableError("lorashare takes two adapters or more")
    package = optional_package("lorashare", "lorashare==0.1.3")
    names = {f"task{i}": task for i, task in enumerate(adapters)}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(_save(Path(folder, name), adapters[task], rank)) for name, task in names.items()}
        start = time.perf_counter()
        model = package.SHAREModel.from_adapters(paths, num_components=k, device="cpu")
        stored = {task: _adapter(model.reconstruct(name)) for name, task in names.items()}
        seconds = time.perf_counter() - start
    loadings = [tensor for own in model.all_loadings.values() for tensor in own.values()]
    numbers = sum(tensor.numel() for tensor in (*model.components.values(), *loadings))
    return Compressed("lorashare", stored, numbers, seconds)


def _save(folder: Path, adapter: Adapter, rank: int) -> Path:
    """Write a PEFT adapter in float32 with alpha = r, as our factors carry the scale."""
    folder.mkdir()
    tensors = {}
    for site, factors in adapter.items():
        tensors[f"{PREFIX}{site}.lora_A.weight"] = factors.in_.mT.to(torch.float32).contiguous()
        tensors[f"{PREFIX}{site}.lora_B.weight"] = factors.out.to(torch.float32).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(adapter)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "backbone"}))
    return folder


def _adapter(tensors: Mapping[str, torch.Tensor]) -> dict[str, Factors]:
    sites = (key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key)
    return {
        site: Factors(tensors[f"{PREFIX}{site}.lora_B.weight"], tensors[f"{PREFIX}{site}.lora_A.weight"].mT)
        for site in sites
    }
