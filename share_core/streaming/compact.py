"""From grown coordinates back to the cap: one group of sites that gains and loses the same numbers of directions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from share_core.linalg import float64
from share_core.streaming.chunks import follow, padded_columns, padded_rows
from share_core.streaming.project import ROUNDING
from share_core.streaming.reflect import Reflector, reflect_basis, reflect_gram, reflect_rows, reflector
from share_core.streaming.select import Cores, choose_dropped
from share_core.streaming.state import SiteStack, TaskChunk


@dataclass(frozen=True)
class Growth:
    """What one adapter adds to a group of sites, before anything is dropped."""

    add_left: Tensor
    """(S, d_out, q_out) float32, orthonormal and orthogonal to the basis, or zero columns."""
    add_right: Tensor
    """(S, d_in, q_in)"""
    out: Tensor
    """(S, K_out, p) float64: the new core in grown coordinates."""
    in_: Tensor
    """(S, K_in, p)"""
    norms: Tensor
    """(S,) float64: ``||dW||``."""
    bounds: Tensor
    """(S,) float64: what appending left out."""
    task: str
    weight: float


@dataclass(frozen=True)
class StackStep:
    """How the bases of some sites changed: ``left' = [left add_left] P polish``. None: the identity."""

    names: tuple[str, ...]
    add_left: Tensor
    add_right: Tensor
    reflect_left: Reflector | None = None
    reflect_right: Reflector | None = None
    polish_left: Tensor | None = None
    """(S, k_out, k_out) float64"""
    polish_right: Tensor | None = None


def grow(
    stack: SiteStack, by: Growth, caps: tuple[int, int], sweeps: int, consume: bool
) -> tuple[SiteStack, StackStep]:
    """Append to every site of a stack and drop what passes ``caps`` (out, in).

    Old tasks do not move by a single bit on a side that has room. With ``consume`` the stack's own bases are
    overwritten, which saves a copy of them.
    """
    k_out, k_in = stack.k_out + by.add_left.shape[-1], stack.k_in + by.add_right.shape[-1]
    grown = TaskChunk(
        tasks=(*stack.recent.tasks, by.task),
        out=_appended(stack.recent.out, by.out, k_out),
        in_=_appended(stack.recent.in_, by.in_, k_in),
        weights=torch.cat([stack.recent.weights, stack.recent.weights.new_tensor([by.weight])]),
        norms=torch.cat([stack.recent.norms, by.norms.unsqueeze(-1)], dim=-1),
        bounds=torch.cat([stack.recent.bounds, by.bounds.unsqueeze(-1)], dim=-1),
        measured=torch.cat([stack.recent.measured, stack.recent.measured.new_zeros(1)]),
    )
    drop = (max(0, k_out - caps[0]), max(0, k_in - caps[1]))
    step = StackStep(stack.names, by.add_left, by.add_right)
    if drop == (0, 0):
        return replace(
            stack,
            left=_widened(stack.left, by.add_left),
            right=_widened(stack.right, by.add_right),
            gram_left=_padded_gram(stack.gram_left, k_out),
            gram_right=_padded_gram(stack.gram_right, k_in),
            recent=grown,
        ), step
    newest = Cores(grown.out * _root_weights(grown), grown.in_)
    lost_left, lost_right = choose_dropped(stack.gram_left, stack.gram_right, newest, drop, sweeps)
    left = None if lost_left is None else reflector(lost_left)
    right = None if lost_right is None else reflector(lost_right)
    pending = (_energy(stack.gram_left, left) + _energy(stack.gram_right, right)).clamp_min(0).sqrt()
    settled = tuple(
        replace(
            follow(chunk, left, right, consume),
            pending=pending if chunk.pending is None else chunk.pending + pending,
            cuts=chunk.cuts + 1,
        )
        for chunk in stack.settled
    )
    return SiteStack(
        names=stack.names,
        left=_turned(stack.left, by.add_left, left, consume),
        right=_turned(stack.right, by.add_right, right, consume),
        gram_left=_turned_gram(stack.gram_left, left, k_out, consume),
        gram_right=_turned_gram(stack.gram_right, right, k_in, consume),
        settled=settled,
        recent=_cut(grown, left, right),
    ), replace(step, reflect_left=left, reflect_right=right)


