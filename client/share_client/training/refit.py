"""Learning a task's coefficients again in a subspace that has grown since: no new directions, no data of anybody else.

How useful that may be is read off the gradient. With ``G`` the gradient of the task's loss with respect to the weight
of one site, at the adapter that is stored, a step on the coefficients in bases ``L``, ``R`` can follow ``L.T G R``
only. Its share of the energy, over all sites, is (docs/adr/0019)::

    captured = sum |L.T G R|_F^2 / sum |G|_F^2

The same number in the bases that the training itself could use says what was to be had then; what the newer bases
capture beyond it is what others have added and this task has not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask
from share_client.training.evaluation import judged_rows
from share_client.training.gradients import grouped, inside, weight_gradients
from share_client.training.in_space import train_in_space
from share_client.training.loop import fresh_head
from share_client.training.options import DEFAULT_RATE, ProgressCallback, TrainingOptions, TrainResult
from share_core.linalg import float64, residual
from share_core.privacy import Declaration
from share_core.types import Adapter, Factors, SiteBasis, Space, Update

DRAWS = 200
"""Bootstrap draws: the standard error is then itself known to a twentieth."""

REFIT_RATE = 1 / 3
"""Share of the learning rate with which a refit starts: the core is trained already, and large steps only lose it."""


@dataclass(frozen=True)
class Comparison:
    """Two adapters with their heads on the same test rows."""

    before: float
    """Metric of the stored one."""
    after: float
    """Metric of the new one."""
    noise: float
    """Standard error of ``after - before``, from drawing the rows again (paired bootstrap)."""


def gradients_at(
    backbone: Backbone,
    task: PreparedTask,
    adapter: Adapter,
    head: Mapping[str, Tensor],
    sites: tuple[str, ...],
    options: TrainingOptions,
) -> dict[str, Tensor]:
    """Return the gradient (d_out, d_in) of the loss at every site's weight plus ``adapter``, over a few batches.

    Raises:
        ConfigError: ``head`` does not fit the task, or a gradient holds NaN or infinity.
    """
    module = fresh_head(backbone, task, options.seed, head)
    found: dict[str, Tensor] = {}
    for group in grouped(backbone, sites):
        own = weight_gradients(backbone, task, module, group, options, adapter)
        found.update({site: gradient.to("cpu") for site, gradient in own.items()})
    return found


def captured_share(gradients: Mapping[str, Tensor], bases: Mapping[str, SiteBasis]) -> float:
    """Return the share of the gradients' energy that coefficients in ``bases`` can follow, from 0 to 1.

    ``sum |L.T G R|_F^2 / sum |G|_F^2`` over the sites of ``gradients``; 0 where every gradient is zero.
    """
    total = sum(float(float64(gradient).square().sum()) for gradient in gradients.values())
    found = sum(float(inside(bases[site], gradient).square().sum()) for site, gradient in gradients.items())
    return found / total if total > 0 else 0.0


def usable_bases(bases: Mapping[str, SiteBasis], update: Update) -> dict[str, SiteBasis]:
    """Return the bases that a training could use: those of its version and the free directions that it added."""
    return {
        site: _extended(basis, update.sites[site].residual if site in update.sites else None)
        for site, basis in bases.items()
    }


def _extended(basis: SiteBasis, free: Factors | None) -> SiteBasis:
    if free is None:
        return basis
    return SiteBasis(_appended(basis.left, free.out), _appended(basis.right, free.in_))


def _appended(basis: Tensor, columns: Tensor) -> Tensor:
    """Return an orthonormal basis of ``basis`` and of what ``columns`` have outside of it."""
    outside = residual(float64(basis), float64(columns))
    u, s, _ = torch.linalg.svd(outside, full_matrices=False)
    fresh = u[:, s > 1e-6 * max(float(float64(columns).norm()), 1e-300)]
    return torch.cat([basis, fresh.to(basis.dtype)], dim=1)


def compare(
    backbone: Backbone,
    task: PreparedTask,
    before: tuple[Adapter, Mapping[str, Tensor]],
    after: tuple[Adapter, Mapping[str, Tensor]],
) -> Comparison:
    """Measure two adapters, each with its head, on the same test rows."""
    old, new = judged_rows(backbone, task, *before), judged_rows(backbone, task, *after)
    score = task.kind.score
    noise = paired_noise(lambda rows: score(new[rows]) - score(old[rows]), len(old))
    return Comparison(score(old), score(new), noise)


def paired_noise(difference: Callable[[Tensor], float], rows: int, draws: int = DRAWS) -> float:
    """Return the standard error of a difference of two metrics on the same rows: the bootstrap of Efron (1979).

    Args:
        difference: computes it on given rows, an index tensor in which rows may repeat.
        rows: number of rows there are.
        draws: how often ``rows`` rows are drawn with replacement.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [difference(torch.randint(rows, (rows,), generator=generator)) for _ in range(draws)]
    return float(torch.tensor(drawn, dtype=torch.float64).std(correction=1))


def refit_in_space(
    backbone: Backbone,
    task: PreparedTask,
    space: Space,
    task_id: str,
    options: TrainingOptions,
    progress: ProgressCallback | None,
    head: Mapping[str, Tensor],
    declared: Declaration | None = None,
) -> TrainResult:
    """Train the coefficients of a stored task again in ``space``, from its core and its private head, with phi = 0.

    The rank is at least that of the stored core, so nothing of the start is cut off. Raises as :func:`train_in_space`.
    """
    rank = max((core.rank for core in space.cores[task_id].values()), default=0)
    fixed = replace(
        options,
        budget=None,
        directions=0,
        pseudo_rank=max(options.pseudo_rank, rank),
        learning_rate=REFIT_RATE * (options.learning_rate or DEFAULT_RATE),
    )
    return train_in_space(backbone, task, space, task_id, fixed, progress, head=head, declared=declared)
