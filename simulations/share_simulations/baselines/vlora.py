"""vlora-dev 1.0.0 (package index, Apache-2.0), called as its users call it.

It flattens the A and the B of a site into one vector each and does a PCA over tasks, with the mean kept: ``k`` counts
components, each as large as a whole factor, and k >= T - 1 of them hold T adapters without loss. Equal ranks only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from share_core.types import Adapter, Factors
from share_simulations.baselines.types import Compressed, equal_rank, optional_package


def vlora_once(adapters: Mapping[str, Adapter], k: int) -> Compressed:
    """Compress with ``SharedSubspace.from_adapters(num_components=k)``, which sees all adapters.

    Raises:
        InapplicableError: ranks differ or sites are missing.
        ConfigError: vlora-dev is not installed.
    """
    space_class, weights = _prepared(adapters)
    start = time.perf_counter()
    space = space_class.from_adapters(list(weights.values()), task_ids=list(weights), num_components=k)
    return _compressed("vlora once", space, start)


def vlora_stream(adapters: Mapping[str, Adapter], k: int) -> Compressed:
    """Compress with ``absorb_incremental``, one adapter at a time, as ``from_adapters_streaming`` does from files.

    It starts from two adapters, then sets ``num_components`` again, which the start had clamped to 2.

    Raises:
        InapplicableError: ranks differ or sites are missing.
        ConfigError: vlora-dev is not installed.
    """
    space_class, weights = _prepared(adapters)
    tasks = list(weights)
    start = time.perf_counter()
    space = space_class.from_adapters([weights[t] for t in tasks[:2]], task_ids=tasks[:2], num_components=k)
    space.num_components = k
    for task in tasks[2:]:
        space.absorb_incremental(weights[task], task)
    return _compressed("vlora stream", space, start)


def vlora_space(adapters: Mapping[str, Adapter], k: int, held_back: int) -> tuple[Any, dict[str, Any]]:
    """Return a ``SharedSubspace`` of all but the last ``held_back`` adapters, and all of them as ``LoRAWeights``.

    With it a benchmark can time one ``absorb`` or ``absorb_incremental``.
    """
    space_class, weights = _prepared(adapters)
    first = list(weights)[: len(weights) - held_back]
    return space_class.from_adapters([weights[t] for t in first], task_ids=first, num_components=k), weights


def _prepared(adapters: Mapping[str, Adapter]) -> tuple[Any, dict[str, Any]]:
    """Return vlora's class and the adapters as its ``LoRAWeights``, float32 as PEFT stores them."""
    rank = equal_rank(adapters, "vlora-dev")
    vlora = optional_package("vlora", "vlora-dev==1.0.0")
    weights = {}
    for task, adapter in adapters.items():
        a = {site: f.in_.mT.to(torch.float32) for site, f in adapter.items()}
        b = {site: f.out.to(torch.float32) for site, f in adapter.items()}
        weights[task] = vlora.LoRAWeights(layer_names=sorted(adapter), lora_a=a, lora_b=b, rank=rank)
    return vlora.SharedSubspace, weights


def _compressed(method: str, space: Any, start: float) -> Compressed:
    stored = {}
    for task in space.tasks:
        weights = space.reconstruct(task)
        stored[task] = {s: Factors(weights.lora_b[s], weights.lora_a[s].mT) for s in weights.layer_names}
    seconds = time.perf_counter() - start
    return Compressed(method, stored, vlora_numbers(space), seconds)


def vlora_numbers(space: Any) -> int:
    """Return all floats a ``SharedSubspace`` needs to reconstruct: components, means and loadings of both sides."""
    shared = (space.components_a, space.components_b, space.means_a, space.means_b)
    own = (side for task in space.tasks.values() for side in (task.loadings_a, task.loadings_b))
    return sum(tensor.numel() for tensors in (*shared, *own) for tensor in tensors.values())
