"""Which sites are computed together: stacks split while sites grow differently, and join again at their caps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from share_core.streaming.chunks import padded_columns, up_to_date
from share_core.streaming.compact import Growth
from share_core.streaming.state import SiteStack, StreamPolicy, TaskChunk

Counts = list[tuple[int, int]]
"""New directions (out, in) per site of a stack."""


def split_stack(
    stack: SiteStack, growth: Growth, counts: Counts, policy: StreamPolicy
) -> list[tuple[SiteStack, Growth, tuple[int, int]]]:
    """Return the parts of a stack that gain and lose equal numbers of directions, each with its growth and caps.

    Sites that will be at their cap need not gain equally: the weaker ones carry zero columns, which are dropped first.
    """
    groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for i, (name, (q_out, q_in)) in enumerate(zip(stack.names, counts, strict=True)):
        cap_out, cap_in = policy.caps(name)
        key = (_outcome(stack.k_out, q_out, cap_out), _outcome(stack.k_in, q_in, cap_in))
        groups.setdefault(key, []).append(i)
    parts = []
    for index in groups.values():
        q_out, q_in = max(counts[i][0] for i in index), max(counts[i][1] for i in index)
        part = stack if len(groups) == 1 else picked(stack, index)
        parts.append((part, _picked_growth(growth, index, stack, q_out, q_in), policy.caps(stack.names[index[0]])))
    return parts


def _outcome(k: int, q: int, cap: int) -> tuple[int, int]:
    return (k + q, 0) if k + q <= cap else (cap, 1)


def picked(stack: SiteStack, index: Sequence[int]) -> SiteStack:
    """Return some sites of a stack, by position."""
    rows = torch.tensor(list(index), device=stack.left.device)
    return SiteStack(
        names=tuple(stack.names[i] for i in index),
        left=stack.left[rows],
        right=stack.right[rows],
        gram_left=stack.gram_left[rows],
        gram_right=stack.gram_right[rows],
        settled=tuple(_picked_chunk(chunk, rows) for chunk in stack.settled),
        recent=_picked_chunk(stack.recent, rows),
    )


def _picked_chunk(chunk: TaskChunk, rows: Tensor) -> TaskChunk:
    def of(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows]

    return replace(
        chunk,
        out=chunk.out[rows],
        in_=chunk.in_[rows],
        norms=chunk.norms[rows],
        bounds=chunk.bounds[rows],
        map_left=of(chunk.map_left),
        map_right=of(chunk.map_right),
        pending=of(chunk.pending),
    )


def _picked_growth(growth: Growth, index: Sequence[int], stack: SiteStack, q_out: int, q_in: int) -> Growth:
    whole = len(index) == len(stack.names)
    rows = slice(None) if whole else torch.tensor(list(index), device=stack.left.device)
    return replace(
        growth,
        add_left=growth.add_left[rows][..., :q_out],
        add_right=growth.add_right[rows][..., :q_in],
        out=growth.out[rows][..., : stack.k_out + q_out, :],
        in_=growth.in_[rows][..., : stack.k_in + q_in, :],
        norms=growth.norms[rows],
        bounds=growth.bounds[rows],
    )


def join_stacks(stacks: Sequence[SiteStack], policy: StreamPolicy) -> tuple[SiteStack, ...]:
    """Return the stacks with those of equal shape that have reached their caps joined; they never part again.

    While sites still grow, equal sizes are a coincidence that is not worth copying bases for.
    """
    groups: dict[tuple[int, ...], list[SiteStack]] = {}
    loose: list[SiteStack] = []
    for stack in stacks:
        if all(policy.caps(name) == (stack.k_out, stack.k_in) for name in stack.names):
            groups.setdefault((stack.left.shape[-2], stack.right.shape[-2], stack.k_out, stack.k_in), []).append(stack)
        else:
            loose.append(stack)
    return (*loose, *(group[0] if len(group) == 1 else _joined(group) for group in groups.values()))


def _joined(group: Sequence[SiteStack]) -> SiteStack:
    k = (group[0].k_out, group[0].k_in)
    settled = [
        _joined_chunks([up_to_date(chunk, k) for chunk in same])
        for same in zip(*(stack.settled for stack in group), strict=True)
    ]
    return SiteStack(
        names=tuple(name for stack in group for name in stack.names),
        left=torch.cat([stack.left for stack in group]),
        right=torch.cat([stack.right for stack in group]),
        gram_left=torch.cat([stack.gram_left for stack in group]),
        gram_right=torch.cat([stack.gram_right for stack in group]),
        settled=tuple(settled),
        recent=_joined_chunks([stack.recent for stack in group]),
    )


def _joined_chunks(chunks: Sequence[TaskChunk]) -> TaskChunk:
    """Return chunks of equal tasks, in current coordinates, over the sites of all of them."""
    p = max(chunk.out.shape[-1] for chunk in chunks)
    measured = chunks[0].measured
    for chunk in chunks[1:]:
        measured = measured & chunk.measured
    return replace(
        chunks[0],
        out=torch.cat([padded_columns(chunk.out, p) for chunk in chunks]),
        in_=torch.cat([padded_columns(chunk.in_, p) for chunk in chunks]),
        norms=torch.cat([chunk.norms for chunk in chunks]),
        bounds=torch.cat([chunk.bounds for chunk in chunks]),
        measured=measured,
    )
