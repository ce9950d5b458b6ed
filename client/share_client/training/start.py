"""Where training in a space starts.

A task that the space already holds starts from its own core. A new one starts from zero, not from the mean of the
stored cores: after a handful of unrelated tasks that mean is mostly one of them, and on the digits it cost 2 points of
accuracy (docs/adr/0006). Free directions start from the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask
from share_client.training.batches import epoch_batches
from share_client.training.factors import IN_NORM
from share_client.training.inject import injected, probed
from share_client.training.options import TrainingOptions
from share_client.training.steps import part_losses, recomputed
from share_core.errors import ConfigError
from share_core.linalg import canonical, float64, numerical_rank, residual
from share_core.types import Core, SiteBasis, Space


def start_cores(
    space: Space, task_id: str, sites: tuple[str, ...], rank: int, draw: torch.Generator
) -> dict[str, Core]:
    """Return a core of rank min(``rank``, k_out, k_in) for every site.

    It is the task's own stored core, or else zero. What the start leaves of the rank is filled with ``out`` zero and
    ``in_`` random: with both zero there is no gradient. Every ``in_`` column has norm :data:`~.factors.IN_NORM`,
    whatever the size of the start, so that all columns learn at one rate.

    Args:
        space: the version to train in.
        task_id: the task; its own core is preferred.
        sites: the sites to train.
        rank: pseudo-rank p.
        draw: where random columns come from.
    """
    start = space.cores.get(task_id, {})
    return {site: _filled(start.get(site), space.bases[site], rank, draw) for site in sites}


def _filled(start: Core | None, basis: SiteBasis, rank: int, draw: torch.Generator) -> Core:
    """Return a core of the full rank whose product is that of ``start`` (cut to the rank)."""
    rank = min(rank, basis.k_out, basis.k_in)
    out = torch.zeros(basis.k_out, rank)
    in_ = torch.randn(basis.k_in, rank, generator=draw)
    if start is not None:
        u, s, v = canonical(start.out, start.in_)
        keep = min(rank, int(numerical_rank(s)))
        out[:, :keep] = u[:, :keep] * s[:keep] / IN_NORM
        in_[:, :keep] = v[:, :keep]
    # Orthonormal columns, the start's own first: random ones may not repeat what is there.
    return Core(out=out, in_=_orthonormal_after(in_) * IN_NORM)


def _orthonormal_after(columns: Tensor) -> Tensor:
    """Return orthonormal columns by Gram-Schmidt; columns that are orthonormal already stay as they are."""
    if columns.shape[1] == 0:
        return columns
    q, r = torch.linalg.qr(float64(columns))
    sign = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(q.dtype)
    signed: Tensor = (q * sign).to(columns.dtype)
    return signed


def free_directions(
    backbone: Backbone,
    task: PreparedTask,
    head: nn.Module,
    bases: Mapping[str, SiteBasis],
    count: int,
    options: TrainingOptions,
) -> dict[str, Tensor]:
    """Return ``count`` starting directions (d_in, count) for every site, orthogonal to its right basis.

    They are the top right singular vectors of the gradient with respect to the frozen weight, summed over a few
    batches, after the part inside the right basis is taken out. Their norm is :data:`~.factors.IN_NORM`.
    """
    if count == 0:
        return {site: basis.right.new_zeros(basis.right.shape[0], 0) for site, basis in bases.items()}
    gradients = weight_gradients(backbone, task, head, tuple(bases), options)
    return {
        site: outside_directions(gradients[site], basis.right, min(count, basis.right.shape[0] - basis.k_in))
        for site, basis in bases.items()
    }


def random_directions(bases: Mapping[str, SiteBasis], count: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Return starting directions as :func:`free_directions` does, at random: they tell nothing of the data."""
    return {
        site: outside_directions(
            torch.randn(count, basis.right.shape[0], generator=draw),
            basis.right,
            min(count, basis.right.shape[0] - basis.k_in),
        )
        for site, basis in bases.items()
    }


def outside_directions(gradient: Tensor, right: Tensor, count: int) -> Tensor:
    """Return the top ``count`` right singular vectors of ``gradient (I - right right.T)``, times IN_NORM.

    Args:
        gradient: (d_out, d_in).
        right: (d_in, k), orthonormal columns.
        count: at most d_in - k.
    """
    outside = residual(float64(right), float64(gradient).T)
    u = torch.linalg.svd(outside, full_matrices=False).U[:, :count]
    # Where the gradient has fewer directions than asked for, the last columns are arbitrary: project them out again.
    return (_orthonormal_after(residual(float64(right), u)) * IN_NORM).to(torch.float32)


def weight_gradients(
    backbone: Backbone, task: PreparedTask, head: nn.Module, sites: tuple[str, ...], options: TrainingOptions
) -> dict[str, Tensor]:
    """Return the gradient of the loss with respect to every site's frozen weight, on the CPU, over a few batches."""
    draw = torch.Generator().manual_seed(options.seed)
    probes = {site: probed(backbone.site(site)) for site in sites}
    matrices = [probe.change for probe in probes.values()]
    total = [torch.zeros_like(matrix) for matrix in matrices]
    with injected(backbone, probes), recomputed(backbone, options.checkpointing):
        for rows in epoch_batches(task.train, options.batch_size, draw)[: options.gradient_batches]:
            for loss in part_losses(backbone, task, head, rows, options):
                for running, part in zip(total, torch.autograd.grad(loss, matrices), strict=True):
                    running.add_(part)
    require_finite_gradients(total, task)
    return {site: part.to("cpu") for site, part in zip(sites, total, strict=True)}


def require_finite_gradients(gradients: Iterable[Tensor], task: PreparedTask) -> None:
    """Refuse gradients in which no direction can be found.

    Raises:
        ConfigError: NaN or infinity before anything was trained.
    """
    if not all(bool(torch.isfinite(one).all()) for one in gradients):
        raise ConfigError(
            f"task {task.config.name!r}: expected finite gradients on the first batches, got NaN or infinity; look "
            f"for extreme numbers in {task.config.train}"
        )
