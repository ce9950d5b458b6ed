"""Clipping and noise on the coefficients of one update.

In fixed orthonormal bases an update is the vector of all entries of its cores ``C = E_o E_i^T``, site after site. It is
scaled so that its norm is at most ``clip``, and independent Gaussian noise of standard deviation ``noise_multiplier *
clip`` is added to every entry of every site, also where the update says nothing. Leaving the update out, or putting
zeros in its place, moves the vector by at most ``clip``: that is the sensitivity. Noise on the factors instead would be
multiplied with them (arXiv 2403.12313), and free directions are no coefficients: an update with noise has none.

What follows, cutting every core to the rank it is sent with, uses only the noisy entries and costs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from share_core.linalg import balanced, float64
from share_core.types import Core, Cores, SiteBasis

Normal = Callable[[tuple[int, ...]], Tensor]
"""Returns independent standard normal numbers of a shape, in float64. It must be unpredictable to everybody else."""


def noisy_cores(
    cores: Cores, bases: Mapping[str, SiteBasis], clip: float, noise_multiplier: float, rank: int, normal: Normal
) -> dict[str, Core]:
    """Return clipped cores with noise, of rank min(``rank``, k_out, k_in) at every site that has bases.

    Args:
        cores: coordinates of the update; sites may be missing.
        bases: every site of the version the update refers to.
        clip: largest norm of all entries together, above 0.
        noise_multiplier: standard deviation of the noise in units of ``clip``, at least 0.
        rank: columns that are sent.
        normal: where noise comes from.
    """
    entries = {site: _entries(cores.get(site), basis) for site, basis in bases.items() if basis.k_out and basis.k_in}
    scale = clip_scale(entries, clip)
    return {
        site: _cut(scale * matrix + noise_multiplier * clip * normal(tuple(matrix.shape)), rank)
        for site, matrix in entries.items()
    }


def clip_scale(entries: Mapping[str, Tensor], clip: float) -> float:
    """Return the factor, at most 1, after which the norm of all entries together is at most ``clip``."""
    norm = float(
        torch.sqrt(sum((matrix.square().sum() for matrix in entries.values()), torch.zeros((), dtype=torch.float64)))
    )
    return min(1.0, clip / norm) if norm else 1.0


def _entries(core: Core | None, basis: SiteBasis) -> Tensor:
    """Return the core as a matrix (k_out, k_in) in float64; zero where there is none."""
    if core is None:
        return torch.zeros(basis.k_out, basis.k_in, dtype=torch.float64)
    return float64(core.out) @ float64(core.in_).T


def _cut(matrix: Tensor, rank: int) -> Core:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    out, in_ = balanced(u[:, :rank], s[:rank], vt[:rank].T)
    return Core(out.to(torch.float32), in_.to(torch.float32))
