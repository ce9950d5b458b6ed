"""Training one task in the coordinates of a space."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask
from share_client.noise import system_normal
from share_client.training.adaptation import (
    DIRECTIONS,
    FIRST_DIRECTIONS,
    budget_of,
    budget_plan,
    fixed_plan,
    learned_by,
    narrow_at,
    narrowed,
    small_plan,
)
from share_client.training.early import held_out
from share_client.training.factors import REFERENCE_COLUMNS, FixedFactors, SpaceFactors
from share_client.training.gradients import site_gradients
from share_client.training.loop import Trained, fresh_head, head_tensors, train
from share_client.training.moments import carried
from share_client.training.options import ProgressCallback, TrainingOptions, TrainResult, steps_of
from share_client.training.plan import SitePlan
from share_client.training.private import train_private
from share_client.training.start import free_directions, random_directions, start_cores
from share_core.errors import ConfigError, SpaceMismatchError
from share_core.linalg import balanced, canonical, numerical_rank
from share_core.privacy import CoefficientNoise, Declaration, SampleNoise, noisy_cores
from share_core.space import compress_core, update_adapter
from share_core.types import Factors, SiteBasis, SiteUpdate, Space, Update


def train_in_space(
    backbone: Backbone,
    task: PreparedTask,
    space: Space,
    task_id: str,
    options: TrainingOptions,
    progress: ProgressCallback | None = None,
    head: Mapping[str, Tensor] | None = None,
    declared: Declaration | None = None,
) -> TrainResult:
    """Train coefficients of pseudo-rank p, phi free directions and a head; backbone and bases are frozen.

    How many directions each site gets is decided by :mod:`~.adaptation` unless ``options.directions`` says it.

    Args:
        backbone: the encoder the space was made for.
        task: from :func:`prepare_task` with the same backbone.
        space: the newest version; the update refers to it.
        task_id: ``organisation/name``; where the space holds this task, training starts from its core.
        options: see :class:`TrainingOptions`.
        progress: called after every step.
        head: start from these head tensors instead of fresh ones.
        declared: clipping and noise, from :func:`~.accounting.declare`. With noise on coefficients there are no free
            directions, and the head, which stays here, is trained once more on what the noise left.

    Raises:
        SpaceMismatchError: the space has sites or shapes that this backbone does not.
        ConfigError: ``head`` does not fit the task; noise on coefficients is asked for together with free directions or
            a shared head, or where the space has no bases yet; Opacus is missing.
    """
    began = time.monotonic()
    check_sites(backbone, space)
    trained_head = fresh_head(backbone, task, options.seed, head)
    if isinstance(declared, CoefficientNoise):
        check_releasable(space, task, options)
    budget = budget_of(space.bases, options, declared)
    changes, plan = _start(backbone, task, space, task_id, options, trained_head, declared, budget is not None)
    numbers = sum(p.numel() for change in changes.values() for p in change.parameters())
    if isinstance(declared, SampleNoise):
        trained = train_private(backbone, task, trained_head, changes, options, declared, progress)
    elif budget is not None:
        trained, changes, plan = _narrowing(backbone, task, space, trained_head, changes, options, budget, progress)
    else:
        trained = train(backbone, task, trained_head, changes, options, progress)
    submission, again = _submitted(backbone, task, space, options, trained_head, changes, declared, progress)
    tensors = head_tensors(trained_head)
    return TrainResult(
        update=Update(
            base_version=space.version,
            sites=submission,
            head=tensors if task.config.share_head else {},
        ),
        head=tensors,
        loss=(again or trained).loss,
        steps=(again or trained).steps,
        seconds=time.monotonic() - began,
        trained_numbers=numbers,
        declared=declared,
        plan=plan,
    )


def has_bases(space: Space) -> bool:
    """Return whether the space holds a basis at any site: then there are coefficients to train."""
    return any(_holds(basis) for basis in space.bases.values())


def check_releasable(space: Space, task: PreparedTask, options: TrainingOptions) -> None:
    """Refuse what would leave beside noisy coefficients without any noise, and a space that has no coefficients.

    Raises:
        ConfigError: saying which, and what to do.
    """
    name = task.config.name
    if options.directions:
        raise ConfigError(
            f"task {name!r}: noise on coefficients needs directions = 0, got {options.directions}: free directions "
            "would leave without noise"
        )
    if task.config.share_head:
        raise ConfigError(
            f"task {name!r}: noise on coefficients needs share_head = false: a head would leave without noise"
        )
    if not has_bases(space):
        raise ConfigError(
            f"task {name!r}: noise on coefficients needs a space with bases, and version {space.version} has none: "
            "wait until another task is merged"
        )


def _with_noise(
    submission: Mapping[str, SiteUpdate], space: Space, declared: CoefficientNoise, rank: int
) -> dict[str, SiteUpdate]:
    cores = {site: part.core for site, part in submission.items() if part.core is not None}
    noisy = noisy_cores(cores, space.bases, declared.clip, declared.noise_multiplier, rank, system_normal)
    return {site: SiteUpdate(core=core) for site, core in noisy.items()}


def _start(
    backbone: Backbone,
    task: PreparedTask,
    space: Space,
    task_id: str,
    options: TrainingOptions,
    head: nn.Module,
    declared: Declaration | None,
    wide: bool,
) -> tuple[dict[str, SpaceFactors], dict[str, SitePlan]]:
    """Return the change of every site to start from. With noise it tells nothing of the data: only the steps do."""
    bases, rank = space.bases, options.pseudo_rank
    draw = torch.Generator().manual_seed(options.seed)
    cores = start_cores(space, task_id, rank, draw, warm=declared is None)
    if declared is not None:
        plan = fixed_plan(bases, rank, _private_directions(space, options, declared), "fixed beside noise")
    elif wide:
        plan = fixed_plan(bases, rank, REFERENCE_COLUMNS, "all of it is trained")
    elif options.directions is not None:
        plan = fixed_plan(bases, rank, options.directions, f"directions = {options.directions} was asked for")
    else:
        plan = small_plan(bases, rank)
    counts = {site: one.directions for site, one in plan.items()}
    if declared is not None or wide or not any(counts.values()):
        free = random_directions(bases, counts, draw)
    else:
        gradients = site_gradients(backbone, task, head, bases, max(counts.values(), default=0), options)
        plan = {site: replace(one, captured=gradients[site].captured) for site, one in plan.items()}
        free = free_directions(gradients, bases, counts)
    factors = {s: SpaceFactors(basis, cores[s], free[s], wide).to(backbone.device) for s, basis in bases.items()}
    return factors, plan


def _narrowing(
    backbone: Backbone,
    task: PreparedTask,
    space: Space,
    head: nn.Module,
    changes: Mapping[str, SpaceFactors],
    options: TrainingOptions,
    budget: float,
    progress: ProgressCallback | None,
) -> tuple[Trained, dict[str, SpaceFactors], dict[str, SitePlan]]:
    """Train wide, keep what the budget buys, and train that to the end."""
    rows = (task if options.patience is None else held_out(task, options.seed)[0]).train_rows
    cut = narrow_at(steps_of(options, rows))
    wide = train(backbone, task, head, changes, options, progress, (0.0, cut))
    learned = {site: learned_by(change) for site, change in changes.items()}
    plan = budget_plan(space.bases, learned, options.pseudo_rank, budget)
    kept = {site: narrowed(change, learned[site], plan[site]) for site, change in changes.items()}
    moments = carried(changes, kept, wide.moments)
    trained = train(backbone, task, head, kept, options, progress, (cut, 1.0), moments)
    return Trained(trained.loss if trained.steps else wide.loss, wide.steps + trained.steps), kept, plan


def _submitted(
    backbone: Backbone,
    task: PreparedTask,
    space: Space,
    options: TrainingOptions,
    head: nn.Module,
    changes: Mapping[str, SpaceFactors],
    declared: Declaration | None,
    progress: ProgressCallback | None,
) -> tuple[dict[str, SiteUpdate], Trained | None]:
    """Return what is sent, with noise where it is asked for; the head is then trained once more on what that left."""
    submission = _submission(changes)
    if not isinstance(declared, CoefficientNoise):
        return submission, None
    submission = _with_noise(submission, space, declared, options.pseudo_rank)
    if not any(True for _ in head.parameters()):
        return submission, None
    return submission, train(backbone, task, head, _fixed(submission, space, backbone), options, progress)


def _fixed(sites: Mapping[str, SiteUpdate], space: Space, backbone: Backbone) -> dict[str, FixedFactors]:
    """Return what an update changes, for training the head alone."""
    adapter = update_adapter(Update(space.version, sites), space.bases)
    return {site: FixedFactors(one.out.float(), one.in_.float()).to(backbone.device) for site, one in adapter.items()}


def check_sites(backbone: Backbone, space: Space) -> None:
    """Refuse a space that cannot belong to this backbone. A session compares the weights by ``check_backbone``.

    Raises:
        SpaceMismatchError: naming the first site that is unknown or has another shape.
    """
    for site, basis in space.bases.items():
        if site not in backbone.sites:
            raise SpaceMismatchError(
                f"site {site!r} of the space does not exist in backbone {backbone.name}: it has "
                f"{', '.join(backbone.sites[:2])}, ...; set backbone in tasks.toml to the one the space was made for"
            )
        expected = (basis.left.shape[0], basis.right.shape[0])
        place = backbone.site(site)
        got = (place.d_out, place.d_in)
        if expected != got:
            raise SpaceMismatchError(
                f"site {site!r}: the space expects a weight of {expected}, backbone {backbone.name} has {got}; "
                "set backbone in tasks.toml to the one the space was made for"
            )


def _private_directions(space: Space, options: TrainingOptions, declared: Declaration) -> int:
    """Return the directions beside noise where none are asked for: those of a small backbone, never by the data."""
    if isinstance(declared, CoefficientNoise):
        return 0
    if options.directions is not None:
        return options.directions
    return DIRECTIONS if has_bases(space) else FIRST_DIRECTIONS


def _holds(basis: SiteBasis) -> bool:
    return basis.k_out > 0 and basis.k_in > 0


def _submission(changes: Mapping[str, SpaceFactors]) -> dict[str, SiteUpdate]:
    """Return each site's change as canonical factors in float32; sites that did not change are left out."""
    sites: dict[str, SiteUpdate] = {}
    for site, change in changes.items():
        core_out, core_in = change.core_out.detach().cpu(), change.core_in.detach().cpu()
        core = compress_core(core_out, core_in, core_out.shape[1])
        residual = canonical_factors(change.free_out.detach().cpu(), change.free_in.detach().cpu())
        if core is not None or residual is not None:
            sites[site] = SiteUpdate(core=core, residual=residual)
    return sites


def canonical_factors(out: Tensor, in_: Tensor) -> Factors | None:
    """Return ``out @ in_.T`` as balanced float32 factors of its numerical rank; None if it is zero."""
    u, s, v = canonical(out, in_)
    keep = int(numerical_rank(s))
    if keep == 0:
        return None
    left, right = balanced(u[:, :keep], s[:keep], v[:, :keep])
    return Factors(left.to(torch.float32), right.to(torch.float32))
