"""Canonical form and residual directions of stacked factors: large products in float32, small ones in float64.

Everything large is a matrix product. Decompositions happen on r x r Gram matrices in float64: of float32 data they
resolve directions down to 1e-8 of the strongest, one digit below what float32 factors carry themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from share_core.linalg import float64, small_svd

FLOOR = 2e-6
"""Directions weaker than this share of a site's strongest are rounding noise of float32 projections."""
ROUNDING = 4e-6
"""Share of a task's norm at a site that one merge may lose by rounding to float32 alone."""


SLAB_BYTES = 4 << 20
"""Bytes of basis in one slab on a CPU."""


@dataclass(frozen=True)
class Canonical:
    """``dW = U diag(S) V^T`` for a stack: U (S, d_out, r) and V (S, d_in, r) float32, ``s`` (S, r) float64, descending.

    Columns whose singular value is noise are zero.
    """

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True)
class Side:
    """One side of a stack against its basis."""

    directions: Tensor
    """(S, d, r): orthonormal, orthogonal to the basis, strongest first; columns without strength are zero."""
    strengths: Tensor
    """(S, r) float64: how much of dW each direction carries, descending; noise is zero."""
    noise2: Tensor
    """(S,) float64: energy of what was dropped as noise."""
    inside: Tensor
    """(S, k, r) float64: coordinates in the basis."""
    outside: Tensor
    """(S, r, r) float64: coordinates in ``directions``."""


def canonical_stack(out: Tensor, in_: Tensor) -> Canonical:
    """Return the singular value decomposition of ``out in_^T`` for (S, d_out, r), (S, d_in, r), by way of the Grams.

    With ``out = Q_o R_o`` and ``R_o^T R_o = out^T out``, the singular values are those of ``R_o R_i^T`` (MATH section
    2, canonical form); nothing depends on the gauge.
    """
    root_out, pinv_out = _root(out)
    root_in, pinv_in = _root(in_)
    u, s, v = small_svd(root_out @ root_in.mT)
    alive = s > FLOOR * s[..., :1]
    s = torch.where(alive, s, 0.0)
    mask = alive.unsqueeze(-2)
    return Canonical(
        u=out @ ((pinv_out @ u) * mask).to(out.dtype),
        s=s,
        v=in_ @ ((pinv_in @ v) * mask).to(in_.dtype),
    )


def residual_side(basis: Tensor, factor: Tensor, weights: Tensor) -> Side:
    """Return what ``factor weights`` needs beyond ``basis``, slab by slab; arguments as for :func:`_residual_slab`."""
    parts = [_residual_slab(basis[s], factor[s], weights[s]) for s in slabs(basis)]
    if len(parts) == 1:
        return parts[0]
    return Side(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Side)))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` for stacks; a stack of one site takes the plain product, which uses all cores on it."""
    return torch.mm(a[0], b[0]).unsqueeze(0) if a.shape[0] == 1 else a @ b


def minus_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``x - a @ b`` for stacks."""
    if a.shape[0] == 1:
        return torch.addmm(x[0], a[0], b[0], alpha=-1).unsqueeze(0)
    return torch.baddbmm(x, a, b, alpha=-1)


def slabs(basis: Tensor) -> list[slice]:
    """Return the slices of a stack (S, d, k) to work on one after the other.

    On a CPU a slab's basis fits the cache, so that every pass over it after the first costs no memory traffic, which is
    what bounds products with a few columns. Elsewhere one slab is everything.
    """
    count = basis.shape[0]
    size = max(1, basis[0].numel() * basis.element_size()) if count else 1
    width = max(1, SLAB_BYTES // size) if basis.device.type == "cpu" else max(1, count)
    return [slice(start, start + width) for start in range(0, count, width)]


def _residual_slab(basis: Tensor, factor: Tensor, weights: Tensor) -> Side:
    """Return what ``factor weights`` needs beyond ``basis``.

    Projected before and after normalising: one projection leaves components of the size of float32 rounding, which are
    large beside a weak direction once that is scaled to unit length.

    Args:
        basis: (S, d, k) orthonormal, float32.
        factor: (S, d, r) orthonormal columns (or zero), float32.
        weights: (S, r, c) float64: what the columns of ``factor`` are multiplied by in dW.
    """
    coordinates = product(basis.mT, factor)
    rest = minus_product(factor, basis, coordinates)
    gram = _gram64(rest)
    energy, vectors = torch.linalg.eigh(_symmetric(weights.mT @ gram @ weights))
    strengths = energy.clamp_min(0).sqrt().flip(-1)[..., : factor.shape[-1]]
    scale = weights.square().sum((-2, -1)).sqrt().unsqueeze(-1)
    alive = strengths > FLOOR * scale
    noise2 = torch.where(alive, 0.0, strengths.square()).sum(-1)
    inverse = torch.where(alive, strengths, 1.0).reciprocal() * alive
    mix = weights @ vectors.flip(-1)[..., : factor.shape[-1]] * inverse.unsqueeze(-2)
    directions = rest @ mix.to(rest.dtype)
    directions = minus_product(directions, basis, product(basis.mT, directions))
    directions = directions @ _whitening(_gram64(directions), alive).to(rest.dtype)
    return Side(
        directions=directions,
        strengths=torch.where(alive, strengths, 0.0),
        noise2=noise2,
        inside=float64(coordinates),
        outside=float64(directions.mT @ rest),
    )


def _root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return R and R^+ (S, r, r) with ``x^T x = R^T R`` and ``x R^+`` orthonormal; noise directions are zero in R^+."""
    energy, vectors = torch.linalg.eigh(_gram64(x))
    size = energy.clamp_min(0).sqrt()
    alive = size > 1e-7 * size[..., -1:]
    root = torch.where(alive, size, 0.0).unsqueeze(-1) * vectors.mT
    inverse = torch.where(alive, size, 1.0).reciprocal() * alive
    return root, vectors * inverse.unsqueeze(-2)


def _whitening(gram: Tensor, alive: Tensor) -> Tensor:
    """Return W (S, r, r), nearly the identity, with ``W^T gram W = I`` on the living columns and 0 on the others."""
    dead = torch.diag_embed((~alive).to(gram.dtype))
    factor = torch.linalg.cholesky(_symmetric(gram) + dead)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse.mT * alive.unsqueeze(-2)


def _gram64(x: Tensor) -> Tensor:
    wide = float64(x)
    return wide.mT @ wide


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2
