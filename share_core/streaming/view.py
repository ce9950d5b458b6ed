"""Between a streamed subspace and the published form of it: bases and cores by site, ledgers by task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from share_core.errors import TensorShapeError
from share_core.ledger import TaskLedger
from share_core.linalg import NORM_FLOOR, float64
from share_core.space import compress_core
from share_core.streaming.chunks import current_bounds, grams, up_to_date
from share_core.streaming.project import FLOOR, ROUNDING, canonical_stack
from share_core.streaming.stacking import picked
from share_core.streaming.state import SiteStack, StreamState, TaskChunk, empty_stream, seeded_stream, stacked_factors
from share_core.types import Adapter, Core, Cores, SiteBasis, SiteSpec, Space


def settled_view(state: StreamState) -> StreamState:
    """Return the same version with every task in current coordinates; takes time proportional to their number."""
    return replace(state, stacks=tuple(_current(stack) for stack in state.stacks))


def bases_of(state: StreamState) -> dict[str, SiteBasis]:
    """Return the bases by site; views, not copies."""
    return {
        name: SiteBasis(stack.left[i], stack.right[i]) for stack in state.stacks for i, name in enumerate(stack.names)
    }


def space_of(state: StreamState) -> Space:
    """Return the published form of this version: bases, and every task's cores in float32."""
    cores: dict[str, dict[str, Core]] = {task: {} for task in state.tasks}
    for stack in settled_view(state).stacks:
        for chunk in stack.chunks:
            for j, task in enumerate(chunk.tasks):
                for i, name in enumerate(stack.names):
                    if (core := _core(chunk, i, j)) is not None:
                        cores[task][name] = core
    return Space(version=state.version, bases=bases_of(state), cores=cores)


def ledger_of(state: StreamState) -> dict[str, TaskLedger]:
    """Return the error ledger by task: bounds, exact only where they were measured and nothing was cut since."""
    norms: dict[str, dict[str, float]] = {task: {} for task in state.tasks}
    bounds: dict[str, dict[str, float]] = {task: {} for task in state.tasks}
    measured = dict.fromkeys(state.tasks, True)
    for stack in state.stacks:
        for chunk in stack.chunks:
            now, own = current_bounds(chunk).tolist(), chunk.norms.tolist()
            exact = chunk.measured.tolist() if chunk.cuts == 0 else [False] * chunk.count
            for j, task in enumerate(chunk.tasks):
                measured[task] = measured[task] and exact[j]
                for i, name in enumerate(stack.names):
                    if own[i][j] > 0:
                        norms[task][name], bounds[task][name] = own[i][j], now[i][j]
    return {task: TaskLedger(norms[task], bounds[task], measured[task]) for task in state.tasks}


def stream_of(space: Space, ledger: Mapping[str, TaskLedger], device: torch.device | str = "cpu") -> StreamState:
    """Return a state that continues from a published space; the inverse of :func:`space_of`.

    Args:
        space: bases and cores.
        ledger: norms and bounds of every task of the space.
        device: where to compute.
    """
    seeded = seeded_stream(space.bases, device)
    stacks = tuple(_filled(stack, space, ledger) for stack in seeded.stacks)
    return StreamState(stacks, tuple(space.cores), space.version)


def _filled(stack: SiteStack, space: Space, ledger: Mapping[str, TaskLedger]) -> SiteStack:
    """Return a stack without tasks with those of a space, settled."""
    names, tasks, device = stack.names, tuple(space.cores), stack.left.device
    p = max((space.cores[task][name].rank for task in tasks for name in names if name in space.cores[task]), default=0)
    out = torch.zeros(len(names), len(tasks), stack.k_out, p)
    in_ = torch.zeros(len(names), len(tasks), stack.k_in, p)
    norms, bounds = (torch.zeros(len(names), len(tasks), dtype=torch.float64) for _ in range(2))
    for j, task in enumerate(tasks):
        for i, name in enumerate(names):
            core = space.cores[task].get(name)
            if core is not None:
                out[i, j, :, : core.rank], in_[i, j, :, : core.rank] = core.out, core.in_
            norms[i, j] = ledger[task].norms.get(name, 0.0)
            bounds[i, j] = ledger[task].bounds.get(name, 0.0)
    chunk = TaskChunk(
        tasks=tasks,
        out=out.to(device),
        in_=in_.to(device),
        weights=torch.tensor([1 / max(ledger[task].norm ** 2, NORM_FLOOR) for task in tasks], dtype=torch.float64).to(
            device
        ),
        norms=norms.to(device),
        bounds=bounds.to(device),
        measured=torch.tensor([ledger[task].measured for task in tasks], dtype=torch.bool).to(device),
    )
    gram_left, gram_right = grams(chunk)
    return replace(stack, gram_left=gram_left, gram_right=gram_right, settled=(chunk,) if tasks else ())


def _current(stack: SiteStack) -> SiteStack:
    k = (stack.k_out, stack.k_in)
    return replace(stack, settled=tuple(up_to_date(chunk, k) for chunk in stack.settled))


def _core(chunk: TaskChunk, site: int, task: int) -> Core | None:
    """Return one core without the zero columns it was padded with; None if nothing is left."""
    out, in_ = chunk.out[site, task], chunk.in_[site, task]
    size = (float64(out).norm(dim=0) * float64(in_).norm(dim=0)).cpu()
    live = (size > FLOOR * 1e-3 * size.max()).nonzero().flatten().to(out.device) if size.numel() else size.long()
    if live.numel() == 0 or float(size.max()) == 0:
        return None
    return Core(out[:, live], in_[:, live])


