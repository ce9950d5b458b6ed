"""Pools for the baselines: small random ones, and the real adapters where they are at hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from share_core.types import Adapter, Factors
from share_simulations.baselines.types import Compressed, errors

REAL = Path(__file__).parents[4] / "shared" / "data" / "adapters"
D_OUT, D_IN = 11, 9
SITES = ("block.0.query", "block.1.value")


def random_pool(
    seed: int, ranks: tuple[int, ...], sites: tuple[str, ...] = SITES, spread: float = 1.0
) -> dict[str, Adapter]:
    """One task per rank, factors in float32 as PEFT stores them, task sizes spread over ``e^spread``."""
    g = torch.Generator().manual_seed(seed)

    def factors(rank: int, size: float) -> Factors:
        return Factors(torch.randn(D_OUT, rank, generator=g) * size, torch.randn(D_IN, rank, generator=g))

    sizes = torch.randn(len(ranks), generator=g).mul(spread).exp().tolist()
    return {f"task{t}": {site: factors(rank, sizes[t]) for site in sites} for t, rank in enumerate(ranks)}


@pytest.fixture(scope="session")
def pool() -> Callable[..., dict[str, Adapter]]:
    """See :func:`random_pool`."""
    return random_pool


@pytest.fixture(scope="session")
def dense() -> Callable[[Factors], Tensor]:
    """``out @ in_.T`` in float64."""
    return lambda factors: factors.out.to(torch.float64) @ factors.in_.to(torch.float64).mT


@pytest.fixture(scope="session")
def objective() -> Callable[[Mapping[str, Adapter], Compressed], float]:
    """``sum_t w_t ||dW_t - dW_t^||^2`` with ``w_t = 1/||dW_t||^2``: the sum of the squared relative errors."""
    return lambda adapters, compressed: sum(e**2 for e in errors(adapters, compressed).values())


def read_peft(folder: Path) -> Adapter:
    """Read a PEFT adapter as factors, its scale folded into out."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    adapter = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            adapter[site] = Factors(b.to(torch.float32) * scale, a.to(torch.float32).mT)
    return adapter


def real_pool(name: str) -> dict[str, Adapter]:
    """All adapters below ``name``, by folder; skips the test where they are absent."""
    folders = sorted(p.parent for p in (REAL / name).glob("*/adapter_model.safetensors"))
    if not folders:
        pytest.skip(f"the real adapters of {REAL / name} are not on this machine")
    return {folder.name: read_peft(folder) for folder in folders}


@pytest.fixture(scope="session")
def minilm() -> dict[str, Adapter]:
    """22 adapters, rank 8, 12 sites of 384 x 384."""
    return real_pool("minilm")


@pytest.fixture(scope="session")
def roberta() -> dict[str, Adapter]:
    """6 adapters by strangers, ranks 4 and 8, two or three matrices a layer of 768 x 768."""
    return real_pool("found/roberta_base")
