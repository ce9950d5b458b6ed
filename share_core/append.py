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
class _Side:
    """One side of one site between the decomposition and the choice of directions."""

    directions: Tensor
    """(d, q): orthonormal residual directions, strongest first."""
    strengths: list[float]
    """How much of dW each direction carries: descending singular values."""
    coordinates: Tensor
    """(k + q, r): ``[basis directions].T`` times the adapter's factor on this side."""
    floor: float
    """Strengths at or below this are rounding noise."""


def append(bases: Mapping[str, SiteBasis], adapter: Adapter, tau: float) -> Appended:
    """Grow the bases so that the adapter is represented within a relative error of ``tau``.

    First the left side may leave out ``tau ||dW|| / sqrt(2)`` over all sites, then the right side, seen through the new
    left bases, what remains of the budget. One side after the other, because a component dropped on the left needs no
    direction on the right, and because the two losses are then orthogonal and add exactly. On each side the weakest
    directions over all sites go first, so that the fewest directions are spent.

    Args:
        bases: current bases; the adapter's sites must be among them.
        adapter: ambient factors, any rank per site.
        tau: relative budget in [0, 1); 0 keeps everything above rounding noise.

    Returns:
        New directions in float32 and the adapter's cores in the grown coordinates.
    """
    lefts, right_factors, norm2 = _left_sides(bases, adapter)
    q_out, spent = choose_directions(_above_noise(lefts), tau * tau * norm2 / 2)
    seen = {site: side.coordinates[: bases[site].k_out + q_out[site]] for site, side in lefts.items()}
    rights = _right_sides(bases, right_factors, seen, {site: side.floor for site, side in lefts.items()})
    q_in, _ = choose_directions(_above_noise(rights), tau * tau * norm2 - spent)
    transition: dict[str, SiteTransition] = {}
    cores: dict[str, Core] = {}
    for site, right in rights.items():
        if q_out[site] or q_in[site]:
            transition[site] = SiteTransition(
                append_left=lefts[site].directions[:, : q_out[site]].to(torch.float32),
                append_right=right.directions[:, : q_in[site]].to(torch.float32),
            )
        in_ = right.coordinates[: bases[site].k_in + q_in[site]]
        core = compress_core(seen[site], in_, rank=min(seen[site].shape[0], in_.shape[0]))
        if core is not None:
            cores[site] = core
    return Appended(transition, cores)


def _left_sides(bases: Mapping[str, SiteBasis], adapter: Adapter) -> tuple[dict[str, _Side], dict[str, Tensor], float]:
    """Return every left side, the right factors V (d_in, r), and the squared norm of the adapter over all sites."""
    items = {
        site: (float64(bases[site].left), float64(factors.out), float64(factors.in_))
        for site, factors in adapter.items()
        if factors.rank > 0
    }
    sides: dict[str, _Side] = {}
    right_factors: dict[str, Tensor] = {}
    norm2 = 0.0
    for names, (left, out, in_) in stacks(items):
        u, s, v = canonical(out, in_)
        norm2 += float((s * s).sum())
        weighted = u * s.unsqueeze(-2)
        q, r = thin_qr(residual(left, weighted))
        floors = (RANK_EPS * s.amax(dim=-1)).tolist()
        sides.update(_sides(names, left, q, r, weighted, floors))
        right_factors.update(zip(names, v, strict=True))
    return sides, right_factors, norm2


def _right_sides(
    bases: Mapping[str, SiteBasis],
    right_factors: Mapping[str, Tensor],
    seen: Mapping[str, Tensor],
    floors: Mapping[str, float],
) -> dict[str, _Side]:
    """Return every right side of ``left' seen V.T``; ``seen`` (k_out', r) are the coordinates in the new left basis."""
    items = {site: (float64(bases[site].right), v, seen[site]) for site, v in right_factors.items()}
    sides: dict[str, _Side] = {}
    for names, (right, v, weights) in stacks(items):
        q, r = thin_qr(residual(right, v))
        sides.update(_sides(names, right, q, r @ weights.mT, v, [floors[name] for name in names]))
    return sides


def _sides(
    names: list[str], basis: Tensor, q: Tensor, r: Tensor, factor: Tensor, floors: list[float]
) -> dict[str, _Side]:
    """Return the sides of stacked sites whose residual is ``q @ r`` (n, d, ·)."""
    u, s, _ = small_svd(r)
    # Weak directions are numerically anything; projecting once more keeps the strong ones orthogonal to the basis.
    directions = residual(basis, q @ u)
    coordinates = torch.cat([basis.mT @ factor, directions.mT @ factor], dim=-2)
    return {name: _Side(directions[i], s[i].tolist(), coordinates[i], floors[i]) for i, name in enumerate(names)}


def _above_noise(sides: Mapping[str, _Side]) -> dict[str, list[float]]:
    return {site: [value for value in side.strengths if value > side.floor] for site, side in sides.items()}


def choose_directions(strengths: Mapping[str, list[float]], budget2: float) -> tuple[dict[str, int], float]:
    """Return how many leading directions to keep per site, and the energy (at most ``budget2``) of those left out.

    Args:
        strengths: descending singular values by site; those that are rounding noise are not among them.
        budget2: largest energy to leave out over all sites.
    """
    counts = {site: len(own) for site, own in strengths.items()}
    spent = 0.0
    for energy, site in sorted((value * value, site) for site, own in strengths.items() for value in own):
        if spent + energy > budget2:
            break
        spent += energy
        counts[site] -= 1
    return counts, spent
