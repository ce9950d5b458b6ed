"""What every baseline takes and gives back, and the one error measure they are compared by.

A baseline takes ``adapters`` (task -> site -> :class:`~share_core.types.Factors`) in order of arrival and a cap ``k``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from share_core.batching import stacks
from share_core.errors import ConfigError
from share_core.linalg import difference_norm, product_norm
from share_core.types import Adapter, Factors


class InapplicableError(ConfigError):
    """A method that cannot take these adapters, such as unequal ranks: a benchmark shows the reason in its place."""


@dataclass(frozen=True)
class Compressed:
    """A pool of adapters after one method has compressed it."""

    method: str
    """Name of the method and its variant."""
    stored: Mapping[str, Adapter]
    """What each task gets back, as low-rank factors; a missing site is zero."""
    numbers: int
    """All floats one has to keep: bases, coefficients, means."""
    seconds: float
    """Wall time of the whole job."""


def by_site(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, Factors]]:
    """Return site -> task -> factors; tasks keep their order of arrival."""
    sites: dict[str, dict[str, Factors]] = {}
    for task, adapter in adapters.items():
        for site, factors in adapter.items():
            sites.setdefault(site, {})[task] = factors
    return sites


def by_task(sites: Mapping[str, Mapping[str, Factors]], tasks: Mapping[str, object]) -> dict[str, Adapter]:
    """Return task -> site -> factors for every one of ``tasks``, in their order; the inverse of :func:`by_site`."""
    return {task: {site: own[task] for site, own in sites.items() if task in own} for task in tasks}


def adapter_norm(adapter: Adapter) -> float:
    """Return the Frobenius norm of dW over all sites."""
    factors = {site: (f.out, f.in_) for site, f in adapter.items()}
    return math.sqrt(sum(float(product_norm(*pair).square().sum()) for _, pair in stacks(factors)))


def distance(a: Adapter, b: Adapter) -> float:
    """Return the Frobenius norm of dW_a - dW_b over all sites of either; a missing site is zero."""
    pairs = {}
    for site in dict.fromkeys((*a, *b)):
        one, other = a.get(site) or _zero_like(b[site]), b.get(site) or _zero_like(a[site])
        pairs[site] = (one.out, one.in_, other.out, other.in_)
    return math.sqrt(sum(float(difference_norm(*group).square().sum()) for _, group in stacks(pairs)))


def errors(adapters: Mapping[str, Adapter], compressed: Compressed) -> dict[str, float]:
    """Return per task ``sqrt(sum_sites ||dW - dW^||^2 / sum_sites ||dW||^2)``; 0 for a task that changes nothing.

    Computed from factors, so it resolves errors down to rounding and never builds a dense matrix.
    """
    result = {}
    for task, adapter in adapters.items():
        norm = adapter_norm(adapter)
        result[task] = distance(adapter, compressed.stored[task]) / norm if norm > 0 else 0.0
    return result


def equal_rank(adapters: Mapping[str, Adapter], method: str) -> int:
    """Return the one rank that all adapters have at all sites.

    Raises:
        InapplicableError: ranks differ, or a task lacks a site: ``method`` cannot take such a pool.
    """
    sites = by_site(adapters)
    ranks = {f.rank for own in sites.values() for f in own.values()}
    if len(ranks) != 1:
        raise InapplicableError(f"{method} takes adapters of one rank only, and these have {sorted(ranks)}")
    lacking = sorted(site for site, own in sites.items() if len(own) != len(adapters))
    if lacking:
        raise InapplicableError(f"{method} takes adapters with the same sites only; some tasks lack {lacking[0]!r}")
    return ranks.pop()


def _zero_like(factors: Factors) -> Factors:
    shape_out, shape_in = factors.out.shape[0], factors.in_.shape[0]
    return Factors(torch.zeros(shape_out, 0, dtype=torch.float64), torch.zeros(shape_in, 0, dtype=torch.float64))


def one_for_all(method: str, merged: Adapter, adapters: Mapping[str, Adapter], seconds: float) -> Compressed:
    """Return the result of a method that gives every task the same adapter ``merged``, kept once."""
    numbers = sum(f.out.numel() + f.in_.numel() for f in merged.values())
    return Compressed(method, dict.fromkeys(adapters, merged), numbers, seconds)


def optional_package(module: str, requirement: str) -> Any:
    """Import the library of a peer, which only a benchmark needs.

    Raises:
        ConfigError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"this baseline needs {error.name!r}: pip install {requirement}") from error
