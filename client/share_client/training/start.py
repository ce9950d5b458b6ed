"""Where training in a space starts.

A task that the space already holds starts from its own core. A new one starts from what the stored cores have in
common (:mod:`share_core.warm_start`), which is nothing while they are few or do not agree. Half of the columns at least
are left to the task itself, and start at random. A few free directions start along the gradient; many, of which only
the strongest will stay, at random: Adam moves every column by about the same amount, so columns along different
directions of the gradient learn all of these alike, and what is learned is spread over more than stays (docs/adr/0021).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from share_client.training.factors import IN_NORM
from share_client.training.gradients import SiteGradient
from share_core.linalg import canonical, float64, numerical_rank, residual, small_svd
from share_core.types import Core, SiteBasis, Space
from share_core.warm_start import shared_start


def start_cores(space: Space, task_id: str, rank: int, draw: torch.Generator, warm: bool = True) -> dict[str, Core]:
    """Return a core of rank min(``rank``, k_out, k_in) for every site.

    Its product is the task's own stored core, or else the shared start, cut to half of the rank. What that leaves of
    the rank has ``out`` zero and ``in_`` random: with both zero there would be no gradient. Every ``in_`` column has
    norm :data:`~.factors.IN_NORM`, whatever the size of the start, so that all columns learn at one rate.

    Args:
        space: the version to train in.
        task_id: the task; its own core is preferred.
        rank: pseudo-rank p.
        draw: where random columns come from.
        warm: False: a new task starts at zero.
    """
    starts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    if task_id in space.cores:
        starts = {site: canonical(core.out, core.in_) for site, core in space.cores[task_id].items()}
    elif warm:
        starts = {site: _half(small_svd(product), rank) for site, product in shared_start(space.cores).items()}
    return {site: _filled(starts.get(site), basis, rank, draw) for site, basis in space.bases.items()}


def _half(svd: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leave half of ``rank`` to the task itself, unless ``rank`` columns are all that there can be."""
    u, s, v = svd
    keep = rank if v.shape[0] <= rank else rank // 2
    return u[:, :keep], s[:keep], v[:, :keep]


def _filled(start: tuple[Tensor, Tensor, Tensor] | None, basis: SiteBasis, rank: int, draw: torch.Generator) -> Core:
    """Return a core of the full rank whose product is that of ``start``, an SVD, cut to the rank."""
    rank = min(rank, basis.k_out, basis.k_in)
    out = torch.zeros(basis.k_out, rank)
    in_ = torch.randn(basis.k_in, rank, generator=draw)
    if start is not None:
        u, s, v = start
        keep = min(rank, int(numerical_rank(s)))
        out[:, :keep] = u[:, :keep] * s[:keep] / IN_NORM
        in_[:, :keep] = v[:, :keep]
    # Orthonormal columns, the start's own first: random ones may not repeat what is there.
    return Core(out=out, in_=_orthonormal_after(in_) * IN_NORM)


def _orthonormal_after(columns: Tensor) -> Tensor:
    """Return orthonormal columns by Gram-Schmidt; columns that are orthonormal already stay as they are."""
    if columns.shape[1] == 0:
        return columns
    q, r = torch.linalg.qr(float64(columns))
    sign = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(q.dtype)
    signed: Tensor = (q * sign).to(columns.dtype)
    return signed


def free_directions(
    gradients: Mapping[str, SiteGradient], bases: Mapping[str, SiteBasis], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return starting directions (d_in, count) for every site: its gradient's strongest outside of its right basis.

    Where the gradient has fewer directions than asked for, the last ones are arbitrary.
    """
    return {site: _started(gradients[site].directions[:, :count], bases[site].right) for site, count in counts.items()}


def random_directions(
    bases: Mapping[str, SiteBasis], counts: Mapping[str, int], draw: torch.Generator
) -> dict[str, Tensor]:
    """Return starting directions (d_in, count) for every site, orthogonal to its right basis and to each other.

    They tell nothing of the data. Their norm is :data:`~.factors.IN_NORM`.
    """
    columns = {site: torch.randn(bases[site].right.shape[0], count, generator=draw) for site, count in counts.items()}
    return {site: _started(one, bases[site].right) for site, one in columns.items()}


def _started(columns: Tensor, right: Tensor) -> Tensor:
    outside = residual(float64(right), float64(columns))
    return (_orthonormal_after(outside) * IN_NORM).to(torch.float32)
