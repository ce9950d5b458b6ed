"""Dropping a few directions from a basis without a dense rotation.

To go from K to ``K - m`` basis vectors one may keep *any* orthonormal basis of the complement of the dropped directions
N (K, m). A dense choice P costs ``2 d K (K - m)`` per basis. Here P is the leading part of a block Householder
reflector (Schreiber and Parlett, 1988), which differs from ``[I; 0]`` by rank m only::

    N <- N O,  O orthogonal such that N2 (the last m rows of N) is symmetric positive semi-definite
    H = I - (N + E)(I + N2)^-1 (N + E)^T,   E = [0; I]        H N = -E,  H^T H = I
    P = H[:, :K-m] = [I; 0] - (N + E) Z^T,  Z = N1 (I + N2)^-1

so that ``[B X] P = B - (B N1 + X (N2 + I)) Z^T`` costs ``4 d K m``: at k = 256 and m = 16 an eighth. It also moves the
old directions as little as an orthonormal basis can.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from share_core.linalg import float64
from share_core.streaming.project import product, slabs


@dataclass(frozen=True)
class Reflector:
    """``P = [I; 0] - shifted Z^T`` for a stack of sites; all float64."""

    dropped: Tensor
    """N (S, K, m), orthonormal columns."""
    z: Tensor
    """Z (S, K - m, m)."""

    @property
    def shifted(self) -> Tensor:
        """``N + E`` (S, K, m)."""
        m = self.dropped.shape[-1]
        shifted = self.dropped.clone()
        shifted[..., -m:, :] += torch.eye(m, dtype=shifted.dtype, device=shifted.device)
        return shifted

    def dense(self) -> Tensor:
        """Return P (S, K, K - m)."""
        k = self.z.shape[-2]
        eye = torch.eye(self.dropped.shape[-2], k, dtype=self.z.dtype, device=self.z.device)
        return eye - self.shifted @ self.z.mT


def reflector(dropped: Tensor) -> Reflector:
    """Return the reflector that drops the span of ``dropped`` (S, K, m), m >= 1, orthonormal columns."""
    dropped = float64(dropped)
    m = dropped.shape[-1]
    a, _, bh = torch.linalg.svd(dropped[..., -m:, :])
    dropped = dropped @ (a @ bh).mT
    n2 = dropped[..., -m:, :]
    eye = torch.eye(m, dtype=dropped.dtype, device=dropped.device)
    z = torch.linalg.solve(eye + (n2 + n2.mT) / 2, dropped[..., :-m, :].mT).mT
    return Reflector(dropped, z)


def reflect_basis(base: Tensor, extra: Tensor, by: Reflector) -> Tensor:
    """Return ``[base extra] P`` for ``base`` (S, d, K - m), ``extra`` (S, d, m). ``base`` is overwritten."""
    m = extra.shape[-1]
    shifted, z = by.shifted.to(base.dtype), by.z.to(base.dtype)
    for s in slabs(base):
        w = product(base[s], shifted[s, :-m]) + extra[s] @ shifted[s, -m:]
        if w.shape[0] == 1:
            base[s][0].addmm_(w[0], z[s][0].T, alpha=-1)
        else:
            base[s].baddbmm_(w, z[s].mT, alpha=-1)
    return base


def reflect_rows(rows: Tensor, by: Reflector, consume: bool = False) -> Tensor:
    """Return ``P^T [rows; 0]`` (S, K - m, c) for coordinates ``rows`` (S, k, c), k <= K.

    Args:
        rows: coordinates; directions beyond their k rows are new and carry nothing yet.
        by: the reflector.
        consume: overwrite ``rows`` where they are large enough.
    """
    k, known = by.z.shape[-2], rows.shape[-2]
    shifted, z = by.shifted[..., :known, :].to(rows.dtype), by.z.to(rows.dtype)
    kept = _of_height(rows, k, consume)
    for s in slabs(rows):
        kept[s].baddbmm_(z[s], shifted[s].mT @ rows[s], alpha=-1)
    return kept


def reflect_gram(gram: Tensor, by: Reflector, consume: bool = False) -> Tensor:
    """Return ``P^T [gram 0; 0 0] P`` for a symmetric ``gram`` (S, k, k), k <= K: new directions carry nothing yet.

    With ``F = N + E`` and ``Y = G F - Z (F^T G F) / 2`` this is ``G - Z Y^T - Y Z^T`` while k <= K - m: rank m again.
    """
    m, missing = by.z.shape[-1], by.z.shape[-2] - gram.shape[-1]
    if missing < 0:
        return reflect_rows(reflect_rows(gram, by).mT.contiguous(), by)
    if missing:
        gram = torch.nn.functional.pad(gram, (0, missing, 0, missing))
    elif not consume:
        gram = gram.clone()
    top = by.shifted[..., :-m, :]
    for s in slabs(gram):
        half = gram[s] @ top[s]
        y = half - by.z[s] @ (top[s].mT @ half) / 2
        gram[s].baddbmm_(torch.cat([by.z[s], y], dim=-1), torch.cat([y, by.z[s]], dim=-1).mT, alpha=-1)
    return gram


def _of_height(rows: Tensor, k: int, consume: bool) -> Tensor:
    """Return the first k rows as a tensor to write to, zero rows appended where there are fewer."""
    missing = k - rows.shape[-2]
    if missing > 0:
        return torch.nn.functional.pad(rows, (0, 0, 0, missing))
    if missing < 0:
        return rows[..., :k, :].clone()
    return rows if consume else rows.clone()
