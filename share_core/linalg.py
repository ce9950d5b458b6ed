"""A small vocabulary for low-rank matrices held as two factors. Every numerical hazard has one named function.

All functions work on stacks: leading dimensions ``...`` are batched, so that sites of equal shape are computed
together. ``out`` is (..., d_out, r), ``in_`` is (..., d_in, r) and stands for the matrix ``out @ in_.mT``. Work is done
in float64; callers round to float32 once, at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from share_core.errors import NonFiniteError

RANK_EPS = 1e-7
"""Singular values below this share of the largest are rounding noise of float32 inputs, not directions."""

NORM_FLOOR = 1e-30
"""Squared norms below this count as zero."""


def float64(x: Tensor) -> Tensor:
    """Return ``x`` in float64 on its own device: products of float32 factors lose half their digits otherwise."""
    return x.to(torch.float64)


def require_finite(x: Tensor, what: str) -> None:
    """Refuse NaN and infinity before any decomposition.

    An SVD of infinity returns infinite singular values without a word, and one NaN poisons every later version.

    Raises:
        NonFiniteError: naming the tensor and how many of its values are not finite.
    """
    if not x.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(x)):  # one pass; NaN is passed on
        return
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise NonFiniteError(f"{what} holds {bad} values that are NaN or infinite, of {x.numel()}: nothing was merged")


def safe_ratio(part: float, whole: float) -> float:
    """Return ``part / whole``, and 0 when the whole is zero: a task that changes nothing has lost nothing."""
    return part / whole if whole > 0 else 0.0


def thin_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q (..., d, q), R (..., q, r) with q = min(d, r). Works for zero columns."""
    if x.shape[-1] == 0:
        return x, x.new_zeros((*x.shape[:-2], 0, 0))
    q, r = torch.linalg.qr(x, mode="reduced")
    return q, r


def small_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V with ``x = U diag(S) V.mT``; empty factors for an empty matrix."""
    if 0 in x.shape[-2:]:
        batch = x.shape[:-2]
        return (
            x.new_zeros((*batch, x.shape[-2], 0)),
            x.new_zeros((*batch, 0)),
            x.new_zeros((*batch, x.shape[-1], 0)),
        )
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u, s, vh.mT


def canonical(out: Tensor, in_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (..., d_out, q), S (..., q), V (..., d_in, q) with ``out @ in_.mT = U diag(S) V.mT``.

    Nothing depends on the gauge ``(out G, in_ G^-T)`` afterwards (MATH section 2, canonical form). Signs are fixed so
    that the largest entry of every column of U is positive. q = min(d_out, d_in, r); singular values may be zero.
    """
    q_out, r_out = thin_qr(float64(out))
    q_in, r_in = thin_qr(float64(in_))
    u, s, v = small_svd(r_out @ r_in.mT)
    u, v = q_out @ u, q_in @ v
    if u.shape[-1] == 0:
        return u, s, v
    largest = u.abs().argmax(dim=-2, keepdim=True)
    sign = torch.where(u.gather(-2, largest) < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, v * sign


def numerical_rank(s: Tensor) -> Tensor:
    """Return how many of the descending singular values ``s`` (..., q) are more than rounding noise, (...)."""
    if s.shape[-1] == 0:
        return torch.zeros(s.shape[:-1], dtype=torch.long)
    return (s > RANK_EPS * s[..., :1]).sum(dim=-1)


def balanced(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Split ``U diag(S) V.mT`` evenly into two factors: both get sqrt(S)."""
    root = s.sqrt().unsqueeze(-2)
    return u * root, v * root


def residual(basis: Tensor, x: Tensor) -> Tensor:
    """Return ``(I - basis basis.mT) x``, projected twice.

    One projection leaves components of the size of the rounding error of ``x``, which are large beside a small
    residual; a second one removes them ("twice is enough", Kahan and Parlett).
    """
    for _ in range(2):
        x = x - basis @ (basis.mT @ x)
    return x


def difference_norm(out_a: Tensor, in_a: Tensor, out_b: Tensor, in_b: Tensor) -> Tensor:
    """Return the Frobenius norm (...) of ``out_a in_a.mT - out_b in_b.mT``.

    Computed from the QR factors of both sides. The usual ``|a|^2 + |b|^2 - 2<a,b>`` cancels and cannot resolve errors
    below 1e-8 of the norm.
    """
    _, r_out = thin_qr(torch.cat([float64(out_a), -float64(out_b)], dim=-1))
    _, r_in = thin_qr(torch.cat([float64(in_a), float64(in_b)], dim=-1))
    norm: Tensor = torch.linalg.matrix_norm(r_out @ r_in.mT)
    return norm


def product_norm(out: Tensor, in_: Tensor) -> Tensor:
    """Return the Frobenius norm (...) of ``out @ in_.mT``."""
    _, r_out = thin_qr(float64(out))
    _, r_in = thin_qr(float64(in_))
    norm: Tensor = torch.linalg.matrix_norm(r_out @ r_in.mT)
    return norm


def top_eigenvectors(gram: Tensor, count: int) -> Tensor:
    """Return the eigenvectors (..., k, count) of the symmetric ``gram`` (..., k, k) with the largest eigenvalues."""
    symmetric = (gram + gram.mT) / 2
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[..., -count:].flip(-1) if count else vectors[..., :0]


def orthonormalising(gram: Tensor) -> Tensor:
    """Return ``gram^(-1/2)`` for a Gram matrix near the identity.

    Bases are stored in float32, so each rotation leaves them orthonormal only to 1e-7, and the error would add up over
    thousands of compactions; folding this factor into the rotation takes it out every time.
    """
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    root: Tensor = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT
    return root


def left_inverse(p: Tensor) -> Tensor:
    """Return ``(p.mT p)^-1 p.mT`` (..., k', k) for ``p`` (..., k, k') of full column rank."""
    p = float64(p)
    inverse: Tensor = torch.linalg.solve(p.mT @ p, p.mT)
    return inverse


EXACT_BELOW = 512
"""Smaller side up to which :func:`leading_right_vectors` decomposes the matrix itself."""


def leading_right_vectors(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` leading right singular vectors (n, count) of ``x`` (m, n) and the singular values (count,).

    Large matrices are first restricted to what a random start becomes in a few power iterations (Halko, Martinsson and
    Tropp, arXiv 0909.4061, algorithm 4.4): the strongest directions of a gradient stand out, and an exact
    decomposition of 4,096 columns takes half a minute. Always the same start, so the result is a function of ``x``.
    """
    count = min(count, *x.shape)
    if min(x.shape) > EXACT_BELOW and count:
        draw = torch.Generator().manual_seed(0)
        start = torch.randn(x.shape[1], count + 8, generator=draw, dtype=x.dtype).to(x.device)
        q, _ = thin_qr(x @ start)
        for _ in range(4):
            q, _ = thin_qr(x.T @ q)
            q, _ = thin_qr(x @ q)
        _, s, v = small_svd(q.T @ x)
    else:
        _, s, v = small_svd(x)
    return v[:, :count], s[:count]
