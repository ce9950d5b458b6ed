"""Compaction: fewer basis vectors for all tasks at once (MATH section 2).

Choose rotations ``P_o`` (k_o x k'), ``P_i`` (k_i x k') minimising ``sum_t w_t ||C_t - P_o P_o^T C_t P_i P_i^T||^2``:
a Tucker-2 decomposition of the stacked cores, by HOSVD start and HOOI sweeps (De Lathauwer et al., 2000). All of it
happens on k x k matrices and sees every task, so it is global and not incremental.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from share_core.batching import stacks
from share_core.ledger import ROUNDING_ALLOWANCE
from share_core.linalg import (
    NORM_FLOOR,
    difference_norm,
    float64,
    orthonormalising,
    product_norm,
    top_eigenvectors,
)
from share_core.space import carry_basis
from share_core.types import Cores, SiteBasis, SiteTransition


@dataclass(frozen=True)
class Rotation:
    """The two rotations of one site; None where that side keeps its size."""

    left: Tensor | None
    """(k_out, k_out')"""
    right: Tensor | None
    """(k_in, k_in')"""


def task_weight(norm: float) -> float:
    """Return ``1 / ||dW||^2``: every task's relative error counts the same, whatever its size.

    It is also the cheapest defence against a contributor with a huge norm.
    """
    return 1.0 / max(norm * norm, NORM_FLOOR)


def compact(
    bases: Mapping[str, SiteBasis],
    appended: Mapping[str, SiteTransition],
    cores: Mapping[str, Cores],
    weights: Mapping[str, float],
    k_max: int,
    sweeps: int,
) -> dict[str, SiteTransition]:
    """Return the transition with rotations at every site that has outgrown ``k_max``.

    Args:
        bases: bases before the append.
        appended: what the append adds, by site.
        cores: all tasks in the grown coordinates.
        weights: per task, see :func:`task_weight`.
        k_max: largest allowed number of columns per side.
        sweeps: HOOI sweeps after the HOSVD start.
    """
    transition = dict(appended)
    grown = {site: carry_basis(site, bases[site], step) for site, step in appended.items()}
    full = {site: b for site, b in grown.items() if max(b.k_out, b.k_in) > k_max}
    stacked = {site: _stack_tasks(site, basis, cores, weights) for site, basis in full.items()}
    for names, (out, in_) in stacks(stacked):
        for i, rotation in enumerate(_hooi(out, in_, k_max, sweeps)):
            site = names[i]
            step = appended[site]
            transition[site] = SiteTransition(
                append_left=step.append_left,
                append_right=step.append_right,
                rotate_left=_corrected(full[site].left, rotation.left),
                rotate_right=_corrected(full[site].right, rotation.right),
            )
    return transition


def _stack_tasks(
    site: str, basis: SiteBasis, cores: Mapping[str, Cores], weights: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Return all tasks' cores at a site as (T, k_out, p), (T, k_in, p), weights folded in, ranks padded with zeros."""
    present = [(core, weights[task] ** 0.5) for task, own in cores.items() if (core := own.get(site)) is not None]
    rank = max(core.rank for core, _ in present)
    out = torch.zeros(len(present), basis.k_out, rank, dtype=torch.float64)
    in_ = torch.zeros(len(present), basis.k_in, rank, dtype=torch.float64)
    for i, (core, root_weight) in enumerate(present):
        out[i, :, : core.rank] = float64(core.out) * root_weight
        in_[i, :, : core.rank] = float64(core.in_)
    return out, in_


def _hooi(out: Tensor, in_: Tensor, k_max: int, sweeps: int) -> list[Rotation]:
    """Return one rotation per site for stacked factors (n, T, k_out, p) and (n, T, k_in, p)."""
    n, _, k_out, _ = out.shape
    k_in = in_.shape[2]
    cut_out, cut_in = k_out > k_max, k_in > k_max
    p_in = top_eigenvectors(_gram(in_, out), k_max) if cut_in else None
    p_out = top_eigenvectors(_gram(out, _projected(in_, p_in)), k_max) if cut_out else None
    for _ in range(sweeps if cut_out and cut_in else 0):
        p_in = top_eigenvectors(_gram(in_, _projected(out, p_out)), k_max)
        p_out = top_eigenvectors(_gram(out, _projected(in_, p_in)), k_max)
    return [Rotation(None if p_out is None else p_out[i], None if p_in is None else p_in[i]) for i in range(n)]


def _projected(factor: Tensor, p: Tensor | None) -> Tensor:
    """Return ``P^T factor`` for every task: (n, T, k', p)."""
    return factor if p is None else p.mT.unsqueeze(1) @ factor


def _gram(side: Tensor, other: Tensor) -> Tensor:
    """Return ``sum_t side_t (other_t^T other_t) side_t^T`` (n, k, k) for (n, T, k, p) factors."""
    weighted = side @ (other.mT @ other)
    return torch.einsum("ntkp,ntlp->nkl", weighted, side)


def _corrected(basis: Tensor, p: Tensor | None) -> Tensor | None:
    """Return ``p`` times the small factor that makes ``basis @ p`` orthonormal again, in float32."""
    if p is None:
        return None
    turned = float64(basis) @ p
    return (p @ orthonormalising(turned.mT @ turned)).to(torch.float32)


def compaction_losses(
    before: Mapping[str, Cores], after: Mapping[str, Cores], transition: Mapping[str, SiteTransition]
) -> dict[str, dict[str, float]]:
    """Return per task and site ``||C - P_o C' P_i^T||``, what the rotation removed.

    Args:
        before: cores in the grown coordinates.
        after: the same cores as they are stored after the rotation.
        transition: with the rotations; sites without any are skipped.
    """
    pairs: dict[tuple[str, str], tuple[Tensor, ...]] = {}
    for task, own in before.items():
        for site, core in own.items():
            step = transition.get(site)
            if step is None or (step.rotate_left is None and step.rotate_right is None):
                continue
            stored = after[task][site]
            pairs[task, site] = (
                core.out,
                core.in_,
                _rotated(step.rotate_left, stored.out),
                _rotated(step.rotate_right, stored.in_),
            )
    losses: dict[str, dict[str, float]] = {task: {} for task in before}
    for keys, (out_a, in_a, out_b, in_b) in stacks(pairs):
        lost = difference_norm(out_a, in_a, out_b, in_b) + ROUNDING_ALLOWANCE * product_norm(out_a, in_a)
        for (task, site), loss in zip(keys, lost.tolist(), strict=True):
            losses[task][site] = loss
    return losses


def _rotated(p: Tensor | None, factor: Tensor) -> Tensor:
    return float64(factor) if p is None else float64(p) @ float64(factor)
