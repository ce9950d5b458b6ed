"""The published merge of Share (arXiv 2602.06043), exactly as published: MATH section 1, share-method 1b and 1d.

Per site and side on its own: stack the factors ``[B_1 .. B_T]`` (d_out, sum r) and ``[A_1^T .. A_T^T]`` (d_in, sum r),
subtract the mean column (centred), take the SVD, keep the top k left vectors ``beta`` and ``alpha``; coefficients by
projection of the *uncentred* factors, ``eps = basis^T factor`` (k, r). The mean is neither stored nor added back. A
merge reconstructs every stored task, appends the new one, and does all of this again.

The authors' code ignores the LoRA scale alpha/r. Our factors already carry it in ``out``, so this baseline sees B times
the scale: never a handicap to it, since every adapter keeps its true size. Ranks may differ: coefficients are k x r of
the task. Left vectors whose singular value is zero to rounding are arbitrary; they are dropped, so that results can be
reproduced.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from share_core.linalg import small_svd
from share_core.types import Adapter, Core, Factors, SiteBasis
from share_simulations.baselines.types import Compressed, by_site, by_task


@dataclass(frozen=True)
class PaperSite:
    """The two bases of a site (k columns at most) and the coefficients ``eps`` of every task there."""

    basis: SiteBasis
    """``left`` (d_out, k) is the paper's beta, ``right`` (d_in, k) its alpha."""
    coefficients: Mapping[str, Core]
    """By task: ``out`` (k, r) and ``in_`` (k, r); ``dW = (beta out) (alpha in_)^T``."""


@dataclass(frozen=True)
class PaperState:
    """Everything the published method keeps between merges."""

    k: int
    """Basis vectors per site and side, at most."""
    centred: bool
    """Whether the mean column is subtracted before the SVD, as published."""
    dtype: torch.dtype = torch.float64
    """What is computed in; float64 for errors, float32 to time it as its authors run it."""
    sites: Mapping[str, PaperSite] = field(default_factory=dict)


def paper_once(adapters: Mapping[str, Adapter], k: int, centred: bool = False) -> Compressed:
    """Compress all adapters in one merge that sees all of them."""
    start = time.perf_counter()
    sites = {}
    for site, own in by_site(adapters).items():
        factors = {task: _cast(f, torch.float64) for task, f in own.items()}
        sites[site] = _decompose(factors, k, centred)
    state = PaperState(k, centred, sites=sites)
    return _compressed("paper once", state, adapters, start)


def paper_stream(adapters: Mapping[str, Adapter], k: int, centred: bool = False) -> Compressed:
    """Merge the adapters one by one in their order, each merge from what the last one kept."""
    start = time.perf_counter()
    state = PaperState(k, centred)
    for task, adapter in adapters.items():
        state = paper_absorb(state, task, adapter)
    return _compressed("paper stream", state, adapters, start)


def paper_absorb(state: PaperState, task: str, adapter: Adapter) -> PaperState:
    """Merge one adapter: reconstruct all stored tasks, append it, SVD, project everything again (the restack).

    Costs an SVD of (d, sum of all ranks so far) per site and side. Sites the adapter lacks stay as they are.
    """
    sites = dict(state.sites)
    for site, new in adapter.items():
        factors = paper_reconstruct(sites[site]) if site in sites else {}
        factors[task] = _cast(new, state.dtype)
        sites[site] = _decompose(factors, state.k, state.centred)
    return PaperState(state.k, state.centred, state.dtype, sites)


def paper_reconstruct(site: PaperSite) -> dict[str, Factors]:
    """Return ``(beta eps_out, alpha eps_in)`` of every task at a site: (d_out, r), (d_in, r)."""
    basis = site.basis
    return {task: Factors(basis.left @ c.out, basis.right @ c.in_) for task, c in site.coefficients.items()}


def paper_numbers(state: PaperState) -> int:
    """Return all floats the method keeps: both bases of every site and k x r coefficients a side, task and site."""
    bases = sum(s.basis.left.numel() + s.basis.right.numel() for s in state.sites.values())
    coefficients = sum(c.out.numel() + c.in_.numel() for s in state.sites.values() for c in s.coefficients.values())
    return bases + coefficients


def _decompose(factors: Mapping[str, Factors], k: int, centred: bool) -> PaperSite:
    left = _top_left([f.out for f in factors.values()], k, centred)
    right = _top_left([f.in_ for f in factors.values()], k, centred)
    coefficients = {task: Core(left.mT @ f.out, right.mT @ f.in_) for task, f in factors.items()}
    return PaperSite(SiteBasis(left, right), coefficients)


def _top_left(columns: Sequence[Tensor], k: int, centred: bool) -> Tensor:
    """Return the top ``k`` left singular vectors (d, k) of the stacked ``columns`` (d, r) each."""
    stack = torch.cat(list(columns), dim=1)
    size = torch.linalg.matrix_norm(stack)
    if centred:
        stack = stack - stack.mean(dim=1, keepdim=True)
    u, s, _ = small_svd(stack)
    rounding = max(stack.shape) * torch.finfo(stack.dtype).eps * float(size)
    count = min(k, int((s > rounding).sum()))
    return u[:, :count]


def _cast(factors: Factors, dtype: torch.dtype) -> Factors:
    return Factors(factors.out.to(dtype), factors.in_.to(dtype))


def _compressed(name: str, state: PaperState, adapters: Mapping[str, Adapter], start: float) -> Compressed:
    stored = by_task({site: paper_reconstruct(own) for site, own in state.sites.items()}, adapters)
    seconds = time.perf_counter() - start
    method = f"{name}, {'centred' if state.centred else 'uncentred'}"
    return Compressed(method, stored, paper_numbers(state), seconds)
