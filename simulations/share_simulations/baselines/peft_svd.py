"""PEFT's own way to combine adapters: ``add_weighted_adapter(combination_type="svd")``, called as its users do.

PEFT builds ``sum_t weight_t scale_t B_t A_t`` densely at every site and truncates its SVD to ``svd_rank``
(``peft.tuners.lora.model``, release 0.21.2): one adapter for all tasks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from share_core.types import Adapter, Factors
from share_simulations.baselines.types import Compressed, by_site, one_for_all, optional_package


def peft_svd(adapters: Mapping[str, Adapter], k: int, mean: bool = True) -> Compressed:
    """Combine all adapters into one of rank ``k``: their mean, or their sum.

    The time is that of PEFT's merge; putting the adapters into its model is not counted.

    Raises:
        ConfigError: PEFT is not installed.
    """
    sites = {site: f"site{i}" for i, site in enumerate(by_site(adapters))}
    tasks = {task: f"task{i}" for i, task in enumerate(adapters)}
    model = _model_holding(adapters, sites, tasks)
    weight = 1 / len(adapters) if mean else 1.0
    start = time.perf_counter()
    model.add_weighted_adapter(list(tasks.values()), [weight] * len(tasks), "all", combination_type="svd", svd_rank=k)
    seconds = time.perf_counter() - start
    weights = dict(model.named_parameters())
    merged = {site: Factors(*_pair(weights, name, "all")) for site, name in sites.items()}
    return one_for_all(f"peft svd, {'mean' if mean else 'sum'}", merged, adapters, seconds)


def _model_holding(adapters: Mapping[str, Adapter], sites: Mapping[str, str], tasks: Mapping[str, str]) -> Any:
    """Return a PEFT model of plain linear layers, one a site, that holds every adapter; LoRA alpha = r, so scale 1."""
    peft = optional_package("peft", "peft==0.21.2")
    shapes = {site: next(iter(own.values())) for site, own in by_site(adapters).items()}
    layers = {sites[s]: nn.Linear(f.in_.shape[0], f.out.shape[0], bias=False) for s, f in shapes.items()}
    model: Any = None
    for task, adapter in adapters.items():
        ranks = {sites[site]: max(f.rank, 1) for site, f in adapter.items()}
        config = peft.LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)
        if model is None:
            model = peft.get_peft_model(nn.ModuleDict(layers), config, adapter_name=tasks[task])
        else:
            model.add_adapter(tasks[task], config)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for task, adapter in adapters.items():
            for site, factors in adapter.items():
                out, in_ = _pair(weights, sites[site], tasks[task])
                out.zero_()[:, : factors.rank] = factors.out
                in_.zero_()[:, : factors.rank] = factors.in_
    return model


def _pair(weights: Mapping[str, Tensor], site: str, adapter: str) -> tuple[Tensor, Tensor]:
    """Return views of ``lora_B`` (d_out, r) and ``lora_A`` transposed (d_in, r) inside the PEFT model."""
    prefix = f"base_model.model.{site}"
    return (
        weights[f"{prefix}.lora_B.{adapter}.weight"].detach(),
        weights[f"{prefix}.lora_A.{adapter}.weight"].detach().mT,
    )