def widened(state: StreamState, sites: Mapping[str, SiteSpec]) -> StreamState:
    """Return the state with further sites, at which all tasks so far change nothing. Known sites are left alone.

    Raises:
        TensorShapeError: if a known site has another shape.
    """
    known = {name: (s.left.shape[-2], s.right.shape[-2]) for s in state.stacks for name in s.names}
    for name, site in sites.items():
        if name in known and known[name] != (site.d_out, site.d_in):
            d_out, d_in = known[name]
            raise TensorShapeError(f"site {name!r}: expected {d_out} x {d_in}, got {site.d_out} x {site.d_in}")
    device = state.stacks[0].left.device if state.stacks else "cpu"
    fresh = empty_stream({name: site for name, site in sites.items() if name not in known}, device).stacks
    return replace(state, stacks=state.stacks + tuple(_with_tasks_of(state, stack) for stack in fresh))


def _with_tasks_of(state: StreamState, stack: SiteStack) -> SiteStack:
    """Return an empty stack with the chunks that every other stack has, so that stacks can be joined later."""
    if not state.stacks:
        return stack
    like = state.stacks[0]
    return replace(
        stack,
        settled=tuple(_idle(stack, chunk) for chunk in like.settled),
        recent=_idle(stack, like.recent),
    )


def _idle(stack: SiteStack, like: TaskChunk) -> TaskChunk:
    s, device = len(stack.names), stack.left.device
    nothing = torch.zeros(s, like.count, dtype=torch.float64, device=device)
    return TaskChunk(
        tasks=like.tasks,
        out=torch.zeros(s, like.count, stack.k_out, 0, device=device),
        in_=torch.zeros(s, like.count, stack.k_in, 0, device=device),
        weights=like.weights,
        norms=nothing,
        bounds=nothing,
        measured=like.measured,
    )


def refitted(state: StreamState, adapter: Adapter, rank: int | None = None) -> Cores:
    """Return the best cores of an adapter in the current bases, ``C = L^T dW R`` (MATH section 2, error ledger).

    This wins back what compactions dropped and later adapters brought back.

    Args:
        state: the bases.
        adapter: ambient factors.
        rank: largest rank of a core; None keeps the adapter's own.
    """
    cores: dict[str, Core] = {}
    for stack in state.stacks:
        if not any(name in adapter for name in stack.names):
            continue
        form = canonical_stack(*stacked_factors(stack, adapter))
        out = float64(stack.left.mT @ form.u) * form.s.unsqueeze(-2)
        in_ = float64(stack.right.mT @ form.v)
        for i, name in enumerate(stack.names):
            core = compress_core(out[i], in_[i], rank or out.shape[-1])
            if core is not None:
                cores[name] = core
    return cores


def trimmed(state: StreamState) -> StreamState:
    """Return the state without directions that no task uses, in a basis ordered by energy. Tasks do not move."""
    parts: list[SiteStack] = []
    for stack in settled_view(state).stacks:
        gram_left, gram_right = _all_grams(stack)
        left, right = _used(gram_left), _used(gram_right)
        groups: dict[tuple[int, int], list[int]] = {}
        for i in range(len(stack.names)):
            groups.setdefault((int(left[1][i]), int(right[1][i])), []).append(i)
        for (k_out, k_in), index in groups.items():
            part = picked(stack, index)
            parts.append(_turned(part, left[0][index][..., :k_out], right[0][index][..., :k_in]))
    return replace(state, stacks=tuple(parts))


def _all_grams(stack: SiteStack) -> tuple[Tensor, Tensor]:
    gram_left, gram_right = torch.zeros_like(stack.gram_left), torch.zeros_like(stack.gram_right)
    for chunk in stack.chunks:
        left, right = grams(chunk)
        gram_left, gram_right = gram_left + left, gram_right + right
    return gram_left, gram_right


def _used(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvectors (S, k, k), strongest first, and how many of them carry anything (S,)."""
    energy, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    energy = energy.flip(-1)
    if energy.shape[-1] == 0:
        return vectors, torch.zeros(gram.shape[0], dtype=torch.long)
    return vectors.flip(-1), (energy > FLOOR**2 * energy[..., :1]).sum(-1)


def _turned(stack: SiteStack, left: Tensor, right: Tensor) -> SiteStack:
    """Return the stack with bases ``left P``: a rotation that loses nothing."""

    def chunk_of(chunk: TaskChunk) -> TaskChunk:
        out = (left.mT.unsqueeze(1) @ float64(chunk.out)).to(chunk.out.dtype)
        in_ = (right.mT.unsqueeze(1) @ float64(chunk.in_)).to(chunk.in_.dtype)
        return replace(chunk, out=out, in_=in_, bounds=chunk.bounds + ROUNDING * chunk.norms)

    return replace(
        stack,
        left=(float64(stack.left) @ left).to(stack.left.dtype),
        right=(float64(stack.right) @ right).to(stack.right.dtype),
        gram_left=left.mT @ stack.gram_left @ left,
        gram_right=right.mT @ stack.gram_right @ right,
        settled=tuple(chunk_of(chunk) for chunk in stack.settled),
        recent=chunk_of(stack.recent),
    )
