"""Taking one adapter into a streamed subspace, at a cost that does not depend on how many it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from share_core.append import choose_directions
from share_core.errors import ConfigError, NonFiniteError, TensorShapeError
from share_core.linalg import NORM_FLOOR, float64, require_finite
from share_core.streaming.chunks import settle, without
from share_core.streaming.compact import Growth, StackStep, grow, polish
from share_core.streaming.project import ROUNDING, Canonical, Side, canonical_stack, residual_side
from share_core.streaming.reflect import Reflector
from share_core.streaming.stacking import Counts, join_stacks, split_stack
from share_core.streaming.state import SiteStack, StreamPolicy, StreamState, stacked_factors
from share_core.types import Adapter, SiteTransition

LARGEST_NORM = 1e30
"""Adapters with a larger Frobenius norm would overflow float32 cores. Those whose squared norm is below
:data:`share_core.linalg.NORM_FLOOR` change nothing, and their bound says that all of them is lost."""
POLISH_EVERY = 64
"""Versions between two checks that the bases are still orthonormal."""
POLISH_ABOVE = 1e-6
"""Largest entry of ``L^T L - I`` that is left alone."""


@dataclass(frozen=True)
class Folded:
    """Result of one fold."""

    state: StreamState
    steps: tuple[StackStep, ...]
    """How the bases changed; empty for an adapter that changes nothing."""

    @property
    def transition(self) -> dict[str, SiteTransition]:
        """The change by site, as it is broadcast (MATH section 2, transition), rotations written out densely."""
        return {name: site for step in self.steps for name, site in _site_transitions(step)}


def fold(
    state: StreamState,
    task: str,
    adapter: Adapter,
    policy: StreamPolicy,
    *,
    share: float = 1.0,
    consume: bool = False,
) -> Folded:
    """Take one adapter in as the content of ``task``; an older content of that task is replaced.

    Append, then drop directions where a site has outgrown its cap, then let old tasks settle. The cost is that of a few
    products of the bases with the adapter's factors, whatever the number of tasks.

    Args:
        state: the current version.
        task: name of the task.
        adapter: ambient factors of any float dtype. Sites may be missing, ranks may differ, zero is allowed.
        policy: caps and budgets.
        share: the contributor's share; the task weighs ``share / ||dW||^2`` (MATH section 2, weight).
        consume: overwrite the bases of ``state``, which must not be used afterwards. Saves a copy of them.

    Raises:
        NonFiniteError: if a factor holds NaN or infinity, or their product is beyond what float32 can hold.
        TensorShapeError: if a site is unknown or a factor does not fit it.
        ConfigError: if the share is not above 0.
    """
    if not 0 < share < math.inf:
        raise ConfigError(f"a contributor's share must be above 0, got {share}")
    check_adapter(state, adapter)
    if task in state.tasks:
        state = drop(state, [task])
    forms = [canonical_stack(*stacked_factors(stack, adapter)) for stack in state.stacks]
    norm2 = sum(float(form.s.square().sum()) for form in forms)
    if not norm2 <= LARGEST_NORM**2:
        raise NonFiniteError(
            f"task {task!r} is absurdly large: its norm is {math.sqrt(norm2):.3g}, at most {LARGEST_NORM:.0e} is "
            "taken; check the adapter's scale"
        )
    weight = share / max(norm2, NORM_FLOOR)
    stacks: list[SiteStack] = []
    steps: list[StackStep] = []
    for stack, (growth, counts) in zip(state.stacks, _growths(state, forms, task, weight, policy), strict=True):
        for part, own, caps in split_stack(stack, growth, counts, policy):
            grown, step = grow(part, own, caps, policy.sweeps, consume)
            if (state.version + 1) % POLISH_EVERY == 0:
                grown, step = polish(grown, step, POLISH_ABOVE)
            stacks.append(settle(grown, policy.window))
            steps.append(step)
    joined = join_stacks(stacks, policy)
    return Folded(StreamState(joined, (*state.tasks, task), state.version + 1), tuple(filter(_changes, steps)))


def drop(state: StreamState, tasks: Iterable[str]) -> StreamState:
    """Return the state without some tasks. Bases stay as they are, so nobody else moves; the version does not change.

    What they taught the bases stays in the bases until it is compacted away. To forget without a trace, fold the
    originals of the remaining tasks anew.
    """
    gone = frozenset(tasks)
    return replace(
        state,
        stacks=tuple(without(stack, gone) for stack in state.stacks),
        tasks=tuple(task for task in state.tasks if task not in gone),
    )


def check_adapter(state: StreamState, adapter: Adapter) -> None:
    """Refuse an adapter that does not fit the sites of a space.

    Raises:
        NonFiniteError: if a factor holds NaN or infinity.
        TensorShapeError: if a site is unknown or a factor does not fit it.
    """
    shapes = {name: (s.left.shape[-2], s.right.shape[-2]) for s in state.stacks for name in s.names}
    for site, factors in adapter.items():
        expected = shapes.get(site)
        if expected is None:
            raise TensorShapeError(f"site {site!r} is not part of this space")
        out, in_ = factors.out, factors.in_
        if (out.shape[0], in_.shape[0]) != expected or out.shape[1:] != in_.shape[1:] or out.ndim != 2:
            raise TensorShapeError(
                f"adapter at {site!r}: expected factors {expected[0]} x r and {expected[1]} x r, "
                f"got {tuple(out.shape)} and {tuple(in_.shape)}"
            )
        require_finite(out, f"adapter at {site!r}, output factor")
        require_finite(in_, f"adapter at {site!r}, input factor")


def _growths(
    state: StreamState, forms: list[Canonical], task: str, weight: float, policy: StreamPolicy
) -> list[tuple[Growth, Counts]]:
    """Return what the adapter adds to every stack, within ``tau`` over all sites.

    The left side first, then the right side as it is seen through the new left bases: the two losses are then
    orthogonal and add exactly (docs/adr/0001).
    """
    names = [stack.names for stack in state.stacks]
    sizes = [form.s.square().sum(-1).sqrt() for form in forms]
    if sum(float(size.square().sum()) for size in sizes) < NORM_FLOOR:
        forms = [replace(form, s=torch.zeros_like(form.s)) for form in forms]
    budget2 = policy.tau**2 * sum(float(form.s.square().sum()) for form in forms)
    lefts = [
        residual_side(stack.left, form.u, torch.diag_embed(form.s))
        for stack, form in zip(state.stacks, forms, strict=True)
    ]
    q_out, spent = choose_directions(_strengths(names, lefts), budget2 / 2)
    outs = [
        _coordinates(side, [q_out[n] for n in own], form.s) for own, side, form in zip(names, lefts, forms, strict=True)
    ]
    rights = [
        residual_side(stack.right, form.v, _seen(out))
        for stack, form, out in zip(state.stacks, forms, outs, strict=True)
    ]
    q_in, _ = choose_directions(_strengths(names, rights), budget2 - spent)
    growths = []
    for stack, form, norms, left, right, seen in zip(state.stacks, forms, sizes, lefts, rights, outs, strict=True):
        counts = [(q_out[name], q_in[name]) for name in stack.names]
        ignored2 = (norms.square() - form.s.square().sum(-1)).clamp_min(0)
        left_out = _left_out(left, [q for q, _ in counts]) + _left_out(right, [q for _, q in counts])
        out, in_, cut2 = _to_rank(seen, _coordinates(right, [q for _, q in counts], None), policy.rank)
        growth = Growth(
            add_left=_masked(left.directions, [q for q, _ in counts]),
            add_right=_masked(right.directions, [q for _, q in counts]),
            out=out,
            in_=in_,
            norms=norms,
            bounds=(left_out + cut2 + ignored2).sqrt() + ROUNDING * norms,
            task=task,
            weight=weight,
        )
        growths.append((growth, counts))
    return growths


def _strengths(names: list[tuple[str, ...]], sides: list[Side]) -> dict[str, list[float]]:
    return {
        name: [value for value in own if value > 0]
        for stack, side in zip(names, sides, strict=True)
        for name, own in zip(stack, side.strengths.tolist(), strict=True)
    }


def _keep(counts: list[int], width: int, like: Tensor) -> Tensor:
    """Return a mask (S, width): the leading ``counts`` columns of every site."""
    return torch.arange(width, device=like.device) < torch.tensor(counts, device=like.device).unsqueeze(-1)


def _masked(directions: Tensor, counts: list[int]) -> Tensor:
    return directions * _keep(counts, directions.shape[-1], directions).unsqueeze(-2)


def _coordinates(side: Side, counts: list[int], s: Tensor | None) -> Tensor:
    """Return ``[basis directions]^T factor`` (S, k + r, r), rows of directions that are not kept zero; times ``s``."""
    outside = side.outside * _keep(counts, side.outside.shape[-2], side.outside).unsqueeze(-1)
    rows = torch.cat([side.inside, outside], dim=-2)
    return rows if s is None else rows * s.unsqueeze(-2)


def _seen(out: Tensor) -> Tensor:
    """Return X (S, r, r) with ``X X^T = out^T out``: how strongly the left side still sees each column of V."""
    energy, vectors = torch.linalg.eigh(out.mT @ out)
    root: Tensor = vectors * energy.clamp_min(0).sqrt().unsqueeze(-2)
    return root


def _left_out(side: Side, counts: list[int]) -> Tensor:
    """Return the energy (S,) of the directions that were not kept."""
    dropped = ~_keep(counts, side.strengths.shape[-1], side.strengths)
    return (side.strengths.square() * dropped).sum(-1) + side.noise2


def _to_rank(out: Tensor, in_: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the core cut to ``rank`` by its singular values, and the energy (S,) that cost."""
    if rank is None or out.shape[-1] <= rank:
        return out, in_, out.new_zeros(out.shape[0])
    form = canonical_stack(float64(out), float64(in_))
    return (
        form.u[..., :rank] * form.s[..., :rank].unsqueeze(-2),
        form.v[..., :rank],
        form.s[..., rank:].square().sum(-1),
    )


def _changes(step: StackStep) -> bool:
    widths = (step.add_left.shape[-1], step.add_right.shape[-1])
    return any(widths) or any(
        p is not None for p in (step.polish_left, step.polish_right, step.reflect_left, step.reflect_right)
    )


def _site_transitions(step: StackStep) -> list[tuple[str, SiteTransition]]:
    left, right = _dense(step.reflect_left, step.polish_left), _dense(step.reflect_right, step.polish_right)
    return [
        (
            name,
            SiteTransition(
                append_left=step.add_left[i],
                append_right=step.add_right[i],
                rotate_left=None if left is None else left[i].to(torch.float32),
                rotate_right=None if right is None else right[i].to(torch.float32),
            ),
        )
        for i, name in enumerate(step.names)
    ]


def _dense(by: Reflector | None, polished: Tensor | None) -> Tensor | None:
    """Return ``P polish`` (S, K, k), None for the identity."""
    if by is None:
        return polished
    return by.dense() if polished is None else by.dense() @ polished
