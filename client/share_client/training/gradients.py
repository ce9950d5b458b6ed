"""What the gradient of a task says about a site before anything is trained.

With ``G`` the gradient of the loss with respect to the frozen weight and bases ``L``, ``R``, coefficients can follow
``L.T G R`` only; a free direction ``a`` outside of ``R`` can follow ``G a``. The matrices ``G`` themselves are as large
as the weights: they are taken for a group of sites at a time, looked at, and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask
from share_client.training.batches import epoch_batches
from share_client.training.inject import adapted, fixed_factors, injected, probed
from share_client.training.options import TrainingOptions
from share_client.training.steps import part_losses, recomputed
from share_core.errors import ConfigError
from share_core.linalg import float64, leading_right_vectors, residual
from share_core.types import Adapter, SiteBasis

NOTHING: Adapter = MappingProxyType({})

GROUP_NUMBERS = 2**28
"""Numbers in the gradients that are held at one time, 1 GiB in float32; one site alone may have more."""


@dataclass(frozen=True)
class SiteGradient:
    """One site's gradient as its bases see it."""

    inside: Tensor
    """``L.T G R`` (k_out, k_in), float64."""
    directions: Tensor
    """Leading right singular vectors (d_in, n) of ``G (I - R R.T)``, float64."""
    energy: float
    """``|G|_F^2``."""

    @property
    def captured(self) -> float:
        """Share of the energy that coefficients can follow, ``|L.T G R|^2 / |G|^2``; 0 for a zero gradient."""
        return float(self.inside.square().sum()) / self.energy if self.energy > 0 else 0.0


def site_gradients(
    backbone: Backbone,
    task: PreparedTask,
    head: nn.Module,
    bases: Mapping[str, SiteBasis],
    count: int,
    options: TrainingOptions,
) -> dict[str, SiteGradient]:
    """Return what the gradient over a few batches says about every site, with ``count`` directions outside at most.

    Raises:
        ConfigError: NaN or infinity before anything was trained.
    """
    found = {}
    for group in grouped(backbone, tuple(bases)):
        for site, gradient in weight_gradients(backbone, task, head, group, options).items():
            found[site] = seen_by(bases[site], gradient, count)
    return found


def seen_by(basis: SiteBasis, gradient: Tensor, count: int) -> SiteGradient:
    """Return what of a gradient (d_out, d_in) lies in the bases, and its ``count`` leading directions outside."""
    g = float64(gradient)
    outside = residual(float64(basis.right).to(g.device), g.T).T
    vectors, _ = leading_right_vectors(outside, min(count, basis.right.shape[0] - basis.k_in))
    return SiteGradient(inside(basis, gradient).cpu(), vectors.cpu(), float(g.square().sum()))


def inside(basis: SiteBasis, gradient: Tensor) -> Tensor:
    """Return ``L.T G R`` (k_out, k_in) in float64: what coefficients can follow of a gradient (d_out, d_in)."""
    left, right = (float64(side).to(gradient.device) for side in (basis.left, basis.right))
    return left.T @ float64(gradient) @ right


def grouped(backbone: Backbone, sites: Sequence[str], numbers: int | None = None) -> Iterator[tuple[str, ...]]:
    """Yield the sites in runs whose weights have at most ``numbers`` (:data:`GROUP_NUMBERS`) numbers together."""
    most = GROUP_NUMBERS if numbers is None else numbers
    run: list[str] = []
    size = 0
    for site in sites:
        place = backbone.site(site)
        own = place.d_out * place.d_in
        if run and size + own > most:
            yield tuple(run)
            run, size = [], 0
        run.append(site)
        size += own
    if run:
        yield tuple(run)


def weight_gradients(
    backbone: Backbone,
    task: PreparedTask,
    head: nn.Module,
    sites: tuple[str, ...],
    options: TrainingOptions,
    adapter: Adapter = NOTHING,
) -> dict[str, Tensor]:
    """Return the gradient (d_out, d_in) of the loss with respect to every site's weight, over a few batches.

    Always the same batches for the same options, so that two calls differ only in what they are given.

    Args:
        backbone: the encoder; left as it was.
        task: whose loss.
        head: the head.
        sites: where gradients are wanted.
        options: batches, and what saves memory.
        adapter: the change, by site, that the weights have while the gradient is taken; sites without any have none.

    Raises:
        ConfigError: NaN or infinity.
    """
    draw = torch.Generator().manual_seed(options.seed)
    fixed = {site: fixed_factors(backbone.site(site), factors) for site, factors in adapter.items()}
    changed = {site: adapted(backbone.site(site), factors) for site, factors in fixed.items() if site not in sites}
    probes = {site: probed(backbone.site(site), fixed.get(site)) for site in sites}
    matrices = [probe.change for probe in probes.values()]
    total = [torch.zeros_like(matrix) for matrix in matrices]
    with injected(backbone, {**changed, **probes}), recomputed(backbone, options.checkpointing):
        for rows in epoch_batches(task.train, options.batch_size, draw)[: options.gradient_batches]:
            for loss in part_losses(backbone, task, head, rows, options):
                for running, part in zip(total, torch.autograd.grad(loss, matrices), strict=True):
                    running.add_(part)
    require_finite_gradients(total, task)
    return dict(zip(sites, total, strict=True))


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
