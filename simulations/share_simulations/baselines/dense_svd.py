"""FlexLoRA's aggregation (Bai et al., NeurIPS 2024): one adapter for all, from the dense mean of all adapters.

Per site ``M = sum_t n_t B_t A_t`` at full size (d_out, d_in) with the clients' shares n_t (equal here), then the SVD of
M truncated to rank k. Exact for the mean before truncation, and it takes mixed ranks, but every task gets the same
adapter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from share_core.linalg import balanced, float64, small_svd
from share_core.types import Adapter, Factors
from share_simulations.baselines.types import Compressed, by_site, one_for_all


def dense_svd(adapters: Mapping[str, Adapter], k: int) -> Compressed:
    """Compress all adapters into their mean of rank ``k``. A task that lacks a site counts as zero there."""
    start = time.perf_counter()
    merged = {site: _truncated_mean(own, len(adapters), k) for site, own in by_site(adapters).items()}
    return one_for_all("dense svd", merged, adapters, time.perf_counter() - start)


def _truncated_mean(own: Mapping[str, Factors], count: int, k: int) -> Factors:
    """Return the rank-``k`` truncation of ``sum_t dW_t / count``: (d_out, k), (d_in, k)."""
    first = next(iter(own.values()))
    mean = torch.zeros(first.out.shape[0], first.in_.shape[0], dtype=torch.float64)
    for factors in own.values():
        mean += float64(factors.out) @ float64(factors.in_).mT / count
    u, s, v = small_svd(mean)
    return Factors(*balanced(u[:, :k], s[:k], v[:, :k]))
