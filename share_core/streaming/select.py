"""Which directions to keep: HOOI in which the newest tasks count one by one and all others through Gram matrices.

The full problem, ``min sum_t w_t ||C_t - P_o P_o^T C_t P_i P_i^T||^2``, couples both sides of every task, so a sweep
over all tasks costs time proportional to their number. Of the settled tasks only the one-sided Grams are used, as in
HOSVD; of the newest ones the coupled terms are exact. On the real pools of docs/evidence/merge.md this ends within 4 %
of HOOI over everything, in every order of arrival that was tried.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from share_core.linalg import float64
from share_core.streaming.project import slabs

DENSE_EIGEN = 96
"""Up to this size the eigenvectors come from a full decomposition; above, from inverse iteration."""
ITERATIONS = 5
"""Steps of inverse iteration; each weakens what has energy e against what has none by e / (e + RIDGE)."""
GUARDS = 4
"""Columns that are iterated besides those that are wanted, and left out in the end: with one column alone, two energies
that differ by a fifth are not told apart in so few steps."""
RIDGE = 1e-6
"""Share of the largest diagonal entry added before factorising: energies below it are rounding noise of float32."""


@dataclass(frozen=True)
class Cores:
    """Cores of the newest tasks in grown coordinates, ``sqrt(w_t)`` folded into ``out``."""

    out: Tensor
    """(S, n, K_out, p)"""
    in_: Tensor
    """(S, n, K_in, p)"""


def weakest(gram: Tensor, count: int) -> Tensor:
    """Return an orthonormal basis (S, K, count) of the directions with least energy in ``gram`` (S, K, K).

    Exact for small matrices. For large ones :data:`ITERATIONS` steps of block inverse iteration, started from the last
    coordinates (the newcomers), a few more than wanted: one Cholesky factorisation instead of a full decomposition.
    Where eigenvalues lie too close to be told apart, so do the energies, and either choice is as good.
    """
    k = gram.shape[-1]
    gram = (gram + gram.mT) / 2
    if k <= DENSE_EIGEN or 2 * count >= k:
        return _bottom(gram, count)
    largest = torch.diagonal(gram, dim1=-2, dim2=-1).amax(-1)
    scale = torch.where(largest > 0, largest, 1.0)[:, None, None]
    eye = torch.eye(k, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex((gram / scale).to(torch.float32) + RIDGE * eye)
    if bool(failed.any()):
        return _bottom(gram, count)
    width = min(k, count + GUARDS)
    x = eye[:, k - width :].expand(*gram.shape[:-2], k, width)
    for _ in range(ITERATIONS):
        x = torch.linalg.solve_triangular(factor, x, upper=False)
        x = torch.linalg.qr(torch.linalg.solve_triangular(factor.mT, x, upper=True)).Q
    q = torch.linalg.qr(x.to(torch.float64)).Q
    kept: Tensor = q @ _bottom(q.mT @ gram.to(torch.float64) @ q, count)
    return kept


def _bottom(gram: Tensor, count: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[..., :count]


def choose_dropped(
    gram_left: Tensor, gram_right: Tensor, newest: Cores, drop: tuple[int, int], sweeps: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return the directions to drop on both sides, (S, K_out, drop[0]) and (S, K_in, drop[1]); None where 0.

    Args:
        gram_left: (S, k_out, k_out) of the settled tasks; directions they do not know carry nothing.
        gram_right: (S, k_in, k_in).
        newest: tasks that count one by one.
        drop: how many to drop on the left and on the right.
        sweeps: HOOI sweeps after the HOSVD start (De Lathauwer et al., 2000).
    """
    parts = [
        _choose(gram_left[s], gram_right[s], Cores(newest.out[s], newest.in_[s]), drop, sweeps)
        for s in slabs(gram_left)
    ]
    return _whole([left for left, _ in parts]), _whole([right for _, right in parts])


def _whole(parts: list[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


def _choose(
    gram_left: Tensor, gram_right: Tensor, newest: Cores, drop: tuple[int, int], sweeps: int
) -> tuple[Tensor | None, Tensor | None]:
    """Choose for the sites of one slab."""
    left, right = None, None
    gram_left, gram_right = _grown(gram_left, newest.out.shape[-2]), _grown(gram_right, newest.in_.shape[-2])
    if drop[1]:
        right = weakest(gram_right + _gram(newest.in_, newest.out), drop[1])
    if drop[0]:
        left = weakest(gram_left + _gram(newest.out, _kept(newest.in_, right)), drop[0])
    for sweep in range(sweeps if drop[0] and drop[1] else 0):
        right = weakest(gram_right + _gram(newest.in_, _kept(newest.out, left)), drop[1])
        if sweep + 1 < sweeps:
            left = weakest(gram_left + _gram(newest.out, _kept(newest.in_, right)), drop[0])
    return left, right


def _grown(gram: Tensor, k: int) -> Tensor:
    missing = k - gram.shape[-1]
    return torch.nn.functional.pad(gram, (0, missing, 0, missing))


def _kept(factor: Tensor, dropped: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the factor and what of it lies in the dropped directions, (S, n, m, p)."""
    if dropped is None:
        return factor, None
    return factor, dropped.to(factor.dtype).mT.unsqueeze(1) @ factor


def _gram(side: Tensor, other: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
    """Return ``sum_t side_t (other_t^T other_t) side_t^T`` (S, K, K) in float64, less the dropped part of other."""
    factor, lost = other if isinstance(other, tuple) else (other, None)
    inner = factor.mT @ factor
    if lost is not None:
        inner = inner - lost.mT @ lost
    s, _, k, _ = side.shape
    weighted = (side @ inner).transpose(1, 2).reshape(s, k, -1)
    return float64(weighted @ side.transpose(1, 2).reshape(s, k, -1).mT)
