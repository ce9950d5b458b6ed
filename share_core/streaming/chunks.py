"""The coefficients of many tasks, carried lazily.

The newest tasks follow every change of the bases at once. Older ones settle into chunks that keep the coordinates of
the moment they were made, with one small map per chunk to the current ones; when a chunk meets one of similar size,
both are brought up to date and joined. With T tasks there are at most about ``log_4 T`` chunks and a task is moved as
often, so the cost per merge all but does not grow with T.

Error bounds of a settled task, between two exact measurements: a compaction removes ``delta_j`` from a core, orthogonal
to what it keeps, so ``delta_j^2 = ||C_j-1||^2 - ||C_j||^2``. The triangle inequality over m compactions and then
Cauchy-Schwarz give ``sum delta_j <= sqrt(m (||C_0||^2 - ||C_m||^2))``, which needs the first and the last core only.
While a chunk waits, its tasks share ``delta_j <= sqrt((tr N_o^T G_o N_o + tr N_i^T G_i N_i) / w_t)`` instead.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from share_core.linalg import float64
from share_core.streaming.project import ROUNDING
from share_core.streaming.reflect import Reflector, reflect_rows
from share_core.streaming.state import SiteStack, TaskChunk, empty_chunk

GROWTH = 4
"""A chunk is joined to the one before it unless that one is at least this many times larger."""
_SLICE = 16
"""Tasks that are brought up to date together: bounds the float64 working memory."""


def padded_rows(factor: Tensor, rows: int) -> Tensor:
    """Return (..., k, c) with zero rows appended: coordinates in directions that came later."""
    missing = rows - factor.shape[-2]
    if missing == 0:
        return factor
    return torch.cat([factor, factor.new_zeros(*factor.shape[:-2], missing, factor.shape[-1])], dim=-2)


def padded_columns(factor: Tensor, columns: int) -> Tensor:
    """Return (..., k, p) with zero columns appended."""
    missing = columns - factor.shape[-1]
    if missing == 0:
        return factor
    return torch.cat([factor, factor.new_zeros(*factor.shape[:-1], missing)], dim=-1)


def follow(chunk: TaskChunk, left: Reflector | None, right: Reflector | None, consume: bool) -> TaskChunk:
    """Return a settled chunk whose maps also take a compaction into account; ``consume`` overwrites the old maps."""
    return replace(
        chunk,
        map_left=_followed(chunk.map_left, chunk.out.shape[-2], left, consume),
        map_right=_followed(chunk.map_right, chunk.in_.shape[-2], right, consume),
    )


def _followed(current: Tensor | None, k_then: int, by: Reflector | None, consume: bool) -> Tensor | None:
    if by is None:
        return current
    if current is None:
        eye = torch.eye(k_then, dtype=torch.float64, device=by.z.device)
        current, consume = eye.expand(by.z.shape[0], k_then, k_then), False
    return reflect_rows(current, by, consume)


def up_to_date(chunk: TaskChunk, k: tuple[int, int]) -> TaskChunk:
    """Return the chunk in current coordinates, without maps, its bounds brought up to date.

    Args:
        chunk: any chunk of the stack.
        k: current (k_out, k_in).
    """
    if chunk.cuts == 0:
        return replace(chunk, out=padded_rows(chunk.out, k[0]), in_=padded_rows(chunk.in_, k[1]))
    outs, ins, bounds = [], [], []
    for start in range(0, chunk.count, _SLICE):
        part = slice(start, start + _SLICE)
        out, in_ = float64(chunk.out[:, part]), float64(chunk.in_[:, part])
        new_out, new_in = _mapped(chunk.map_left, out, k[0]), _mapped(chunk.map_right, in_, k[1])
        lost2 = (_norm2(out, in_) - _norm2(new_out, new_in)).clamp_min(0)
        lost = (chunk.cuts * lost2).sqrt()
        if chunk.pending is not None:
            lost = torch.minimum(lost, chunk.pending.unsqueeze(-1) / chunk.weights[part].sqrt())
        bounds.append(chunk.bounds[:, part] + lost + (1 + chunk.cuts / 16) * ROUNDING * chunk.norms[:, part])
        outs.append(new_out.to(chunk.out.dtype))
        ins.append(new_in.to(chunk.in_.dtype))
    return replace(
        chunk,
        out=torch.cat(outs, dim=1),
        in_=torch.cat(ins, dim=1),
        bounds=torch.cat(bounds, dim=1),
        measured=torch.zeros_like(chunk.measured),
        map_left=None,
        map_right=None,
        pending=None,
        cuts=0,
    )


def current_bounds(chunk: TaskChunk) -> Tensor:
    """Return the error bounds (S, n) of a chunk without bringing its cores up to date."""
    if chunk.pending is None:
        return chunk.bounds
    waiting = chunk.pending.unsqueeze(-1) / chunk.weights.sqrt() + chunk.cuts * ROUNDING * chunk.norms
    return chunk.bounds + waiting


def joined(a: TaskChunk, b: TaskChunk) -> TaskChunk:
    """Return two chunks of one stack, both in current coordinates, as one."""
    p = max(a.out.shape[-1], b.out.shape[-1])
    return TaskChunk(
        tasks=a.tasks + b.tasks,
        out=torch.cat([padded_columns(a.out, p), padded_columns(b.out, p)], dim=1),
        in_=torch.cat([padded_columns(a.in_, p), padded_columns(b.in_, p)], dim=1),
        weights=torch.cat([a.weights, b.weights]),
        norms=torch.cat([a.norms, b.norms], dim=1),
        bounds=torch.cat([a.bounds, b.bounds], dim=1),
        measured=torch.cat([a.measured, b.measured]),
    )


def taken(chunk: TaskChunk, index: list[int]) -> TaskChunk:
    """Return some tasks of a chunk, by position."""
    return replace(
        chunk,
        tasks=tuple(chunk.tasks[i] for i in index),
        out=chunk.out[:, index],
        in_=chunk.in_[:, index],
        weights=chunk.weights[index],
        norms=chunk.norms[:, index],
        bounds=chunk.bounds[:, index],
        measured=chunk.measured[index],
    )


def settle(stack: SiteStack, window: int) -> SiteStack:
    """Return the stack with its oldest ``window`` recent tasks settled once there are twice as many."""
    if stack.recent.count < 2 * window:
        return stack
    count = stack.recent.count
    old, young = taken(stack.recent, list(range(window))), taken(stack.recent, list(range(window, count)))
    gram_left, gram_right = grams(old)
    settled = [*stack.settled, old]
    k = (stack.k_out, stack.k_in)
    while len(settled) > 1 and settled[-2].count < GROWTH * settled[-1].count:
        last, before = settled.pop(), settled.pop()
        settled.append(joined(up_to_date(before, k), up_to_date(last, k)))
    return replace(
        stack,
        gram_left=stack.gram_left + gram_left,
        gram_right=stack.gram_right + gram_right,
        settled=tuple(settled),
        recent=young,
    )


def grams(chunk: TaskChunk) -> tuple[Tensor, Tensor]:
    """Return ``sum_t w_t C_t C_t^T`` (S, k_out, k_out) and ``sum_t w_t C_t^T C_t`` of a chunk, float64."""
    s, _, k_out, _ = chunk.out.shape
    k_in = chunk.in_.shape[-2]
    left = torch.zeros(s, k_out, k_out, dtype=torch.float64, device=chunk.out.device)
    right = torch.zeros(s, k_in, k_in, dtype=torch.float64, device=chunk.out.device)
    for i in range(chunk.count):
        out, in_ = float64(chunk.out[:, i]), float64(chunk.in_[:, i])
        left += chunk.weights[i] * (out @ (in_.mT @ in_)) @ out.mT
        right += chunk.weights[i] * (in_ @ (out.mT @ out)) @ in_.mT
    return left, right


def without(stack: SiteStack, tasks: frozenset[str]) -> SiteStack:
    """Return the stack without some tasks; the Grams are made anew from what stays. Bases do not change."""
    if not any(task in tasks for chunk in stack.chunks for task in chunk.tasks):
        return stack
    k = (stack.k_out, stack.k_in)

    def kept(chunk: TaskChunk) -> TaskChunk:
        return taken(chunk, [i for i, task in enumerate(chunk.tasks) if task not in tasks])

    settled = tuple(up_to_date(rest, k) for chunk in stack.settled if (rest := kept(chunk)).count)
    recent = kept(stack.recent)
    zero = empty_chunk(len(stack.names), *k, stack.left.device)
    gram_left, gram_right = grams(zero)
    for chunk in settled:
        more_left, more_right = grams(chunk)
        gram_left, gram_right = gram_left + more_left, gram_right + more_right
    return replace(stack, settled=settled, recent=recent, gram_left=gram_left, gram_right=gram_right)


def _mapped(by: Tensor | None, factor: Tensor, k: int) -> Tensor:
    """Return the coordinates now, (S, n, k, p)."""
    moved = factor if by is None else by.unsqueeze(1) @ factor
    return padded_rows(moved, k)


def _norm2(out: Tensor, in_: Tensor) -> Tensor:
    """Return ``||out in_^T||^2`` (S, n)."""
    return ((out.mT @ out) * (in_.mT @ in_)).sum((-2, -1))
