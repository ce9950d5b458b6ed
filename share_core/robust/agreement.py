"""How contributions lie to each other, from their factors alone: no dense matrix is ever formed.

With ``dW_i = O_i I_i^T`` the inner product is ``<dW_i, dW_j> = trace(I_i O_i^T O_j I_j^T) = sum((O_i^T O_j) * (I_i^T
I_j))``, summed over sites. It depends on the products only, so the gauge ``(O G, I G^-T)``, which defeats every test on
one factor alone, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from share_core.linalg import float64
from share_core.types import Adapter


@dataclass(frozen=True)
class Geometry:
    """Inner products of the contributions to one task, (n, n) in float64."""

    whole: Tensor
    """``<dW_i, dW_j>``."""
    changes: Tensor | None
    """``<dW_i - dW_0, dW_j - dW_0>`` with what the task began with; None where it has just begun."""

    def among(self, places: Sequence[int]) -> Geometry:
        """Return the same of some of them."""
        own = list(places)
        changes = None if self.changes is None else self.changes[own][:, own]
        return Geometry(self.whole[own][:, own], changes)


def geometry(adapters: Sequence[Adapter], start: Adapter | None = None) -> Geometry:
    """Return the inner products of ``adapters`` and of what each changes in ``start``."""
    if start is None:
        return Geometry(inner_products(adapters), None)
    products = inner_products([*adapters, start])
    whole, cross, own = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    return Geometry(whole, whole - cross[:, None] - cross[None, :] + own)


def inner_products(adapters: Sequence[Adapter]) -> Tensor:
    """Return ``<dW_i, dW_j>`` (n, n) in float64, over all sites; a site that one leaves out counts as zero there."""
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for site in sorted({site for adapter in adapters for site in adapter}):
        present = [i for i, adapter in enumerate(adapters) if site in adapter]
        ranks = [adapters[i][site].rank for i in present]
        out = torch.cat([float64(adapters[i][site].out) for i in present], dim=1)
        in_ = torch.cat([float64(adapters[i][site].in_) for i in present], dim=1)
        owner = torch.repeat_interleave(torch.tensor(present), torch.tensor(ranks))
        start = 0
        for i, rank in zip(present, ranks, strict=True):  # row by row: all ranks together may be large
            own = slice(start, start + rank)
            products = ((out[:, own].mT @ out) * (in_[:, own].mT @ in_)).sum(dim=0)
            total[i].index_add_(0, owner, products)
            start += rank
    return (total + total.mT) / 2


def norms_of(gram: Tensor) -> Tensor:
    """Return ``||dW_i||`` (n,)."""
    return torch.diagonal(gram).clamp_min(0).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """Return the cosine (n, n) of every pair; 0 with a contribution that is zero."""
    norms = norms_of(gram)
    scale = torch.where(norms > 0, norms, 1.0).reciprocal() * (norms > 0)
    return gram * scale[:, None] * scale[None, :]
