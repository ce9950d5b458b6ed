"""What a version is and how one leads to the next.

Server and client run this same code: the hub makes its next version by applying the delta it is about to publish, so
a follower that applies the same deltas holds the same space. Where a delta only appends, that is concatenation and
zero padding and therefore exact to the bit; where it rotates, products may differ in the last bits between machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from share_core.errors import TensorShapeError, UnknownTaskError, VersionError
from share_core.linalg import balanced, canonical, float64, left_inverse, numerical_rank
from share_core.types import (
    Adapter,
    Core,
    Cores,
    Delta,
    Factors,
    SiteBasis,
    SiteTransition,
    Space,
    SpaceSpec,
    Update,
)


def empty_space(spec: SpaceSpec) -> Space:
    """Return version 0: every site with bases of zero columns, no tasks."""
    bases = {
        site.name: SiteBasis(torch.zeros(site.d_out, 0), torch.zeros(site.d_in, 0)) for site in spec.sites.values()
    }
    return Space(version=0, bases=bases, cores={})


def advance(space: Space, delta: Delta) -> Space:
    """Return the version after ``space`` (MATH section 2, transition: ``left' = [left append] rotate``).

    Raises:
        VersionError: if the delta does not start from this version.
        TensorShapeError: if it does not fit the bases.
    """
    if delta.version != space.version + 1:
        raise VersionError(
            f"a delta to version {delta.version} cannot be applied to version {space.version}: "
            f"fetch the deltas after {space.version} or a snapshot"
        )
    bases = dict(space.bases)
    for site, step in delta.transition.items():
        bases[site] = carry_basis(site, _basis(space.bases, site), step)
    cores: dict[str, Cores] = {
        task: {site: carry_core(core, delta.transition.get(site)) for site, core in own.items()}
        for task, own in space.cores.items()
        if task not in delta.cores
    }
    for task, own in delta.cores.items():
        for site, core in own.items():
            check_core(f"{task}/{site}", core, _basis(bases, site))
        cores[task] = own
    return Space(version=delta.version, bases=bases, cores=cores)


def columns_of(bases: Mapping[str, SiteBasis]) -> int:
    """Return the number of basis vectors over all sites, both sides together."""
    return sum(basis.k_out + basis.k_in for basis in bases.values())


def carry_basis(site: str, basis: SiteBasis, step: SiteTransition) -> SiteBasis:
    """Return the bases of one site after a transition, in float32.

    Raises:
        TensorShapeError: if rows or rotation do not fit.
    """
    return SiteBasis(
        left=_carry_side(f"{site} left", basis.left, step.append_left, step.rotate_left),
        right=_carry_side(f"{site} right", basis.right, step.append_right, step.rotate_right),
    )


def _carry_side(what: str, old: Tensor, append: Tensor, rotate: Tensor | None) -> Tensor:
    if append.shape[0] != old.shape[0]:
        raise TensorShapeError(f"{what}: new directions have {append.shape[0]} rows, expected {old.shape[0]}")
    grown = torch.cat([old, append.to(old.dtype)], dim=1) if append.shape[1] else old
    if rotate is None:
        return grown
    if rotate.shape[0] != grown.shape[1]:
        raise TensorShapeError(f"{what}: rotation has {rotate.shape[0]} rows, expected {grown.shape[1]}")
    return (float64(grown) @ float64(rotate)).to(old.dtype)


def carry_core(core: Core, step: SiteTransition | None) -> Core:
    """Return a core in the coordinates after a transition: zero rows for new directions, then the inverse rotation.

    With orthonormal rotations this is ``C' = P_o.T C P_i`` of MATH section 2.
    """
    if step is None:
        return core
    return Core(
        out=_carry_factor(core.out, step.append_left.shape[1], step.rotate_left),
        in_=_carry_factor(core.in_, step.append_right.shape[1], step.rotate_right),
    )


def _carry_factor(factor: Tensor, appended: int, rotate: Tensor | None) -> Tensor:
    grown = torch.cat([factor, factor.new_zeros(appended, factor.shape[1])]) if appended else factor
    if rotate is None:
        return grown
    return (left_inverse(rotate) @ float64(grown)).to(factor.dtype)


def lift_cores(cores: Cores, steps: Sequence[Mapping[str, SiteTransition]]) -> Cores:
    """Carry cores of an older version through the transitions since then.

    Exact while the transitions only append. Across a rotation it loses what the rotation dropped, even if that came
    back later; the hub therefore lifts updates through ambient factors (:func:`update_adapter`) instead.
    """
    for step in steps:
        cores = {site: carry_core(core, step.get(site)) for site, core in cores.items()}
    return cores


def task_adapter(space: Space, task_id: str, dtype: torch.dtype = torch.float32) -> Adapter:
    """Return a task's adapter: ``out = left @ core.out`` (d_out, p), ``in_ = right @ core.in_`` (d_in, p).

    Ask for float64 where errors are measured: a product in float32 is itself 1e-7 away from what is stored.

    Raises:
        UnknownTaskError: if the space has no such task.
    """
    if task_id not in space.cores:
        known = ", ".join(sorted(space.cores)[:8]) or "none"
        raise UnknownTaskError(f"version {space.version} has no task {task_id!r}; it has: {known}")
    return {
        site: Factors(
            space.bases[site].left.to(dtype) @ core.out.to(dtype),
            space.bases[site].right.to(dtype) @ core.in_.to(dtype),
        )
        for site, core in space.cores[task_id].items()
    }


def update_adapter(update: Update, bases: Mapping[str, SiteBasis]) -> Adapter:
    """Return the ambient factors of an update: ``[left E_o, B]`` and ``[right E_i, A.T]``, in float64.

    Args:
        update: what a client submitted.
        bases: the bases of ``update.base_version``.

    Raises:
        TensorShapeError: if a core does not fit those bases; names the site, the expected and the got size.
    """
    adapter: dict[str, Factors] = {}
    for site, part in update.sites.items():
        basis = _basis(bases, site)
        out = [float64(basis.left[:, :0])]
        in_ = [float64(basis.right[:, :0])]
        if part.core is not None:
            check_core(f"{site} in version {update.base_version}", part.core, basis)
            out.append(float64(basis.left) @ float64(part.core.out))
            in_.append(float64(basis.right) @ float64(part.core.in_))
        if part.residual is not None:
            out.append(float64(part.residual.out))
            in_.append(float64(part.residual.in_))
        adapter[site] = Factors(torch.cat(out, dim=1), torch.cat(in_, dim=1))
    return adapter


def mean_cores(cores: Sequence[Cores], rank: int, weights: Sequence[float] | None = None) -> Cores:
    """Return the weighted average of cores of one version, cut to ``rank``, with balanced factors.

    In a common version averaging cores is averaging dW: exact and linear (MATH section 2). The cut to rank is the only
    loss; pass a rank of at least the sum of the ranks for none. A task that leaves a site out counts as zero there.

    Args:
        cores: one mapping per task or contributor.
        rank: largest rank of the result.
        weights: one per entry, summing to 1; default equal.
    """
    if weights is None:
        weights = [1.0 / len(cores)] * len(cores)
    sites = sorted({site for own in cores for site in own})
    mean: dict[str, Core] = {}
    for site in sites:
        parts = [(own[site], weight) for own, weight in zip(cores, weights, strict=True) if site in own]
        out = torch.cat([float64(core.out) * weight for core, weight in parts], dim=1)
        in_ = torch.cat([float64(core.in_) for core, _ in parts], dim=1)
        core = compress_core(out, in_, rank)
        if core is not None:
            mean[site] = core
    return mean


def compress_core(out: Tensor, in_: Tensor, rank: int) -> Core | None:
    """Return ``out @ in_.T`` as a balanced float32 core of at most ``rank``; None if it is zero."""
    u, s, v = canonical(out, in_)
    keep = min(rank, int(numerical_rank(s)))
    if keep == 0:
        return None
    left, right = balanced(u[:, :keep], s[:keep], v[:, :keep])
    return Core(left.to(torch.float32), right.to(torch.float32))


def check_core(what: str, core: Core, basis: SiteBasis) -> None:
    """Refuse a core that does not fit the bases of its site.

    Raises:
        TensorShapeError: naming the site, the expected and the got size.
    """
    if core.out.shape[0] != basis.k_out or core.in_.shape[0] != basis.k_in:
        raise TensorShapeError(
            f"core of {what}: expected {basis.k_out} x {basis.k_in} coordinates, "
            f"got {core.out.shape[0]} x {core.in_.shape[0]}"
        )


def _basis(bases: Mapping[str, SiteBasis], site: str) -> SiteBasis:
    try:
        return bases[site]
    except KeyError:
        raise TensorShapeError(f"site {site!r} is not part of this space") from None