def polish(stack: SiteStack, step: StackStep, tolerance: float) -> tuple[SiteStack, StackStep]:
    """Return the stack with bases that are orthonormal to rounding again, where they have drifted past ``tolerance``.

    One Newton-Schulz step, ``L (3 I - L^T L) / 2``: float32 products leave 1e-7 each, and thousands add up. The cores
    keep their numbers; what that costs is below the rounding allowance that is charged.
    """
    left, right = _newton_schulz(stack.left, tolerance), _newton_schulz(stack.right, tolerance)
    if left is None and right is None:
        return stack, step
    charge = ROUNDING * stack.recent.norms
    recent = replace(
        stack.recent, bounds=stack.recent.bounds + charge, measured=torch.zeros_like(stack.recent.measured)
    )
    settled = tuple(
        replace(c, bounds=c.bounds + ROUNDING * c.norms, measured=torch.zeros_like(c.measured)) for c in stack.settled
    )
    stack = replace(
        stack,
        left=stack.left if left is None else stack.left @ left.to(stack.left.dtype),
        right=stack.right if right is None else stack.right @ right.to(stack.right.dtype),
        recent=recent,
        settled=settled,
    )
    return stack, replace(step, polish_left=left, polish_right=right)


def _newton_schulz(basis: Tensor, tolerance: float) -> Tensor | None:
    gram = float64(basis.mT @ basis)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    if gram.numel() == 0 or float((gram - eye).abs().max()) <= tolerance:
        return None
    return 1.5 * eye - 0.5 * gram


def _appended(old: Tensor, new: Tensor, rows: int) -> Tensor:
    p = max(old.shape[-1], new.shape[-1])
    return torch.cat(
        [padded_columns(padded_rows(old, rows), p), padded_columns(new.to(old.dtype), p).unsqueeze(1)], dim=1
    )


def _padded_gram(gram: Tensor, k: int) -> Tensor:
    return padded_columns(padded_rows(gram, k), k)


def _widened(basis: Tensor, add: Tensor) -> Tensor:
    return torch.cat([basis, add], dim=-1) if add.shape[-1] else basis


def _turned(basis: Tensor, add: Tensor, by: Reflector | None, consume: bool) -> Tensor:
    if by is None:
        return _widened(basis, add)
    keep, k = by.z.shape[-2], basis.shape[-1]
    if keep < k:  # the cap was lowered: old directions leave beside the new ones
        extra = torch.cat([basis[..., keep:], add], dim=-1)
        return reflect_basis(basis[..., :keep].clone(memory_format=torch.contiguous_format), extra, by)
    base = torch.cat([basis, add[..., : keep - k]], dim=-1) if keep > k else basis if consume else basis.clone()
    return reflect_basis(base, add[..., keep - k :].contiguous(), by)


def _energy(gram: Tensor, by: Reflector | None) -> Tensor:
    if by is None:
        return gram.new_zeros(gram.shape[0])
    known = by.dropped[..., : gram.shape[-1], :]
    return ((gram @ known) * known).sum((-2, -1))


def _turned_gram(gram: Tensor, by: Reflector | None, k: int, consume: bool) -> Tensor:
    return _padded_gram(gram, k) if by is None else reflect_gram(gram, by, consume)


def _cut(chunk: TaskChunk, left: Reflector | None, right: Reflector | None) -> TaskChunk:
    """Return recent tasks after a compaction, each charged with exactly what it loses.

    ``||C||^2 - ||P_o^T C P_i||^2 = ||N_o^T C||^2 + ||P_o^T C N_i||^2``: the right-hand side does not cancel.
    """
    weighted2 = torch.zeros_like(chunk.bounds)
    out, in_ = chunk.out, chunk.in_
    root = _root_weights(chunk)  # squares of norms would leave float32's range; those of relative sizes do not
    if left is not None:
        weighted2 = weighted2 + _product2(left.dropped.to(out.dtype).mT.unsqueeze(1) @ out * root, in_)
        out = _reflected(out, left)
    if right is not None:
        weighted2 = weighted2 + _product2(out * root, right.dropped.to(in_.dtype).mT.unsqueeze(1) @ in_)
        in_ = _reflected(in_, right)
    lost2 = weighted2 / chunk.weights
    return replace(
        chunk,
        out=out,
        in_=in_,
        bounds=chunk.bounds + lost2.clamp_min(0).sqrt() + ROUNDING * chunk.norms,
        measured=torch.zeros_like(chunk.measured),
    )


def _root_weights(chunk: TaskChunk) -> Tensor:
    """Return ``sqrt(w_t)`` (n, 1, 1), to be multiplied with ``out``."""
    return chunk.weights.sqrt().to(chunk.out.dtype)[:, None, None]


def _reflected(rows: Tensor, by: Reflector) -> Tensor:
    s, n, k, p = rows.shape
    moved = reflect_rows(rows.transpose(1, 2).reshape(s, k, n * p), by)
    return moved.reshape(s, moved.shape[-2], n, p).transpose(1, 2).contiguous()


def _product2(out: Tensor, in_: Tensor) -> Tensor:
    """Return ``||out in_^T||^2`` (S, n) in float64."""
    return (float64(out.mT @ out) * float64(in_.mT @ in_)).sum((-2, -1))
