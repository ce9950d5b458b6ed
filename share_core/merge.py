"""Merging updates into a space: a pure function from state to state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from share_core.append import append
from share_core.compaction import compact, compaction_losses, task_weight
from share_core.errors import ConfigError, TensorShapeError
from share_core.ledger import TaskLedger, charge, measure
from share_core.linalg import float64, require_finite
from share_core.robust.influence import influence_factors, owner_of
from share_core.space import advance, carry_basis, carry_core, compress_core, empty_space, task_adapter
from share_core.types import Adapter, Core, Cores, Delta, SiteBasis, SiteTransition, Space, SpaceSpec


@dataclass(frozen=True)
class MergePolicy:
    """How a space grows."""

    k_max: int = 64
    """Largest number of basis vectors per site and side."""
    tau: float = 0.05
    """Share of a task's norm that appending may leave out."""
    sweeps: int = 3
    """HOOI sweeps per compaction."""
    refits: int = 8
    """Most tasks that one merge projects anew from their originals, those with the highest bounds first."""
    influence: float = 1.0
    """Largest share of one organisation's tasks in a compaction, see :mod:`share_core.robust.influence`."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.k_max < 1:
            raise ConfigError(f"k_max must be at least 1, got {self.k_max}")
        if not 0 <= self.tau < 1:
            raise ConfigError(f"tau must be at least 0 and below 1, got {self.tau}")
        if not 0 < self.influence <= 1:
            raise ConfigError(f"influence must be above 0 and at most 1, got {self.influence}")


@dataclass(frozen=True)
class HubState:
    """Everything merging needs and changes."""

    space: Space
    ledger: Mapping[str, TaskLedger]
    """By task id."""


@dataclass(frozen=True)
class Merged:
    """Result of one merge."""

    state: HubState
    delta: Delta
    """What to publish."""
    relative_errors: Mapping[str, float]
    """Measured relative error that this merge left on each task it merged."""

    @property
    def relative_error(self) -> float:
        """The error of the only merged task."""
        (error,) = self.relative_errors.values()
        return error


def empty_state(spec: SpaceSpec) -> HubState:
    """Return the state before any update."""
    return HubState(space=empty_space(spec), ledger={})


def merge(
    state: HubState,
    task_id: str,
    adapter: Adapter,
    policy: MergePolicy,
    originals: Mapping[str, Adapter] | None = None,
) -> Merged:
    """Merge one adapter as the new content of ``task_id``: :func:`merge_all` with one task."""
    return merge_all(state, {task_id: adapter}, policy, originals)


def merge_all(
    state: HubState,
    adapters: Mapping[str, Adapter],
    policy: MergePolicy,
    originals: Mapping[str, Adapter] | None = None,
) -> Merged:
    """Merge adapters as the new content of their tasks and return the next version, one for all of them.

    Append one after the other, then compact once where a site has outgrown ``k_max``: while nothing compacts, the
    result is that of merging them one by one; where something does, one compaction sees all of them. Old tasks do not
    move at all unless a site compacts; then each loses at most what its ledger is charged.

    Args:
        state: the current version and ledger; not changed.
        adapters: ambient factors by task id, in the order in which they are appended, see
            :func:`share_core.space.update_adapter`. Zero and rank 0 are allowed and give a task that changes nothing.
            An older content of a task is replaced.
        policy: caps and budgets.
        originals: ambient factors of earlier updates by task, as far as they are retained. The ``refits`` tasks whose
            bounds have passed ``tau`` furthest are projected anew from their originals: that wins back directions that
            an earlier compaction dropped and a later append returned, and turns the bound into a measurement.

    Raises:
        NonFiniteError: if a factor holds NaN or infinity.
        TensorShapeError: if a site is unknown or a factor does not fit it.
        ConfigError: if there is no adapter.
    """
    if not adapters:
        raise ConfigError("nothing to merge: expected at least one adapter")
    for adapter in adapters.values():
        _check(state.space, adapter)
    appended, fresh = _append_all(state.space.bases, adapters, policy.tau)
    others = {task: own for task, own in state.space.cores.items() if task not in adapters}
    before = {task: _grown_cores(own, appended) for task, own in others.items()}
    before.update(fresh)
    weights = {task: task_weight(state.ledger[task].norm) for task in others}
    weights.update({task: task_weight(measure(adapter, {}).norm) for task, adapter in adapters.items()})
    shares = influence_factors(weights, policy.influence)
    weights = {task: weight * shares[owner_of(task)] for task, weight in weights.items()}
    transition = compact(state.space.bases, appended, before, weights, policy.k_max, policy.sweeps)
    stored = {
        task: {site: carry_core(core, _rotation_only(transition.get(site))) for site, core in own.items()}
        for task, own in fresh.items()
    }
    delta = Delta(version=state.space.version + 1, transition=transition, cores=stored)
    space = advance(state.space, delta)
    ledger = dict(state.ledger)
    if delta.compacts:
        losses = compaction_losses({t: before[t] for t in others}, space.cores, transition)
        ledger.update({task: charge(ledger[task], lost) for task, lost in losses.items() if lost})
    for task, adapter in adapters.items():
        ledger[task] = measure(adapter, task_adapter(space, task, torch.float64))
    merged = Merged(HubState(space, ledger), delta, {task: ledger[task].bound for task in adapters})
    stale = [task for task in others if ledger[task].bound > policy.tau and not ledger[task].measured]
    stale = sorted(stale, key=lambda task: ledger[task].bound, reverse=True)[: policy.refits]
    return _reprojected(merged, {task: originals[task] for task in stale if task in originals}) if originals else merged


def project(bases: Mapping[str, SiteBasis], adapter: Adapter) -> Cores:
    """Return the best cores of an adapter in given bases: ``C = left.T dW right`` at every site."""
    cores: dict[str, Core] = {}
    for site, factors in adapter.items():
        out = float64(bases[site].left).mT @ float64(factors.out)
        in_ = float64(bases[site].right).mT @ float64(factors.in_)
        core = compress_core(out, in_, rank=min(out.shape[0], in_.shape[0]))
        if core is not None:
            cores[site] = core
    return cores


def _reprojected(merged: Merged, originals: Mapping[str, Adapter]) -> Merged:
    """Return the merge with some tasks projected anew from their originals, as part of the same version."""
    space, ledger = merged.state.space, dict(merged.state.ledger)
    fresh = {task: project(space.bases, original) for task, original in originals.items()}
    space = replace(space, cores={**space.cores, **fresh})
    ledger.update(
        {task: measure(original, task_adapter(space, task, torch.float64)) for task, original in originals.items()}
    )
    delta = replace(merged.delta, cores={**merged.delta.cores, **fresh})
    return Merged(HubState(space, ledger), delta, merged.relative_errors)


def recompute_ledger(state: HubState, task_id: str, original: Adapter) -> HubState:
    """Measure a task's error against its retained original and replace its bound by the measurement."""
    ledger = {**state.ledger, task_id: measure(original, task_adapter(state.space, task_id, torch.float64))}
    return HubState(state.space, ledger)


