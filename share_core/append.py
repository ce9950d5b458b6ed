"""Exact append: the bases gain the directions a new adapter needs; no old task moves (MATH section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from share_core.batching import stacks
from share_core.linalg import RANK_EPS, canonical, float64, residual, small_svd, thin_qr
from share_core.space import compress_core
from share_core.types import Adapter, Core, Cores, SiteBasis, SiteTransition


@dataclass(frozen=True)
class Appended:
    """Result of an append."""

    transition: Mapping[str, SiteTransition]
    """New directions, by site; sites that need none are absent."""
    cores: Cores
    """The adapter in the grown coordinates."""


@dataclass(frozen=True)
class _Site:
    """One site between the decomposition and the choice of directions."""

    directions: tuple[Tensor, Tensor]
    """Orthonormal residual directions of both sides, strongest first: (d_out, q), (d_in, q)."""
    strengths: tuple[Tensor, Tensor]
    """Their singular values, descending: how much of dW each carries."""
    coordinates: tuple[Tensor, Tensor]
    """``[basis directions].T`` times ``U S`` and ``V``: (k + q, r) each."""
    floor: float
    """Strengths at or below this are rounding noise."""


def append(bases: Mapping[str, SiteBasis], adapter: Adapter, tau: float) -> Appended:
    """Grow the bases so that the adapter is represented within a relative error of ``tau``.

    Both sides together may leave out ``tau * ||dW||`` over all sites. What is left out is chosen over all sites at
    once, weakest directions first, so that the fewest directions are spent: projecting out a set of residual
    directions costs at most the sum of their squared strengths.

    Args:
        bases: current bases; the adapter's sites must be among them.
        adapter: ambient factors, any rank per site.
        tau: relative budget in [0, 1); 0 keeps everything above rounding noise.

    Returns:
        New directions in float32 and the adapter's cores in the grown coordinates.
    """
    sites, norm2 = _decompose(bases, adapter)
    kept = _choose(sites, tau * tau * norm2)
    transition: dict[str, SiteTransition] = {}
    cores: dict[str, Core] = {}
    for site, parts in sites.items():
        basis = bases[site]
        q_out, q_in = kept[site]
        if q_out or q_in:
            transition[site] = SiteTransition(
                append_left=parts.directions[0][:, :q_out].to(torch.float32),
                append_right=parts.directions[1][:, :q_in].to(torch.float32),
            )
        out = parts.coordinates[0][: basis.k_out + q_out]
        in_ = parts.coordinates[1][: basis.k_in + q_in]
        core = compress_core(out, in_, rank=min(out.shape[0], in_.shape[0]))
        if core is not None:
            cores[site] = core
    return Appended(transition, cores)


def _decompose(bases: Mapping[str, SiteBasis], adapter: Adapter) -> tuple[dict[str, _Site], float]:
    """Return every site's residual directions, and the squared norm of the adapter over all sites."""
    items = {
        site: (float64(bases[site].left), float64(bases[site].right), float64(f.out), float64(f.in_))
        for site, f in adapter.items()
        if f.rank > 0
    }
    found: dict[str, _Site] = {}
    norm2 = 0.0
    for names, (left, right, out, in_) in stacks(items):
        u, s, v = canonical(out, in_)
        norm2 += float((s * s).sum())
        us = u * s.unsqueeze(-2)
        vs = v * s.unsqueeze(-2)
        q_left, s_left = _directions(left, us)
        q_right, s_right = _directions(right, vs)
        coordinates_out = torch.cat([left.mT @ us, q_left.mT @ us], dim=-2)
        coordinates_in = torch.cat([right.mT @ v, q_right.mT @ v], dim=-2)
        for i, name in enumerate(names):
            found[name] = _Site(
                directions=(q_left[i], q_right[i]),
                strengths=(s_left[i], s_right[i]),
                coordinates=(coordinates_out[i], coordinates_in[i]),
                floor=RANK_EPS * float(s[i].max()) if s.shape[-1] else 0.0,
            )
    return found, norm2


def _directions(basis: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal directions (..., d, q) of ``(I - basis basis.T) x`` and their strengths (..., q)."""
    q, r = thin_qr(residual(basis, x))
    u, s, _ = small_svd(r)
    directions = q @ u
    # Weak directions are numerically anything; project once more so that the strong ones stay orthogonal to the basis.
    return residual(basis, directions), s


def _choose(sites: Mapping[str, _Site], budget2: float) -> dict[str, tuple[int, int]]:
    """Return how many leading directions to keep per site and side, spending at most ``budget2`` on the others."""
    counts = {site: [0, 0] for site in sites}
    offers: list[tuple[float, str, int]] = []
    for site, parts in sites.items():
        for side in (0, 1):
            for strength in parts.strengths[side].tolist():
                if strength > parts.floor:
                    offers.append((strength * strength, site, side))
                    counts[site][side] += 1
    spent = 0.0
    for energy, site, side in sorted(offers):
        spent += energy
        if spent > budget2:
            break
        counts[site][side] -= 1
    return {site: (out, in_) for site, (out, in_) in counts.items()}
