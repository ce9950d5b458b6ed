"""Training one task in the coordinates of a space."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask
from share_client.training.factors import SpaceFactors
from share_client.training.loop import fresh_head, head_tensors, train
from share_client.training.options import ProgressCallback, TrainingOptions, TrainResult
from share_client.training.start import free_directions, start_cores
from share_core.errors import SpaceMismatchError
from share_core.linalg import balanced, canonical, numerical_rank
from share_core.space import compress_core
from share_core.types import Factors, SiteBasis, SiteUpdate, Space, Update

DIRECTIONS = 2
"""Free directions at each site where the subspace already holds something."""
FIRST_DIRECTIONS = 4
"""Free directions at each site while the subspace is empty: there is nothing yet to combine."""


def train_in_space(
    backbone: Backbone,
    task: PreparedTask,
    space: Space,
    task_id: str,
    options: TrainingOptions,
    progress: ProgressCallback | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> TrainResult:
    """Train coefficients of pseudo-rank p, phi free directions and a head; backbone and bases are frozen.

    Args:
        backbone: the encoder the space was made for.
        task: from :func:`prepare_task` with the same backbone.
        space: the newest version; the update refers to it.
        task_id: ``organisation/name``; where the space holds this task, training starts from its core.
        options: see :class:`TrainingOptions`.
        progress: called after every step.
        head: start from these head tensors instead of fresh ones.

    Raises:
        SpaceMismatchError: the space has sites or shapes that this backbone does not.
        ConfigError: ``head`` does not fit the task.
    """
    began = time.monotonic()
    check_sites(backbone, space)
    sites = tuple(space.bases)
    draw = torch.Generator().manual_seed(options.seed)
    trained_head = fresh_head(backbone, task, options.seed, head)
    phi = _directions(space, options)
    cores = start_cores(space, task_id, sites, options.pseudo_rank, draw)
    free = free_directions(backbone, task, trained_head, space.bases, phi, options)
    changes = {site: SpaceFactors(space.bases[site], cores[site], free[site]).to(backbone.device) for site in sites}
    trained = train(backbone, task, trained_head, changes, options, progress)
    tensors = head_tensors(trained_head)
    return TrainResult(
        update=Update(
            base_version=space.version,
            sites=_submission(changes),
            head=tensors if task.config.share_head else {},
        ),
        head=tensors,
        loss=trained.loss,
        steps=trained.steps,
        seconds=time.monotonic() - began,
        trained_numbers=sum(p.numel() for change in changes.values() for p in change.parameters()),
    )


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
        got = tuple(backbone.linear(site).weight.shape)
        if expected != got:
            raise SpaceMismatchError(
                f"site {site!r}: the space expects a weight of {expected}, backbone {backbone.name} has {got}; "
                "set backbone in tasks.toml to the one the space was made for"
            )


def _directions(space: Space, options: TrainingOptions) -> int:
    if options.directions is not None:
        return options.directions
    return DIRECTIONS if any(_holds(basis) for basis in space.bases.values()) else FIRST_DIRECTIONS


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