def _check(space: Space, adapter: Adapter) -> None:
    for site, factors in adapter.items():
        basis = space.bases.get(site)
        if basis is None:
            raise TensorShapeError(f"site {site!r} is not part of this space")
        expected = (basis.left.shape[0], basis.right.shape[0])
        got = (factors.out.shape[0], factors.in_.shape[0])
        if expected != got or factors.out.shape[1] != factors.in_.shape[1]:
            raise TensorShapeError(
                f"adapter at {site!r}: expected factors {expected[0]} x r and {expected[1]} x r, "
                f"got {tuple(factors.out.shape)} and {tuple(factors.in_.shape)}"
            )
        require_finite(factors.out, f"adapter at {site!r}, output factor")
        require_finite(factors.in_, f"adapter at {site!r}, input factor")


def _append_all(
    bases: Mapping[str, SiteBasis], adapters: Mapping[str, Adapter], tau: float
) -> tuple[dict[str, SiteTransition], dict[str, Cores]]:
    """Append one adapter after the other; return what all add together and every adapter's cores in the grown bases."""
    grown = dict(bases)
    total: dict[str, SiteTransition] = {}
    fresh: dict[str, Cores] = {}
    for task, adapter in adapters.items():
        step = append(grown, adapter, tau)
        for site, added in step.transition.items():
            grown[site] = carry_basis(site, grown[site], added)
            known = total.get(site)
            total[site] = added if known is None else _both(known, added)
        fresh = {earlier: _grown_cores(own, step.transition) for earlier, own in fresh.items()}
        fresh[task] = dict(step.cores)
    return total, fresh


def _both(first: SiteTransition, second: SiteTransition) -> SiteTransition:
    return SiteTransition(
        append_left=torch.cat([first.append_left, second.append_left], dim=1),
        append_right=torch.cat([first.append_right, second.append_right], dim=1),
    )


def _grown_cores(cores: Cores, appended: Mapping[str, SiteTransition]) -> Cores:
    return {site: carry_core(core, appended.get(site)) for site, core in cores.items()}


def _rotation_only(step: SiteTransition | None) -> SiteTransition | None:
    if step is None:
        return None
    return SiteTransition(step.append_left[:, :0], step.append_right[:, :0], step.rotate_left, step.rotate_right)
